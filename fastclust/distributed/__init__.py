"""The ops over rows that are shared out among the processes of a torch.distributed group.

Every process of the group calls the same function with its own rows, in rank order a part of one long list each, and
gets back what belongs to its rows (`kmeans`: and the centroids, the same everywhere). Start them with `torchrun` and
`torch.distributed.init_process_group`, gloo for rows on the CPU, NCCL for rows on GPUs; without a group a function
works on this process's rows alone, by the same code.

Results do not depend on how many processes share the rows, where shards begin at multiples of `BLOCK_ROWS` (`shard`
cuts so): neighbours and k-means in no bit, diffusion in no bit on the CPU.

A process that ends, fails or hangs ends the others: `PeerError` after `timeout` seconds at most.
"""

from .._group import PeerError as PeerError
from .clustering import kmeans as kmeans
from .diffusion import diffuse as diffuse
from .neighbours import ShardedGraph as ShardedGraph
from .neighbours import knn as knn
from .neighbours import knn_graph as knn_graph
from .sharding import BLOCK_ROWS as BLOCK_ROWS
from .sharding import shard as shard
