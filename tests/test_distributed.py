"""Rows shared out: two processes give what one gives, to the bit, and none waits for a dead one.

This file is also what the two processes run: `python test_distributed.py FOLDER RANK`.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastclust
from fastclust import _group, _lloyd, distributed
from fastclust._sums import ExactSums
from fastclust.distributed import clustering

BLOCK = 256
N = 1900  # seven blocks and a part


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    centres = 4 * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    which = torch.randint(12, (N,), generator=generator)
    x = centres[which] + torch.randn(N, 6, generator=generator, dtype=torch.float64)
    x[1500] = x[3]  # a duplicate in the other shard
    return x.to(dtype)


def one_empty(x: torch.Tensor) -> torch.Tensor:
    """Centroids of which two are nearest to no row."""
    return torch.cat([x[:300:30], torch.full((2, x.shape[1]), 500.0, dtype=x.dtype)])


def kmeans(x, part, **options):
    weight = options.pop("weight", None)
    weight = None if weight is None else weight[part]
    return distributed.kmeans(x[part], 12, block_rows=BLOCK, sample_weight=weight, **options)


WEIGHT = (torch.arange(N) % 5).float()
CASES = {
    "kmeans": lambda x, p: kmeans(x, p, seed=1),
    "kmeans, float64": lambda x, p: kmeans(x.double(), p, seed=1),
    "kmeans, random": lambda x, p: kmeans(x, p, seed=2, init="random"),
    "kmeans, sample": lambda x, p: kmeans(x, p, seed=2, init_size=100),
    "kmeans, weights": lambda x, p: kmeans(x, p, seed=1, weight=WEIGHT),
    "kmeans, tol": lambda x, p: kmeans(x, p, seed=1, tol=1e-2),
    "kmeans, spherical": lambda x, p: kmeans(x, p, seed=1, spherical=True),
    "kmeans, empty": lambda x, p: kmeans(x, p, init=one_empty(x)),
    "kmeans, one iteration": lambda x, p: kmeans(x, p, seed=1, max_iter=1),
    "knn": lambda x, p: distributed.knn(x[p], 9, chunk_rows=300),
    "knn, euclidean": lambda x, p: distributed.knn(x[p], 9, metric="euclidean"),
    "knn_graph": lambda x, p: distributed.knn_graph(x[p], 9)[:3],
    "knn_graph, euclidean, max": lambda x, p: distributed.knn_graph(x[p], 9, metric="euclidean", symmetrize="max")[:3],
    "knn_graph, none": lambda x, p: distributed.knn_graph(x[p], 9, symmetrize="none")[:3],
    "kmeans, all in one shard": lambda x, p: kmeans(x[:200], p, seed=1),
    "knn, all in one shard": lambda x, p: distributed.knn(x[:200][p], 9),
    "diffuse, all in one shard": lambda x, p: distributed.diffuse(distributed.knn_graph(x[:200][p], 9), x[:200][p]),
    "diffuse": lambda x, p: distributed.diffuse(
        distributed.knn_graph(x[p], 9), x[p, :4], max_iter=50, block_rows=BLOCK
    ),
}
SHARDED = {
    "kmeans": (1,),
    "knn": (0, 1),
    "knn_graph": (1, 2),
    "diffuse": (0,),
}  # results that are a part of one process's

# -------------------------------------------------------------------------------------------------------- the processes


def refusals(x: torch.Tensor, part: slice, rank: int) -> dict[str, str]:
    """What each process is told where rank 1 alone passes something wrong."""
    bad = x[part].clone()
    if rank == 1:
        bad[5, 0] = torch.nan
    wrong = {
        "not finite": lambda: distributed.kmeans(bad, 3),
        "knn not finite": lambda: distributed.knn(bad, 3),
        "features": lambda: distributed.knn(x[part, : 6 - rank], 3),
        "settings": lambda: distributed.kmeans(x[part], 3 + rank),
        "tolerances": lambda: distributed.kmeans(x[part], 3, tol=0.1 * rank),
        "starts": lambda: distributed.kmeans(x[part], 3, init=x[rank : rank + 3]),
        "type": lambda: distributed.kmeans(x[part].int() if rank else x[part], 3),
    }
    told = {}
    for name, call in wrong.items():
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        told[name] = f"{type(error.value).__name__}: {error.value}"
    return told


def silence(x: torch.Tensor, part: slice, rank: int) -> tuple[str, float]:
    """One process does not take part: what the other is told, after how many seconds."""
    group = dist.new_group()
    if rank == 1:
        dist.barrier()
        return "", 0.0
    begin = time.monotonic()
    with pytest.raises(_group.PeerError) as error:
        distributed.kmeans(x[part], 3, group=group, timeout=1.0)
    seconds = time.monotonic() - begin
    dist.barrier()
    return str(error.value), seconds


def death(x: torch.Tensor, part: slice, rank: int) -> str:
    """Rank 1 is killed in its third pass: what rank 0 is told."""
    run = _lloyd.Lloyd._iterate

    def until_the_end(lloyd: _lloyd.Lloyd) -> None:
        if rank == 1 and lloyd.state["n_iter"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        run(lloyd)

    _lloyd.Lloyd._iterate = until_the_end
    with pytest.raises(_group.PeerError) as error:
        distributed.kmeans(x[part], 12, timeout=20.0)
    return str(error.value)


def process(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = rows()
    part = slice(*distributed.shard(N, block_rows=BLOCK))
    results = {name: tuple(case(x, part)) for name, case in CASES.items()}
    results["received"] = received(x, part)
    results["told"] = refusals(x, part, rank)
    results["silence"] = silence(x, part, rank)
    torch.save(results, folder / f"{rank}.pt")
    (folder / "death.txt").write_text(death(x, part, rank))


def received(x: torch.Tensor, part: slice) -> tuple[int, int]:
    """Bytes of the sums of one iteration by the formula of `kmeans`, and by the difference that one more makes."""
    seen = []

    class Counted(_group.Group):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            seen.append(self)

    clustering.Group = Counted
    for max_iter in (2, 3):
        kmeans(x, part, seed=1, max_iter=max_iter)
    clustering.Group = _group.Group
    return 8 * (12 * 7 + 1), seen[1].received - seen[0].received


if __name__ == "__main__":
    process(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # its report is written; what torch does at the end with a group of which one is dead may be an abort

# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where both processes wrote, their results, how they ended and what they printed."""
    folder = tmp_path_factory.mktemp("group")
    path = os.pathsep.join([str(Path(fastclust.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, folder, str(rank)],
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [child.communicate(timeout=300)[1] for child in started]
    assert (folder / "1.pt").exists(), "\n".join(errors)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return folder, results, [child.returncode for child in started], errors


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(run, case):
    whole = CASES[case](rows(), slice(None))
    first, second = (results[case] for results in run[1])
    for i, want in enumerate(whole):
        if i in SHARDED[case.split(",")[0]]:
            got = torch.cat([first[i], second[i]])
        elif case.startswith("knn_graph"):  # crow
            got = torch.cat([first[i], second[i][1:] + first[i][-1]])
        else:
            assert first[i].equal(second[i])
            got = first[i]
        assert got.equal(want), f"field {i}"


def test_one_process_gives_what_the_ops_give():
    x = rows(torch.float64)
    got, want = distributed.kmeans(x, 12, seed=3, block_rows=BLOCK), fastclust.kmeans(x, 12, seed=3)
    assert got.labels.equal(want.labels)
    torch.testing.assert_close(got.centroids, want.centroids, rtol=1e-13, atol=1e-13)
    graph, (crow, col, weights, _) = fastclust.knn_graph(x, 9), distributed.knn_graph(x, 9)
    assert crow.equal(graph.crow_indices())
    assert col.equal(graph.col_indices())
    assert weights.equal(graph.values())
    y = torch.nn.functional.one_hot(torch.arange(N) % 3).double()
    got = distributed.diffuse(distributed.knn_graph(x, 9), y, max_iter=40)
    torch.testing.assert_close(got.f, fastclust.diffuse(graph, y, max_iter=40).f, rtol=1e-9, atol=1e-9)


def test_traffic_is_as_stated(run):
    for results in run[1]:
        stated, measured = results["received"]
        assert measured == stated


def test_all_are_told_where_one_is_wrong(run):
    first, second = (results["told"] for results in run[1])
    begin = distributed.shard(N, rank=1, size=2, block_rows=BLOCK)[0]
    for told in (first, second):
        assert told["not finite"] == f"ValueError: kmeans: x holds 1 rows that are not finite, first at {begin + 5}"
        assert told["features"] == "ValueError: knn: features differs between processes: 6, 5"
        assert told["tolerances"].startswith("ValueError: kmeans: options differs between processes")
        assert told["starts"].startswith("ValueError: kmeans: init differs between processes")
        assert told["settings"] == "ValueError: kmeans: n_clusters differs between processes: 3, 4"
    assert first["knn not finite"] == "ValueError: knn: rank 1 has refused its arguments"
    assert (
        second["knn not finite"] == "ValueError: knn: x holds rows that are not finite, on this process the first at 5"
    )
    assert first["type"] == "ValueError: kmeans: rank 1 has refused its arguments"
    assert second["type"].startswith("TypeError: kmeans: x must have a floating-point dtype")


def test_silence_of_one_ends_the_other(run):
    text, seconds = run[1][0]["silence"]
    assert re.match(r"kmeans: \w+ failed on rank 0 of 2: another process has ended or has not answered for 1 s", text)
    assert 0.5 < seconds < 10


def test_death_of_one_ends_the_other(run):
    folder, _, codes, errors = run
    assert codes == [0, -signal.SIGKILL], errors[0]
    assert "kmeans: all_reduce failed on rank 0 of 2: another process has ended" in (folder / "death.txt").read_text()


# ------------------------------------------------------------------------------------------------------------ its parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_do_not_depend_on_the_order_and_are_exact(device, dtype):
    x = (torch.randn(5000, 3, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e9])).to(dtype).double().to(device)
    groups = torch.randint(4, (5000,), device=device)
    exact = ExactSums(x.abs().amax(dim=0), 5000, dtype)
    whole, pieces = exact.zeros(4), exact.zeros(4)
    exact.add(whole, x, groups)
    for part in torch.randperm(5000, device=device).split(77):
        exact.add(pieces, x[part], groups[part])
    assert whole.equal(pieces)
    want = torch.stack([x[groups == k].sum(dim=0) for k in range(4)])
    scale = 5000 * x.abs().amax(dim=0)
    assert ((exact.value(whole) - want).abs() <= scale * (2.0**-36 if dtype == torch.float32 else 1e-15)).all()
    exact.add(pieces, x, groups, sign=-1)
    assert not pieces.any()


def test_sums_of_many_rows_fit():
    exact = ExactSums(torch.ones(1, dtype=torch.float64), 2**40, torch.float32)
    sums = exact.zeros(1)
    exact.add(sums, torch.full((1000, 1), 1.0, dtype=torch.float64), torch.zeros(1000, dtype=torch.int64))
    assert 0 < int(sums) * (2**40 // 1000) < 2**63
    assert exact.value(sums) == 1000


@pytest.mark.parametrize(("n_rows", "size"), [(0, 3), (1, 3), (1000, 1), (16384 * 5 + 3, 2), (10**9, 64)])
def test_shards_are_whole_blocks_of_all_rows(n_rows, size):
    shards = [distributed.shard(n_rows, rank=rank, size=size) for rank in range(size)]
    assert shards[0][0] == 0
    assert shards[-1][1] == n_rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shards))
    assert all(begin % distributed.BLOCK_ROWS == 0 or begin == n_rows for begin, _ in shards)
    assert max(end - begin for begin, end in shards) <= n_rows / size + distributed.BLOCK_ROWS
