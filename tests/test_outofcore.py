"""More rows than memory: from a file or chunks the same answers as from memory, after a kill the same as without."""

import weakref

import numpy as np
import pytest
import torch

import fastclust
from fastclust import _checkpoint, _lloyd, distributed, outofcore
from fastclust._blocks import ChunkRows, read_ahead
from fastclust._nearest import Nearest

N, D, K = 3000, 6, 8
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    centres = 1.5 * torch.randn(K, D, generator=generator)
    rows = centres[torch.randint(K, (N,), generator=generator)] + torch.randn(N, D, generator=generator)
    rows[2000] = rows[10]
    return rows


@pytest.fixture
def mapped(x, tmp_path):
    file = np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="w+", shape=(N, D))
    file[:] = x.numpy()
    file.flush()
    return np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="r", shape=(N, D))


def chunks(x: torch.Tensor, *sizes: int):
    """x in chunks of these sizes, over and over."""

    def yielded():
        begin, i = 0, 0
        while begin < len(x):
            yield x[begin : begin + sizes[i % len(sizes)]].numpy()
            begin, i = begin + sizes[i % len(sizes)], i + 1

    return yielded


def same(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.equal(w)


# -------------------------------------------------------------------------------------------------------------- k-means

OPTIONS = [{}, {"tol": 1e-3}, {"spherical": True}, {"max_iter": 2}, {"init": "random"}, {"init_size": 64}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kmeans_from_a_file_or_chunks_is_that_from_memory(device, x, mapped, options):
    want = distributed.kmeans(x.to(device), K, block_rows=512, **options)
    same(outofcore.kmeans(mapped, K, block_rows=512, device=device, **options), want)
    same(outofcore.kmeans(chunks(x, 700, 1, 300), K, block_rows=512, device=device, **options), want)
    in_memory = fastclust.kmeans(x, K, seed=0, **options) if "init_size" not in options else want
    assert in_memory.labels.cpu().equal(want.labels.cpu())


def test_kmeans_weights_rows(x, mapped):
    weight = (np.arange(N) % 3).astype(np.float64)
    got = outofcore.kmeans(mapped, K, sample_weight=weight, block_rows=512)
    want = fastclust.kmeans(x, K, sample_weight=torch.tensor(weight), seed=0)
    assert got.labels.equal(want.labels)
    torch.testing.assert_close(got.inertia, want.inertia)


@pytest.mark.parametrize("stop", range(5))
def test_kmeans_goes_on_after_a_kill(monkeypatch, tmp_path, x, mapped, stop):
    """Killed in its pass number `stop`, amid the rows."""
    label, passes = _lloyd.Lloyd._label, []
    monkeypatch.setattr(_lloyd.Lloyd, "_label", lambda *a: passes.append(a[1].begin == 0) or label(*a))
    want = outofcore.kmeans(mapped, K, tol=1e-4, block_rows=512)
    needed = sum(passes)
    assert needed > 4
    passes.clear()

    def killed(lloyd, block, centroids):
        passes.append(block.begin == 0)
        if stop == sum(passes) and block.begin == 1024:
            raise KeyboardInterrupt
        return label(lloyd, block, centroids)

    def scan(lloyd):
        raise KeyboardInterrupt

    monkeypatch.setattr(_lloyd.Lloyd, *(("_label", killed) if stop else ("_scan", scan)))
    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        outofcore.kmeans(mapped, K, tol=1e-4, block_rows=512, checkpoint=file)
    monkeypatch.undo()
    monkeypatch.setattr(_lloyd.Lloyd, "_label", lambda *a: passes.append(a[1].begin == 0) or label(*a))
    same(outofcore.kmeans(mapped, K, tol=1e-4, block_rows=512, checkpoint=file), want)
    assert sum(passes) == needed + (stop > 0)  # one more than needed: the pass that was cut short
    passes.clear()
    same(outofcore.kmeans(mapped, K, tol=1e-4, block_rows=512, checkpoint=file), want)
    assert not passes


def test_a_checkpoint_is_whole_or_the_old_one(monkeypatch, tmp_path):
    kept = _checkpoint.Checkpoint("kmeans", tmp_path / "state.pt", {"k": 3})
    kept.save({"n_iter": 1})

    def half(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        kept.save({"n_iter": 2})
    assert kept.load(CPU) == {"n_iter": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, x, mapped):
    file = tmp_path / "state.pt"
    outofcore.kmeans(mapped, K, checkpoint=file, max_iter=1)
    with pytest.raises(ValueError, match=r"kmeans: .*state.pt is of another run: n_clusters was 8, is 5"):
        outofcore.kmeans(mapped, 5, checkpoint=file, max_iter=1)
    with pytest.raises(ValueError, match="is of another run: first block was"):
        outofcore.kmeans(x.flip(0), K, checkpoint=file, max_iter=1)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"kmeans: .*state.pt is not a checkpoint"):
        outofcore.kmeans(mapped, K, checkpoint=file)


# ----------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
def test_knn_of_a_file_or_chunks_is_that_of_memory(device, x, mapped, metric):
    want = fastclust.knn(x, 9, metric=metric)
    options = {"metric": metric, "chunk_rows": 700, "query_rows": 1100, "device": device}
    same(outofcore.knn(mapped, 9, **options), want)
    same(outofcore.knn(chunks(x, 999, 2), 9, **options), want)
    same(
        outofcore.knn(mapped, 9, queries=x[:50] + 0.1, **options),
        fastclust.knn(x, 9, queries=x[:50] + 0.1, metric=metric),
    )


def test_knn_with_chunks_smaller_than_k(x):
    same(outofcore.knn(x[:40], 39, chunk_rows=7), fastclust.knn(x[:40], 39))
    same(outofcore.knn(x[:1].repeat(30, 1), 5, chunk_rows=4), fastclust.knn(x[:1].repeat(30, 1), 5))


@pytest.mark.parametrize("stop", [0, 3, 6, 14])
def test_knn_goes_on_after_a_kill(monkeypatch, tmp_path, x, mapped, stop):
    options = {"chunk_rows": 700, "query_rows": 1100, "folder": tmp_path / "nn"}
    monkeypatch.setattr(outofcore, "SECONDS_BETWEEN_SAVES", -1.0)
    see, seen = Nearest.see, []

    def killed(nearest, begin, chunk):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(begin)
        see(nearest, begin, chunk)

    monkeypatch.setattr(Nearest, "see", killed)
    with pytest.raises(KeyboardInterrupt):
        outofcore.knn(mapped, 9, **options)
    monkeypatch.setattr(Nearest, "see", lambda *a: seen.append(a[1]) or see(*a))
    same(outofcore.knn(mapped, 9, **options), fastclust.knn(x, 9))
    assert len(seen) == 15  # three panels of five chunks, none twice
    on_disk = np.load(tmp_path / "nn" / "indices.npy")
    assert np.array_equal(on_disk, fastclust.knn(x, 9).indices.numpy())


# ---------------------------------------------------------------------------------------------------- reading, refusals


def test_no_more_than_one_block_is_read_ahead():
    alive = weakref.WeakSet()

    class Item:
        pass

    def items():
        for _ in range(10):
            item = Item()
            alive.add(item)
            yield item
            del item

    for item in read_ahead(items()):
        assert len(alive) <= 3  # the one in hand, the one read ahead, and the last until it is let go
        del item


def test_chunks_are_cut_into_blocks(x):
    rows = ChunkRows("kmeans", chunks(x, 700, 1, 300), 512)
    assert [(begin, len(block)) for begin, block in rows.blocks(1024)] == [
        (begin, min(512, N - begin)) for begin in range(1024, N, 512)
    ]
    assert torch.cat([block for _, block in rows.blocks()]).equal(x)
    picked = torch.tensor([0, 511, 512, 2999])
    assert rows.take(picked).equal(x[picked])


def test_what_is_refused(x):
    bad = x.clone()
    bad[[1700, 2900], 3] = torch.nan
    lengths = iter([x, x, x[:-1]])
    for call, kind, text in [
        (lambda: outofcore.kmeans(bad, K), ValueError, "kmeans: x holds 2 rows that are not finite, first at 1700"),
        (lambda: outofcore.kmeans(x.long(), K), TypeError, "kmeans: x must have a floating-point dtype"),
        (lambda: outofcore.kmeans(np.zeros((4, 2), int), 2), TypeError, "kmeans: x must have a floating-point dtype"),
        (lambda: outofcore.kmeans(x[0], K), ValueError, r"kmeans: x must be \(N, D\), got \(6,\)"),
        (lambda: outofcore.kmeans([[1.0]], K), TypeError, "kmeans: x must be a tensor, an array or a function"),
        (lambda: outofcore.kmeans(list, K), ValueError, "kmeans: x yields no rows"),
        (lambda: outofcore.kmeans(lambda: [x, x[:, :3]], K), ValueError, "kmeans: x yields chunks that differ"),
        (
            lambda: outofcore.kmeans(lambda: [next(lengths)], K),
            ValueError,
            "kmeans: x yielded 3000 rows at first and 2999",
        ),
        (lambda: outofcore.kmeans(x, N + 1), ValueError, "kmeans: n_clusters must be at most the number of rows 3000"),
        (lambda: outofcore.kmeans(x, K, sample_weight=np.zeros(N)), ValueError, "kmeans: sample_weight is zero"),
        (lambda: outofcore.kmeans(x, K, sample_weight=-np.ones(N)), ValueError, "kmeans: sample_weight holds values"),
        (lambda: outofcore.kmeans(x, K, block_rows=1 << 17), ValueError, "kmeans: block_rows must lie in"),
        (lambda: outofcore.kmeans(x, K, init=x[:3]), ValueError, r"kmeans: init must be \(8, 6\), got \(3, 6\)"),
        (
            lambda: outofcore.kmeans(0 * x, K, spherical=True),
            ValueError,
            "kmeans: x holds 3000 rows that are not finite and",
        ),
        (lambda: outofcore.kmeans(1e30 * x, K), ValueError, "kmeans_assign: x is too large"),
        (lambda: outofcore.knn(bad, 3), ValueError, "knn: x holds rows that are not finite, one of them at 1700"),
        (lambda: outofcore.knn(x, N), ValueError, "knn: k must be below the 3000 rows"),
        (lambda: outofcore.knn(x, 3, queries=x.double()), ValueError, "knn: queries must be"),
    ]:
        with pytest.raises(kind, match=text):
            call()


def test_the_bar_keeps_quiet_off_a_terminal(capsys, x):
    outofcore.kmeans(x, K, max_iter=2)
    outofcore.knn(x, 3)
    assert capsys.readouterr() == ("", "")
