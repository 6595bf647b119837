"""k-means: against its float64 twin and scikit-learn, by behaviour, at the edges, and what it refuses."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import fastclust
from fastclust import ops, reference

FLOATS = [torch.float32, torch.float64]


def blobs(*shape: int, n_blobs: int = 8, spread: float = 0.6, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    """Rows around n_blobs centres, near enough for their clusters to touch."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_blobs, shape[-1], generator=generator, dtype=torch.float64)
    which = torch.randint(n_blobs, shape[:-1], generator=generator)
    return (centres[which] + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def assert_nearest(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor, rounding: float) -> None:
    """Each label's squared distance is the least, up to `rounding` of the squares that make up the score."""
    x, centroids = x.double(), centroids.double()
    squared = torch.cdist(x, centroids).square()
    chosen = squared.gather(-1, labels[..., None])[..., 0]
    centred = x - x.mean(dim=-2, keepdim=True)
    scale = centred.square().sum(dim=-1) + (centroids - x.mean(dim=-2, keepdim=True)).square().sum(dim=-1).amax()
    assert (chosen - squared.amin(dim=-1) <= rounding * scale).all()


# ------------------------------------------------------------------------------------------------------------ reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (5, 3, 5), (49, 1, 7), (97, 17, 33), (300, 130, 20), (400, 64, 70), (200, 300, 3)]
)
def test_lloyd_equals_its_twin(device, dtype, n, d, k):
    x = blobs(2, n, d, dtype=dtype)
    init = torch.stack([x[:, torch.randperm(n)[:k]] for _ in range(3)], dim=1)
    got = ops.kmeans_lloyd(x.to(device), init.to(device), None, None, 15, 0.0, False, True)
    want = reference.kmeans_lloyd(x.double(), init.double(), max_iter=15)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got[2].cpu().double(), want[2], rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-10, atol=1e-10)
        assert got[1].cpu().equal(want[1])
        assert got[3].cpu().equal(want[3])


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_options_equal_their_twin(device, spherical, weighted, constrained, tol):
    x = blobs(2, 400, 9)
    x = x / x.norm(dim=-1, keepdim=True) if spherical else x
    init = x[:, :12].reshape(2, 2, 6, 9)
    weight = torch.rand(2, 400, dtype=torch.float64).mul(3).floor() if weighted else None
    fixed = torch.where(torch.rand(2, 400) < 0.2, torch.randint(6, (2, 400)), -1) if constrained else None
    arguments = (x, init, weight, fixed)
    got = ops.kmeans_lloyd(*(a if a is None else a.to(device) for a in arguments), 30, tol, spherical, True)
    want = reference.kmeans_lloyd(*arguments, 30, tol, spherical)
    assert got[1].cpu().equal(want[1])
    assert got[3].cpu().equal(want[3])
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[2].cpu(), want[2])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("candidates", [1, 4])
def test_plus_plus_equals_its_twin(device, weighted, candidates):
    x = blobs(2, 333, 6)
    weight = torch.rand(2, 333, dtype=torch.float64).mul(3).floor() if weighted else None
    uniforms = torch.rand(2, 2, 30, candidates, dtype=torch.float64)
    got = ops.kmeans_plus_plus(x.to(device), None if weight is None else weight.to(device), uniforms.to(device)).cpu()
    want = reference.kmeans_plus_plus(x, weight, uniforms)
    for b, r in ((0, 0), (0, 1), (1, 0), (1, 1)):
        differ = (got[b, r] != want[b, r]).nonzero()
        if len(differ) == 0:
            continue
        # Two rows that are each other's nearest leave equal masses whichever is picked: there rounding may choose.
        w = torch.ones(333, dtype=torch.float64) if weight is None else weight[b]
        first = int(differ[0])
        left = [
            (w * torch.cdist(x[b], x[b, rows[b, r, : first + 1]]).square().amin(dim=1)).sum() for rows in (got, want)
        ]
        torch.testing.assert_close(left[0], left[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "k", "candidates", "values"), [(1500, 40, 60, 5, 25), (700, 20, 30, 11, 3), (12, 2, 8, 3, 2)]
)
def test_plus_plus_picks_what_its_twin_picks_of_integers(device, weighted, n, d, k, candidates, values):
    """Their distances and sums are exact in any order; the last has fewer distinct rows than picks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(values, (2, n, d), generator=generator).float()
    weight = torch.randint(3, (2, n), generator=generator).float() if weighted else None
    uniforms = torch.rand(2, 2, k, candidates, generator=generator)
    got = ops.kmeans_plus_plus(x.to(device), None if weight is None else weight.to(device), uniforms.to(device)).cpu()
    want = reference.kmeans_plus_plus(x.double(), None if weight is None else weight.double(), uniforms.double())
    assert got.equal(want)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_inertia_equals_scikit_learns(device, k, offset):
    x = blobs(3000, 32, n_blobs=30, dtype=torch.float32) + offset
    got = fastclust.kmeans(x.to(device), k, init=x[:k].to(device), max_iter=300)
    peer = KMeans(k, init=x[:k].double().numpy(), n_init=1, max_iter=300, tol=0).fit(x.double().numpy())
    assert float(got.inertia) == pytest.approx(peer.inertia_, rel=1e-5)
    assert_nearest(x, got.centroids.cpu(), got.labels.cpu(), 1e-6 if offset == 0 else 1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (1000, 96, 257), (333, 1, 40), (100, 1030, 9)])
def test_assign_finds_the_nearest(device, dtype, n, d, k):
    x, centroids = blobs(n, d, dtype=dtype), blobs(k, d, dtype=dtype, seed=1)
    got = fastclust.kmeans_assign(x.to(device), centroids.to(device))
    want = reference.kmeans_assign(x[None].double(), centroids[None].double())
    assert_nearest(x, centroids, got.labels.cpu(), 1e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(got.distances.cpu(), want[1][0].to(dtype))


# ------------------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOATS])
def test_result_belongs_together(device, dtype):
    x = blobs(500, 12, dtype=dtype).to(device)
    result = fastclust.kmeans(x, 20, max_iter=4)
    predicted = fastclust.kmeans_assign(x, result.centroids)
    assert result.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.centroids.device == x.device
    assert predicted.labels.equal(result.labels)
    assert float(predicted.distances.sum()) == pytest.approx(float(result.inertia), rel=1e-5)
    assert fastclust.kmeans_assign(result.centroids, result.centroids).labels.tolist() == list(range(20))


def test_inertia_never_rises(device):
    x = blobs(2000, 16, n_blobs=40).to(device)
    inertia = [float(fastclust.kmeans(x, 40, init=x[:40], max_iter=i).inertia) for i in range(1, 12)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(inertia))
    assert inertia[-1] < inertia[0]


@given(
    n=st.integers(1, 60), d=st.integers(1, 5), k=st.integers(1, 12), values=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_any_small_problem_ends_right(n, d, k, values, seed):
    """Integer coordinates: many duplicates and ties, empty clusters, fewer distinct rows than clusters."""
    k = min(k, n)
    x = torch.randint(values, (n, d), generator=torch.Generator().manual_seed(seed)).double()
    result = fastclust.kmeans(x, k, seed=seed, max_iter=200)
    assert int(result.n_iter) < 200
    assert_nearest(x, result.centroids, result.labels, 1e-13)
    for c in result.labels.unique().tolist():
        torch.testing.assert_close(result.centroids[c], x[result.labels == c].mean(dim=0))
    if len(x.unique(dim=0)) <= k:
        assert float(result.inertia) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("n_blobs", [8, 100])
@pytest.mark.parametrize("max_iter", [3, 4, 6, 12])
def test_no_row_misses_a_centroid_that_came_near(device, n_blobs, max_iter):
    """Many clusters per blob, and many blobs, whose clusters travel far: searches leave out what cannot be nearer."""
    x = blobs(200 * 32, 24, n_blobs=n_blobs, dtype=torch.float32)
    init = torch.stack([x[seed * 200 : (seed + 1) * 200] for seed in range(2)])[None]
    fixed = torch.where(torch.rand(len(x)) < 0.05, 7, -1)
    for labels in (None, fixed[None].to(device)):
        centroids, got, _, _ = ops.kmeans_lloyd(
            x[None].to(device), init.to(device), None, labels, max_iter, 0.0, False, True
        )
        for start in range(2):
            free = fixed < 0 if labels is not None else slice(None)
            assert_nearest(x[free], centroids[0, start].cpu(), got[0, start].cpu()[free], 1e-6)


def axis(d: int, *coordinates: tuple[int, float]) -> torch.Tensor:
    """The vector with these coordinates at these places, zero elsewhere."""
    vector = torch.zeros(d)
    for place, value in coordinates:
        vector[place] = value
    return vector


def one_row_among_movers(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The light row 0 stands at 4 from its centroid, 4.2 from two others and 7 from a fourth.

    The first update makes the fourth its nearest: that moves near ("comes"), or the first three move away ("goes"). Few
    centroids move farther than what lies between other rows' centroids, the corners of a cube: those few are searched
    by themselves.
    """
    ends = [axis(16, (0, 4)), axis(16, (1, 4.2)), axis(16, (2, -4.2)), axis(16, (3, -7))]
    ends += [axis(16, (place, 8)) for place in (11, 12, 13, 14)]
    starts = list(ends)
    if case == "comes":
        ends[3], starts[4], starts[5] = axis(16, (3, -3.6)), axis(16, (11, 14)), axis(16, (12, 14))
    else:
        ends[:3] = axis(16, (0, 12)), axis(16, (1, 12.2)), axis(16, (2, -12.2))
    corners = torch.zeros(120, 16)
    corners[:, 4:11] = 3 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)))[:120]
    noise = 0.1 * torch.randn(480, 16, generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.zeros(1, 16), torch.stack(ends), corners.repeat(4, 1) + noise])
    weight = torch.ones(len(x))
    weight[0] = 1e-6
    return x, torch.cat([torch.stack(starts), corners]), weight


def a_span_left_behind() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A centroid goes from one heavy row to the next, 5 on in each pass: each is another's until it has come that near.

    From the third pass to the fourth it leaves 800 light rows, 2 from it, to a group of resting centroids at 6 from
    them. All other rows keep no lead, which has the rows sorted.
    """
    resting = axis(64, (0, 8), (2, 6)).repeat(16, 1)
    resting[:, 3] = 0.02 * torch.arange(16)
    heavy = torch.stack([axis(64, (0, 5.0 * step)) for step in (1, 2, 3)])
    holders = heavy + axis(64, (1, 8))
    generator = torch.Generator().manual_seed(0)
    centres = 8 * torch.nn.functional.normalize(torch.randn(8, 8, generator=generator), dim=1)
    others = torch.zeros(4600, 64)
    which = torch.randint(8, (4600,), generator=generator)
    others[:, 4:12] = centres[which] + 2 * torch.randn(4600, 8, generator=generator)
    x = torch.cat([resting, holders, heavy, axis(64, (0, 8)).repeat(800, 1), others])
    weight = torch.ones(len(x))
    weight[:19], weight[19:22], weight[22:822] = 1e9, torch.tensor([1e3, 1e5, 1e7]), 1e-6
    return x, torch.cat([resting, torch.zeros(1, 64), holders, others[:108]]), weight


@pytest.mark.parametrize(
    "problem",
    [lambda: one_row_among_movers("comes"), lambda: one_row_among_movers("goes"), a_span_left_behind],
    ids=["near mover comes", "own centroid goes", "own centroid leaves a span"],
)
def test_every_move_counts_in_what_is_left_out(device, problem):
    """What bounds leave out of a search, groups out of reach and all but far movers, may come near by every move."""
    x, init, weight = problem()
    for max_iter in range(1, 7):
        centroids, labels, _, _ = ops.kmeans_lloyd(
            *(t.to(device) for t in (x[None], init[None, None], weight[None])), None, max_iter, 0.0, False, True
        )
        assert_nearest(x, centroids[0, 0].cpu(), labels[0, 0].cpu(), 1e-6)


def test_drift_of_moved_sums_shows_in_no_centroid():
    """Features whose mean is 0 but for rounding: drift of sums that rows came to and left would be all of it."""
    n, k = 2000, 8
    generator = torch.Generator().manual_seed(0)
    decide = blobs(n // 2, 8, spread=1.5, dtype=torch.float32)
    cancel = torch.randn(n // 2, 8, generator=generator) * 10 ** (8 * torch.rand(n // 2, 8, generator=generator) - 7)
    mirrored = torch.cat([torch.cat([cancel, decide], 1), torch.cat([-cancel, decide], 1)])
    x = mirrored[torch.randperm(n, generator=generator)]
    init = torch.cat([torch.zeros(k, 8), x[:k, 8:]], 1)
    result = fastclust.kmeans(x, k, init=init)
    assert result.n_iter > 5
    sums = np.zeros((k, 16))
    np.add.at(sums, result.labels.numpy(), x.double().numpy())  # row after row
    means = sums / np.bincount(result.labels.numpy(), minlength=k)[:, None]
    assert torch.from_numpy(means).float().equal(result.centroids)


def test_ties_go_to_the_lowest_centroid(device):
    centroids = torch.tensor([[5.0, 0], [1, 1], [1, 1], [-1, -1], [1, 1]], device=device).repeat(20, 1)
    x = torch.tensor([[1.0, 1], [0, 0], [-1, -1], [9, 0]], device=device)
    assert fastclust.kmeans_assign(x, centroids).labels.tolist() == [1, 1, 3, 0]


def test_one_row_per_cluster(device):
    x = blobs(40, 5).to(device)
    result = fastclust.kmeans(x, 40, seed=3)
    assert sorted(result.labels.tolist()) == list(range(40))
    assert float(result.inertia) == 0


def test_empty_clusters_take_the_farthest_rows_of_the_largest(device):
    x = torch.tensor([[0.0], [1], [2], [9], [20], [21]], device=device)
    init = torch.tensor(
        [[3.0], [20.5], [100], [200]], device=device
    )  # 2 and 3 get nothing; cluster 0 has 4 rows around 3
    one = fastclust.kmeans(x, 4, init=init, max_iter=1)
    assert one.centroids.flatten().tolist() == [3.0, 20.5, 9.0, 0.0]
    result = fastclust.kmeans(x, 4, init=init)
    assert len(result.labels.unique()) == 4


def test_weights_count_rows(device):
    x = blobs(200, 4).to(device)
    counts = torch.arange(200, device=device) % 4
    repeated = fastclust.kmeans(x.repeat_interleave(counts, dim=0), 6, init=x[1:7])
    weighted = fastclust.kmeans(x, 6, init=x[1:7], sample_weight=counts.double())
    torch.testing.assert_close(weighted.centroids, repeated.centroids)
    torch.testing.assert_close(weighted.inertia, repeated.inertia)
    scaled = fastclust.kmeans(x, 6, init=x[1:7], sample_weight=counts.double() * 1e-30)
    assert scaled.labels.equal(weighted.labels)


def test_light_rows_survive_a_heavy_one(device):
    x = torch.tensor([[0.0], [4], [5], [6], [7], [30], [31]], dtype=torch.float64, device=device)
    weight = torch.tensor([1e15, 1, 1, 1, 1, 1, 1], dtype=torch.float64, device=device)
    init = torch.tensor([[-9.0], [3.4], [30]], dtype=torch.float64, device=device)
    for dtype in FLOATS:
        result = fastclust.kmeans(x.to(dtype), 3, init=init.to(dtype), sample_weight=weight.to(dtype))
        assert sorted(result.centroids.flatten().tolist()) == pytest.approx([0, 5.5, 30.5], abs=1e-5)


def test_fixed_rows_count_for_their_cluster(device):
    x = blobs(300, 4, n_blobs=3).to(device)
    fixed = torch.full((300,), -1, device=device)
    fixed[:30] = torch.arange(30, device=device) % 3
    result = fastclust.kmeans(x, 3, labels=fixed, seed=0)
    assert result.labels[:30].equal(fixed[:30])
    assert_nearest(x[30:].cpu(), result.centroids.cpu(), result.labels[30:].cpu(), 1e-12)
    for c in range(3):
        torch.testing.assert_close(result.centroids[c], x[result.labels == c].mean(dim=0))
    first = fastclust.kmeans(x, 3, labels=fixed, init="random", max_iter=1, tol=1e9)
    start = torch.stack([x[:30][fixed[:30] == c].mean(dim=0) for c in range(3)])
    again = fastclust.kmeans(x, 3, labels=fixed, init=start, max_iter=1, tol=1e9)
    torch.testing.assert_close(first.centroids, again.centroids)


def test_spherical_ignores_length(device):
    x = blobs(300, 8).to(device)
    stretched = x * torch.rand(300, 1, dtype=torch.float64, device=device).add(0.1)
    one = fastclust.kmeans(x, 5, spherical=True, init=x[:5])
    two = fastclust.kmeans(stretched, 5, spherical=True, init=x[:5])
    assert one.labels.equal(two.labels)
    torch.testing.assert_close(one.centroids.norm(dim=1), torch.ones(5, dtype=torch.float64, device=device))
    cosine = (x / x.norm(dim=1, keepdim=True) * one.centroids[one.labels]).sum(dim=1)
    torch.testing.assert_close(one.inertia, 2 * (1 - cosine).sum())


def test_batch_equals_one_by_one(device):
    x = blobs(9, 150, 7, dtype=torch.float32).to(device)
    together = fastclust.kmeans(x, 5, init=x[:, :5])
    for b in range(9):
        alone = fastclust.kmeans(x[b], 5, init=x[b, :5])
        for field, single in zip(together, alone, strict=True):
            assert field[b].equal(single)


def test_best_start_is_kept(device):
    x = blobs(400, 3, n_blobs=12).to(device)
    torch.manual_seed(5)
    rows = torch.rand((1, 6, 400), dtype=torch.float64, device=device).log().topk(12, dim=-1).indices[0]
    runs = [fastclust.kmeans(x, 12, init=x[r]) for r in rows]
    torch.manual_seed(5)
    best = fastclust.kmeans(x, 12, init="random", n_init=6)
    inertia = [float(run.inertia) for run in runs]
    assert float(best.inertia) == min(inertia) < max(inertia)
    assert best.labels.equal(runs[inertia.index(min(inertia))].labels)


def test_plus_plus_beats_random(device):
    x = blobs(2000, 2, n_blobs=50, spread=0.02).to(device)
    plus_plus, random = (
        sum(float(fastclust.kmeans(x, 50, init=init, seed=seed).inertia) for seed in range(5))
        for init in ("k-means++", "random")
    )
    assert plus_plus < 0.5 * random


def test_plus_plus_draws_by_squared_distance(device):
    """Of rows at 0 (always first: the others weigh nothing at pick 0 … here by uniform 0), 1 and 3: odds 1 to 9."""
    x = torch.tensor([[0.0], [1], [3]], device=device)[None]
    uniforms = torch.zeros(1, 4000, 2, 1, device=device)
    uniforms[0, :, 1, 0] = (torch.arange(4000, device=device) + 0.5) / 4000
    rows = ops.kmeans_plus_plus(x, None, uniforms)
    assert rows[0, :, 1].bincount(minlength=3).tolist() == [0, 400, 3600]


def test_seed_decides(device):
    x = blobs(300, 4).to(device)
    for init in ("k-means++", "random"):
        same = [fastclust.kmeans(x, 9, init=init, seed=7, max_iter=1).centroids for _ in range(2)]
        generator = torch.Generator(device).manual_seed(7)
        same.append(fastclust.kmeans(x, 9, init=init, seed=generator, max_iter=1).centroids)
        torch.manual_seed(11)
        default = fastclust.kmeans(x, 9, init=init, max_iter=1).centroids
        torch.manual_seed(11)
        assert default.equal(fastclust.kmeans(x, 9, init=init, max_iter=1).centroids)
        assert same[0].equal(same[1])
        assert same[0].equal(same[2])
        assert not same[0].equal(default)


def test_threads_do_not_change_a_bit():
    x = blobs(3001, 40, n_blobs=60, dtype=torch.float32)
    many = blobs(7, 201, 5, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            weight = torch.arange(3001) % 5 + 0.1
            results.append((*fastclust.kmeans(x, 60, seed=0, sample_weight=weight), *fastclust.kmeans(many, 4, seed=0)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


# --------------------------------------------------------------------------------------------- dtypes, views, compiling


def test_strides_and_offsets_do_not_matter(device):
    base = blobs(201, 24, dtype=torch.float32).to(device)
    views = (base[1:, 1::2], base[1:, 1::2].contiguous(), base[1:, 1::2].t().contiguous().t())
    results = [fastclust.kmeans(view, 6, init=view[:6]) for view in views]
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], result, strict=True))


def test_empty_batch(device):
    result = fastclust.kmeans(torch.zeros(0, 10, 3, device=device), 4, n_init=2)
    assert [tuple(field.shape) for field in result] == [(0, 4, 3), (0, 10), (0,), (0,)]
    labels, distances = fastclust.kmeans_assign(torch.zeros(0, 3, device=device), torch.zeros(2, 3, device=device))
    assert labels.shape == distances.shape == (0,)


def test_opcheck(device):
    x, init = blobs(2, 50, 3, dtype=torch.float32).to(device), blobs(2, 2, 4, 3, dtype=torch.float32).to(device)
    weight, fixed = torch.ones(2, 50, device=device), torch.full((2, 50), -1, device=device)
    torch.library.opcheck(torch.ops.fastclust.kmeans_lloyd, (x, init, weight, fixed, 5, 0.0, False, True))
    torch.library.opcheck(torch.ops.fastclust.kmeans_plus_plus, (x, None, torch.rand(2, 3, 4, 2, device=device)))
    torch.library.opcheck(torch.ops.fastclust.kmeans_assign, (x, init[:, 0], True))


def test_compiles_whole(device):
    x = blobs(80, 3, dtype=torch.float32).to(device)

    def run(x: torch.Tensor) -> fastclust.KMeansResult:
        return fastclust.kmeans(x, 4, n_init=2, spherical=True, sample_weight=x[:, 0].abs())

    torch.manual_seed(0)
    eager = run(x)
    torch.manual_seed(0)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert all(a.equal(b) for a, b in zip(eager, compiled, strict=True))


# --------------------------------------------------------------------------------------------------------------- errors

X = torch.randn(10, 2)
NAN = X.clone()
NAN[3:6, 1] = float("nan")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": NAN}, ValueError, "kmeans: x holds 3 rows that are not finite, first at 3"),
        ({"x": X.numpy()}, TypeError, "kmeans: x must be a torch.Tensor"),
        ({"x": X.int()}, TypeError, "kmeans: x must have a floating-point dtype"),
        ({"x": X[0]}, ValueError, "kmeans: x must have 2 or 3 dimensions"),
        ({"x": X[:, :0]}, ValueError, "kmeans: x has no features"),
        ({"n_clusters": 11}, ValueError, "kmeans: n_clusters must be at most the number of rows 10"),
        ({"n_clusters": 0}, ValueError, "kmeans: n_clusters must be at least 1"),
        ({"init": "best"}, ValueError, "kmeans: init must be"),
        ({"init": X[:4]}, ValueError, "kmeans: init must hold"),
        ({"init": NAN[2:5]}, ValueError, "kmeans: init holds 2 rows"),
        ({"init": X[:3], "n_init": 2}, ValueError, "kmeans: n_init"),
        ({"n_init": 0}, ValueError, "kmeans: n_init"),
        ({"max_iter": 0}, ValueError, "kmeans: max_iter"),
        ({"tol": -1.0}, ValueError, "kmeans: tol"),
        ({"tol": float("nan")}, ValueError, "kmeans: tol"),
        ({"precision": "half"}, ValueError, "kmeans: precision"),
        ({"sample_weight": torch.ones(9)}, ValueError, "kmeans: sample_weight must have one entry per row"),
        ({"sample_weight": -torch.ones(10)}, ValueError, "kmeans: sample_weight holds negative"),
        ({"sample_weight": torch.zeros(10)}, ValueError, "kmeans: sample_weight is zero"),
        ({"sample_weight": NAN[:, 1]}, ValueError, "kmeans: sample_weight holds 3"),
        ({"labels": torch.ones(9).long()}, ValueError, "kmeans: labels must have one entry per row"),
        ({"labels": torch.full((10,), 3)}, ValueError, r"kmeans: labels must lie in \[-1, 3\)"),
        ({"labels": torch.full((10,), -2)}, ValueError, r"kmeans: labels must lie in \[-1, 3\).* got -2"),
        ({"labels": torch.ones(10)}, TypeError, "kmeans: labels must have an integer dtype"),
        ({"x": X * torch.arange(10)[:, None], "spherical": True}, ValueError, "kmeans: x holds 1 zero row"),
        ({"x": X * 1e30}, ValueError, "kmeans: x is too large"),
    ],
)
def test_refuses(device, options, error, message):
    arguments = {"x": X, "n_clusters": 3} | options
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        fastclust.kmeans(arguments.pop("x"), arguments.pop("n_clusters"), **arguments)


@pytest.mark.parametrize(
    ("x", "centroids", "message"),
    [
        (NAN, X, "kmeans_assign: x holds 3"),
        (X, NAN, "kmeans_assign: centroids holds 3"),
        (X, X[:0], "kmeans_assign: centroids is empty"),
        (X, X[:, :1], "kmeans_assign: centroids must be"),
        (X, X[None], "kmeans_assign: centroids must have as many dimensions"),
    ],
)
def test_assign_refuses(device, x, centroids, message):
    with pytest.raises(ValueError, match=message):
        fastclust.kmeans_assign(x.to(device), centroids.to(device))
