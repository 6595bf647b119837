"""The scikit-learn faces: scikit-learn's own checks, the same answers as the ops, every kind of input."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import DBSCAN
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastclust
from fastclust import ConstrainedKMeans, KMeans, KNeighborsGraph, LabelPropagation

X, Y = make_blobs(n_samples=240, centers=4, n_features=5, cluster_std=1.5, random_state=3)
FEW = np.where(np.arange(len(Y)) % 20 == 0, Y, -1)
ESTIMATORS = [KMeans(4, random_state=0), ConstrainedKMeans(4, random_state=0), KNeighborsGraph(), LabelPropagation()]
names = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)

# ------------------------------------------------------------------------------------------------ scikit-learn's checks

DRAWS = "starts are drawn by row: leaving out or repeating rows draws others; scikit-learn's KMeans is excused too"
FEWER = "the check sets n_clusters below the number of classes in its y, which a constrained clustering must refuse"
EXPECTED = {
    KMeans: {f"check_sample_weight_equivalence_on_{kind}_data": DRAWS for kind in ("dense", "sparse")},
    ConstrainedKMeans: dict.fromkeys(
        [
            "check_dont_overwrite_parameters",
            "check_fit2d_1feature",
            "check_fit2d_predict1d",
            "check_methods_sample_order_invariance",
            "check_methods_subset_invariance",
        ],
        FEWER,
    ),
}


@parametrize_with_checks(
    [KMeans(), ConstrainedKMeans(), KNeighborsGraph(), LabelPropagation()],
    expected_failed_checks=lambda estimator: EXPECTED.get(type(estimator), {}),
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learns_checks(estimator, check):
    check(estimator)


# -------------------------------------------------------------------------------------------------- kinds of X, results


def fitted(estimator, rows, labels=FEW):
    return clone(estimator).fit(rows, labels)


def outcome(estimator, rows):
    """What a user reads off a fitted estimator, one array."""
    if isinstance(estimator, KNeighborsGraph):
        graph = estimator.transform(rows)
        return graph.to_dense() if isinstance(graph, torch.Tensor) else graph.toarray()
    return estimator.transform(rows) if isinstance(estimator, KMeans) else estimator.predict_proba(rows)


@names
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_and_torch_give_the_same_in_their_own_kind(device, estimator, dtype):
    rows, tensor = X.astype(dtype), torch.tensor(X, dtype=getattr(torch, dtype), device=device)
    of_numpy, of_torch = fitted(estimator, rows), fitted(estimator, tensor, torch.tensor(FEW))
    for data in (rows, tensor):
        want, got = outcome(of_numpy, data), outcome(of_torch, data)
        assert isinstance(want, torch.Tensor) is isinstance(got, torch.Tensor) is isinstance(data, torch.Tensor)
        assert str(got.dtype).endswith(dtype)
        if isinstance(got, torch.Tensor):
            assert got.device == tensor.device
            want, got = want.cpu().numpy(), got.cpu().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    if hasattr(estimator, "predict"):
        assert np.array_equal(of_numpy.predict(rows), of_torch.predict(tensor).cpu().numpy())


@names
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.coo_array, np.asfortranarray, lambda x: x[::-1][::-1]])
def test_other_forms_of_the_same_rows(estimator, form):
    np.testing.assert_allclose(outcome(fitted(estimator, form(X)), X), outcome(fitted(estimator, X), X), rtol=1e-12)


@names
def test_half_precision_and_integers(estimator):
    assert str(outcome(fitted(estimator, torch.tensor(X).half()), torch.tensor(X).half()).dtype) == "torch.float32"
    whole = torch.tensor(10 * X).long()
    assert outcome(fitted(estimator, whole), whole).dtype == torch.float64


@names
def test_pickle_clone_and_read_only_rows(estimator):
    frozen = X.copy()
    frozen.setflags(write=False)
    model = fitted(estimator, frozen)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(outcome(again, frozen), outcome(model, frozen))
    assert clone(model).get_params() == estimator.get_params()


@names
def test_what_a_tensor_must_be(estimator):
    name = type(estimator).__name__
    model, rows = fitted(estimator, X), torch.tensor(X)
    with pytest.raises(TypeError, match=f"{name}: X must be a dense real tensor"):
        fitted(estimator, rows.to_sparse_csr())
    with pytest.raises(ValueError, match=rf"{name}: X must be \(n_samples, n_features\)"):
        fitted(estimator, rows[0])
    with pytest.raises(ValueError, match="expecting 5 features"):
        outcome(model, rows[:, :3])
    rows[17, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite, at 17"):
        outcome(fitted(estimator, rows), rows)


def test_names_are_listed_but_scikit_learn_is_not_imported():
    code = "import sys, fastclust as f; print('KMeans' in dir(f), 'sklearn' in sys.modules, hasattr(f, 'Nothing'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False", "False"]


# --------------------------------------------------------------------------------------------------------------- KMeans


def test_kmeans_is_the_op():
    model = KMeans(4, n_init=3, tol=0, random_state=5).fit(X)
    seed = int(np.random.RandomState(5).randint(2**31 - 1))
    want = fastclust.kmeans(torch.tensor(X), 4, n_init=3, max_iter=300, seed=seed)
    assert np.array_equal(model.cluster_centers_, want.centroids.numpy())
    assert np.array_equal(model.labels_, want.labels.numpy())
    assert (model.inertia_, model.n_iter_) == (float(want.inertia), int(want.n_iter))
    assert model.labels_.dtype == np.int32
    assert np.array_equal(model.predict(X), model.labels_)
    assert model.score(X) == pytest.approx(-model.inertia_)
    weight = np.arange(len(X)) / 7
    want = weight @ model.transform(X).min(axis=1) ** 2
    assert model.score(X, sample_weight=weight) == pytest.approx(-want)


def test_sample_weight_counts_rows():
    weight = np.arange(len(X)) % 4
    options = {"init": X[[1, 2, 3, 5]], "n_init": 1}
    weighted = KMeans(4, **options).fit(X, sample_weight=weight)
    repeated = KMeans(4, **options).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)
    assert weighted.inertia_ != pytest.approx(KMeans(4, **options).fit(X).inertia_)


@pytest.mark.parametrize(("init", "starts"), [("k-means++", 1), ("random", 10), (lambda X, k, random_state: X[:k], 10)])
def test_automatic_number_of_starts(monkeypatch, init, starts):
    calls = []
    run = fastclust._kmeans.kmeans
    monkeypatch.setattr(fastclust._kmeans, "kmeans", lambda *a, **k: calls.append(k.get("n_init", 1)) or run(*a, **k))
    KMeans(4, init=init).fit(X)
    assert sum(calls) == starts


def test_a_callable_sees_rows_of_the_users_kind():
    seen = []

    def init(rows, k, random_state):
        seen.append(type(rows))
        return rows[random_state.randint(len(rows), size=k)]

    KMeans(4, init=init, n_init=1).fit(X)
    KMeans(4, init=init, n_init=1).fit(torch.tensor(X))
    assert seen == [np.ndarray, torch.Tensor]


def test_fewer_distinct_rows_than_clusters():
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than n_clusters \(3\)"):
        KMeans(3).fit([[0.0], [0.0], [1.0]])


def test_partial_fit_takes_the_running_mean():
    """With one cluster, the centre is the weighted mean of all rows, however they are cut into batches."""
    weight = np.random.default_rng(0).random(len(X))
    model = KMeans(1)
    for batch in np.array_split(np.arange(len(X)), 7):
        model.partial_fit(X[batch], sample_weight=weight[batch])
    np.testing.assert_allclose(model.cluster_centers_[0], np.average(X, axis=0, weights=weight))


def test_partial_fit_finds_the_clusters_and_goes_on_from_fit():
    model = KMeans(4, random_state=0)
    order = np.random.default_rng(1).permutation(len(X))
    for batch in np.array_split(order, 6):
        model.partial_fit(X[batch])
    assert adjusted_rand_score(Y, model.predict(X)) > 0.95
    whole = KMeans(4, random_state=0).fit(X)
    before = whole.cluster_centers_.copy()
    whole.partial_fit(X[:40] + 0.5)
    assert 0 < np.abs(whole.cluster_centers_ - before).max() < 0.25


def test_grid_search_and_pipeline():
    search = GridSearchCV(make_pipeline(StandardScaler(), KMeans(random_state=0)), {"kmeans__n_clusters": [2, 4]}, cv=3)
    assert search.fit(X).best_params_ == {"kmeans__n_clusters": 4}


def test_feature_names_and_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcde"))
    model = KMeans(4, random_state=0).set_output(transform="pandas").fit(frame)
    assert list(model.feature_names_in_) == list("abcde")
    assert list(model.transform(frame).columns) == ["kmeans0", "kmeans1", "kmeans2", "kmeans3"]


# ---------------------------------------------------------------------------------------------------- ConstrainedKMeans


def test_constrained_rows_stay_in_the_cluster_of_their_class():
    y = np.where(FEW >= 0, FEW * 10 + 3, -1)  # classes 3, 13, 23, 33
    wrong = np.flatnonzero(FEW == 0)[0]
    y[wrong] = 33
    model = ConstrainedKMeans(random_state=0).fit(X, y)
    assert list(model.classes_) == [3, 13, 23, 33]
    assert np.array_equal(model.classes_[model.labels_[y != -1]], y[y != -1])
    assert (model.labels_ == Y).mean() > 0.95
    assert model.predict(X[[wrong]]) != model.labels_[wrong]
    assert not hasattr(model, "partial_fit")


def test_constrained_clusters_beyond_the_classes_are_free():
    two = np.where(FEW < 2, FEW, -1)
    model = ConstrainedKMeans(4, random_state=1).fit(X, two)
    assert adjusted_rand_score(Y, model.labels_) > 0.95
    with pytest.raises(ValueError, match="4 classes, more than n_clusters=3"):
        ConstrainedKMeans(3).fit(X, FEW)


# ------------------------------------------------------------------------------------------------------ KNeighborsGraph


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_graph_equals_scikit_learns(mode, metric):
    ours = KNeighborsGraph(mode=mode, n_neighbors=6, metric=metric).fit(X[:200])
    theirs = KNeighborsTransformer(mode=mode, n_neighbors=6, metric=metric).fit(X[:200])
    for rows in (X[:200], X[200:]):
        np.testing.assert_allclose(ours.transform(rows).toarray(), theirs.transform(rows).toarray(), atol=1e-7)


def test_graph_before_dbscan():
    got = make_pipeline(KNeighborsGraph(n_neighbors=12), DBSCAN(eps=3, metric="precomputed")).fit_predict(X)
    assert adjusted_rand_score(got, DBSCAN(eps=3).fit_predict(X)) > 0.9


def test_graph_of_too_few_rows():
    with pytest.raises(ValueError, match="n_neighbors=5 is too large for n_samples_fit_=5 in mode 'distance'"):
        KNeighborsGraph().fit(X[:5]).transform(X)


# ----------------------------------------------------------------------------------------------------- LabelPropagation


def test_propagation_is_the_op():
    model = LabelPropagation(n_neighbors=9, tol=1e-6).fit(X, FEW)
    graph = fastclust.knn_graph(torch.tensor(X), 9, metric="euclidean")
    want = fastclust.propagate_labels(graph, torch.tensor(FEW), tol=1e-6, max_iter=1000)
    assert np.array_equal(model.transduction_, want.labels.numpy())
    np.testing.assert_allclose(model.certainty_, want.weights.numpy())
    unlabelled = FEW == -1
    np.testing.assert_allclose(model.label_distributions_[unlabelled], want.scores.numpy()[unlabelled])
    assert np.array_equal(model.label_distributions_[~unlabelled], np.eye(4)[FEW[~unlabelled]])
    assert model.n_iter_ == int(want.n_iter.max()) > 1


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_propagation_beats_its_labels_on_digits(metric):
    rows, digit = load_digits(return_X_y=True)
    y = np.where(np.arange(1200) < 60, digit[:1200], -1)
    model = LabelPropagation(metric=metric).fit(rows[:1200], y)
    assert (model.transduction_ == digit[:1200]).mean() > 0.88
    assert model.score(rows[1200:], digit[1200:]) > 0.85


def test_propagation_answers_in_the_users_classes():
    model = LabelPropagation().fit(X, np.where(FEW == -1, -1, FEW * 3 + 5))
    assert (model.transduction_ == Y * 3 + 5).mean() > 0.95
    assert set(model.predict(torch.tensor(X)).tolist()) == {5, 8, 11, 14}
    named = LabelPropagation().fit(X, np.array(["ant", "bee", "cat", "dog"])[Y])
    assert (named.predict(X) == np.array(["ant", "bee", "cat", "dog"])[Y]).mean() > 0.9


def test_propagation_says_what_is_wrong():
    with pytest.raises(ValueError, match="y holds no label"):
        LabelPropagation().fit(X, np.full(len(X), -1))
    with pytest.warns(ConvergenceWarning, match="max_iter=1 was reached"):
        LabelPropagation(max_iter=1).fit(X, FEW)


def test_rows_that_no_label_reaches():
    far = np.concatenate([X, X + 1e4])
    model = LabelPropagation().fit(far, np.concatenate([FEW, np.full(len(X), -1)]))
    assert np.array_equal(model.label_distributions_[len(X) :], np.zeros((len(X), 4)))
    assert np.array_equal(model.predict_proba(X[:3] + 1e4), np.full((3, 4), 0.25))
    assert not model.certainty_[len(X) :].any()
