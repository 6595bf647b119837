"""More rows than memory, for real: k-means and kNN over a file ten times the memory that the process may use.

    python benches/soak.py --folder DIR [--gigabytes 20] [--limit-gigabytes 2] [--keep]

Writes the rows to DIR (deleted afterwards), puts itself under a memory limit (a cgroup where it may make one, page
cache included, and RLIMIT_DATA in any case), runs, and checks the answers in pieces against the ops in memory.
"""

import argparse
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch

import fastclust
from fastclust import outofcore

D, K, BLOBS, PIECE = 128, 100, 100, 1 << 18
GIB = 1 << 30


def write(path: Path, n_rows: int) -> None:
    rng = np.random.default_rng(0)
    centres = 2 * rng.standard_normal((BLOBS, D), dtype=np.float32)
    with open(path, "wb") as file:
        for begin in range(0, n_rows, PIECE):
            n = min(PIECE, n_rows - begin)
            rows = rng.standard_normal((n, D), dtype=np.float32)
            rows += centres[rng.integers(BLOBS, size=n)]
            rows.tofile(file)


def limit(n_bytes: int) -> str:
    """Puts this process under a memory limit and says which."""
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    group = Path("/sys/fs/cgroup/memory/fastclust-soak")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return "RLIMIT_DATA"
    return "cgroup, page cache included, and RLIMIT_DATA"


def memory(field: str) -> float:
    """Of this process, in GiB."""
    status = Path("/proc/self/status").read_text().split(field + ":", 1)[1]
    return int(status.split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--limit-gigabytes", type=float, default=2.0)
    parser.add_argument("--max-iter", type=int, default=4)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    n_rows = int(options.gigabytes * 1e9) // (4 * D)
    path = options.folder / "rows.f32"
    if not path.exists() or path.stat().st_size != 4 * D * n_rows:
        write(path, n_rows)
    print(f"rows {n_rows} x {D} float32, {path.stat().st_size / 1e9:.2f} GB; threads {torch.get_num_threads()}")
    print("limit", options.limit_gigabytes, "GiB by", limit(int(options.limit_gigabytes * GIB)), flush=True)
    x = np.memmap(path, dtype=np.float32, mode="r", shape=(n_rows, D))

    begin = time.monotonic()
    checkpoint = options.folder / "kmeans.pt"
    result = outofcore.kmeans(x, K, max_iter=options.max_iter, checkpoint=checkpoint)
    seconds = time.monotonic() - begin
    print(f"kmeans K={K}: {int(result.n_iter)} iterations, {seconds:.0f} s, inertia {float(result.inertia):.6g}")
    print(f"peak resident {memory('VmHWM'):.2f} GiB, anonymous now {memory('RssAnon'):.2f} GiB", flush=True)

    queries = torch.from_numpy(x[:: n_rows // 1000][:1000].copy())
    begin = time.monotonic()
    found = outofcore.knn(x, 10, queries=queries, metric="euclidean")
    print(f"knn of 1000 queries, k=10: {time.monotonic() - begin:.0f} s")
    print(f"peak resident {memory('VmHWM'):.2f} GiB, anonymous now {memory('RssAnon'):.2f} GiB", flush=True)

    own = torch.arange(0, n_rows, n_rows // 1000)[:1000]
    assert found.indices[:, 0].equal(own), "a row is its own nearest neighbour"
    worst = found.values[:, -1].clone()
    wrong = 0
    for start in range(0, n_rows, 100_003):  # other pieces than the run's
        piece = torch.from_numpy(x[start : start + 100_003].copy())
        wrong += int(
            (fastclust.kmeans_assign(piece, result.centroids).labels != result.labels[start : start + len(piece)]).sum()
        )
        if start < 30 * 100_003:
            nearest = fastclust.knn(piece, 10, queries=queries, metric="euclidean")
            inside = (found.indices >= start) & (found.indices < start + len(piece))
            better = nearest.values < worst[:, None]
            assert better.sum(1).le(inside.sum(1)).all(), "a nearer row was missed"
    print(f"labels that differ from kmeans_assign in memory: {wrong} of {n_rows}", flush=True)
    checkpoint.unlink()
    if not options.keep:
        path.unlink()


if __name__ == "__main__":
    main()
