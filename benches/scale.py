"""Rows shared out among processes: the same answers, and the traffic and memory that docs/scale.md states.

    for p in 1 2 4; do torchrun --nproc-per-node $p benches/scale.py; done

Rank 0 prints: a checksum of each answer, seconds, bytes that a process received by its own count, bytes that all
processes sent over the loopback device per process, and the memory that the call took beside what was there before.
"""

import ctypes
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from fastclust import _group, distributed
from fastclust.distributed import clustering, diffusion, neighbours

N, D, K, CLASSES = 262_144, 64, 100, 10
GRAPH_N, NEIGHBOURS = 32_768, 20
BLOCK = 4096

seen: list[_group.Group] = []


class Counted(_group.Group):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        seen.append(self)


def loopback() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def memory(field: str) -> float:
    """Of this process, in MiB."""
    status = Path("/proc/self/status").read_text().split(field + ":", 1)[1]
    return int(status.split()[0]) / 2**10


def checksum(part: torch.Tensor) -> str:
    whole = _group.Group("checksum").gather(part.contiguous())
    return f"{zlib.crc32(whole.numpy().data):08x}"


def measured(name: str, call, steps: int = 1):
    dist.barrier()
    seen.clear()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident = memory("VmRSS")
    before, begin = loopback(), time.monotonic()
    result = call()
    dist.barrier()
    seconds, sent = time.monotonic() - begin, loopback() - before
    extra = memory("VmHWM") - resident
    received = sum(group.received for group in seen)
    if dist.get_rank() == 0:
        size = dist.get_world_size()
        print(
            f"{size} processes, {name}: {seconds:.2f} s, {received / steps / 1e6:.3f} MB received a step by count, "
            f"{sent / size / steps / 1e6:.3f} MB by loopback, {extra:.0f} MiB beside its rows"
        )
    return result


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for module in (clustering, neighbours, diffusion):
        module.Group = Counted
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(K, D, generator=generator)
    x = centres[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    own = slice(*distributed.shard(N, block_rows=BLOCK))
    start = x[:: N // K][:K].clone()

    run = {"init": start, "block_rows": BLOCK, "max_iter": 20}
    clusters = measured("kmeans, 20 iterations", lambda: distributed.kmeans(x[own], K, **run), 20)
    own = slice(*distributed.shard(GRAPH_N, block_rows=BLOCK))
    rows = x[own].clone()
    graph = measured("knn_graph", lambda: distributed.knn_graph(rows, NEIGHBOURS))
    y = torch.nn.functional.one_hot(torch.arange(own.start, own.stop) % CLASSES, CLASSES).float()
    solve = {"max_iter": 20, "tol": 0.0, "block_rows": BLOCK}
    solved = measured("diffuse, 20 steps", lambda: distributed.diffuse(graph, y, **solve), 22)
    sums = [checksum(part) for part in (clusters.labels, graph.col, graph.weights, solved.f)]
    if dist.get_rank() == 0:
        print(f"labels {sums[0]}, inertia {float(clusters.inertia):.9g}, graph {sums[1]} {sums[2]}, diffused {sums[3]}")
        print(f"centroids {zlib.crc32(clusters.centroids.numpy().data):08x}, iterations {int(clusters.n_iter)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
