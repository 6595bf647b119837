"""The public names of fastclust, nothing else."""

from . import metrics as metrics
from . import ops as ops
from ._config import show_config as show_config
from ._diffusion import DiffusionResult as DiffusionResult
from ._diffusion import PseudoLabels as PseudoLabels
from ._diffusion import diffuse as diffuse
from ._diffusion import propagate_labels as propagate_labels
from ._graph import KNNResult as KNNResult
from ._graph import knn as knn
from ._graph import knn_graph as knn_graph
from ._kmeans import AssignResult as AssignResult
from ._kmeans import KMeansResult as KMeansResult
from ._kmeans import kmeans as kmeans
from ._kmeans import kmeans_assign as kmeans_assign
from ._pairwise import pairwise_kl as pairwise_kl
from ._pairwise import soft_assign as soft_assign
