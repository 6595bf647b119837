"""Every public function, called wrongly: an error that names function and argument, never a crash or an answer."""

import math

import pytest
import torch

import fastclust

X = torch.randn(20, 4)
NAN_ROW = X.clone()
NAN_ROW[17, 2] = math.nan
INF_ROW = X.clone()
INF_ROW[3, 0] = math.inf
LABELS = torch.arange(20) % 3
GRAPH = fastclust.knn_graph(X, 5)
Y = torch.rand(20, 3)
LOG_P = torch.log_softmax(X, 1)
BAD_GRAPH = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([1.0, -1.0]), (2, 2))

f = fastclust
CASES = [
    # function, call, exception, what its text must hold
    ("kmeans", lambda: f.kmeans(NAN_ROW, 3), ValueError, ["x holds 1 row", "not finite", "17"]),
    ("kmeans", lambda: f.kmeans(INF_ROW, 3), ValueError, ["x holds 1 row", "not finite", "3"]),
    ("kmeans", lambda: f.kmeans(NAN_ROW, 3, init=X[:3]), ValueError, ["x holds 1 row", "not finite", "17"]),
    (
        "kmeans",
        lambda: f.kmeans(INF_ROW.double(), 3, init=X[:3].double()),
        ValueError,
        ["x holds 1 row", "not finite", "3"],
    ),
    (
        "kmeans",
        lambda: f.kmeans(torch.stack([X, -INF_ROW]), 3, init=X[:3].expand(2, -1, -1)),
        ValueError,
        ["not finite"],
    ),
    ("kmeans", lambda: f.kmeans(X.long(), 3), TypeError, ["x ", "int64"]),
    ("kmeans", lambda: f.kmeans([[1.0]], 1), TypeError, ["x ", "list"]),
    ("kmeans", lambda: f.kmeans(X[0], 3), ValueError, ["x "]),
    ("kmeans", lambda: f.kmeans(X, 21), ValueError, ["n_clusters", "21"]),
    ("kmeans", lambda: f.kmeans(X, 0), ValueError, ["n_clusters", "0"]),
    ("kmeans", lambda: f.kmeans(X[:0], 1), ValueError, []),
    ("kmeans", lambda: f.kmeans(X, 3, init="best"), ValueError, ["init", "best"]),
    ("kmeans", lambda: f.kmeans(X, 3, init=X[:2]), ValueError, ["init"]),
    ("kmeans", lambda: f.kmeans(X, 3, init=NAN_ROW[17:].clone()), ValueError, ["init", "not finite"]),
    ("kmeans", lambda: f.kmeans(X, 3, n_init=0), ValueError, ["n_init"]),
    ("kmeans", lambda: f.kmeans(X, 3, max_iter=-1), ValueError, ["max_iter"]),
    ("kmeans", lambda: f.kmeans(X, 3, tol=-1.0), ValueError, ["tol"]),
    ("kmeans", lambda: f.kmeans(X, 3, tol=math.nan), ValueError, ["tol"]),
    ("kmeans", lambda: f.kmeans(X, 3, sample_weight=-torch.ones(20)), ValueError, ["sample_weight"]),
    ("kmeans", lambda: f.kmeans(X, 3, sample_weight=torch.ones(19)), ValueError, ["sample_weight"]),
    ("kmeans", lambda: f.kmeans(X, 3, labels=LABELS + 1), ValueError, ["labels", "3"]),
    ("kmeans", lambda: f.kmeans(X, 3, labels=LABELS.float()), TypeError, ["labels"]),
    ("kmeans", lambda: f.kmeans(X, 3, labels=LABELS[:5]), ValueError, ["labels"]),
    ("kmeans", lambda: f.kmeans(X, 3, precision="half"), ValueError, ["precision", "half"]),
    ("knn", lambda: f.knn(NAN_ROW, 3), ValueError, ["x holds 1 row", "not finite", "17"]),
    ("knn", lambda: f.knn(X, 3, queries=INF_ROW), ValueError, ["queries holds 1 row", "not finite", "3"]),
    ("knn", lambda: f.knn(X, 20), ValueError, ["k ", "20"]),
    ("knn", lambda: f.knn(X, 21, queries=X), ValueError, ["k ", "21"]),
    ("knn", lambda: f.knn(X, 0), ValueError, ["k ", "0"]),
    ("knn", lambda: f.knn(X.int(), 3), TypeError, ["x ", "int32"]),
    ("knn", lambda: f.knn(X[0], 3), ValueError, ["x "]),
    ("knn", lambda: f.knn(X, 3, metric="hamming"), ValueError, ["metric", "hamming"]),
    ("knn", lambda: f.knn(X, 3, queries=X[:, :2]), ValueError, ["queries"]),
    ("knn", lambda: f.knn(X, 3, precision="half"), ValueError, ["precision", "half"]),
    ("knn_graph", lambda: f.knn_graph(NAN_ROW, 3), ValueError, ["x holds 1 row", "not finite", "17"]),
    ("knn_graph", lambda: f.knn_graph(X, 20), ValueError, ["k ", "20"]),
    ("knn_graph", lambda: f.knn_graph(X, 3, power=-1.0), ValueError, ["power"]),
    ("knn_graph", lambda: f.knn_graph(X, 3, power=math.nan), ValueError, ["power"]),
    ("knn_graph", lambda: f.knn_graph(X, 3, symmetrize="min"), ValueError, ["symmetrize", "min"]),
    ("knn_graph", lambda: f.knn_graph(X.bool(), 3), TypeError, ["x ", "bool"]),
    ("diffuse", lambda: f.diffuse(GRAPH, NAN_ROW), ValueError, ["y holds 1 row", "not finite", "17"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y, alpha=1.0), ValueError, ["alpha", "1"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y, alpha=-0.1), ValueError, ["alpha"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y, alpha=math.nan), ValueError, ["alpha"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y, tol=-1.0), ValueError, ["tol"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y, max_iter=-1), ValueError, ["max_iter"]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y[:5]), ValueError, ["y "]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y[:, 0]), ValueError, ["y "]),
    ("diffuse", lambda: f.diffuse(GRAPH, Y.long()), TypeError, ["y ", "int64"]),
    ("diffuse", lambda: f.diffuse(GRAPH.to_dense(), Y), TypeError, ["graph"]),
    ("diffuse", lambda: f.diffuse(BAD_GRAPH, Y[:2]), ValueError, ["graph"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS, alpha=1.0), ValueError, ["alpha"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS - 2), ValueError, ["labels", "-2"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS, n_classes=2), ValueError, ["labels", "2"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS * 0 - 1), ValueError, ["labels"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS[:3]), ValueError, ["labels"]),
    ("propagate_labels", lambda: f.propagate_labels(GRAPH, LABELS.float()), TypeError, ["labels"]),
    ("soft_assign", lambda: f.soft_assign(NAN_ROW, X[:3]), ValueError, ["x holds 1 row", "not finite", "17"]),
    ("soft_assign", lambda: f.soft_assign(X, INF_ROW), ValueError, ["centroids holds 1 row", "3"]),
    ("soft_assign", lambda: f.soft_assign(X, X[:3, :2]), ValueError, ["centroids"]),
    ("soft_assign", lambda: f.soft_assign(X, X[:0]), ValueError, ["centroids"]),
    ("soft_assign", lambda: f.soft_assign(X.long(), X), TypeError, ["x ", "int64"]),
    ("pairwise_kl", lambda: f.pairwise_kl(NAN_ROW, LABELS), ValueError, ["log_p", "17"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P, LABELS - 2), ValueError, ["labels", "-1"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P, LABELS[:3]), ValueError, ["labels"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P, LABELS.float()), TypeError, ["labels"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P, LABELS, margin=-1.0), ValueError, ["margin"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P, LABELS, margin=math.nan), ValueError, ["margin"]),
    ("pairwise_kl", lambda: f.pairwise_kl(LOG_P[0], LABELS), ValueError, ["log_p"]),
]


@pytest.mark.parametrize(("function", "call", "error", "told"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_bad_input_is_named(function, call, error, told):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{function}: ")
    assert not [part for part in told if part not in text], text
    assert "\n" not in text


EMPTY = torch.empty(0, 4)


def test_empty_batches_where_they_mean_something():
    """No query, no row to assign, no pair: the empty answer, not an error."""
    assert fastclust.knn(X, 3, queries=EMPTY).indices.shape == (0, 3)
    assert fastclust.knn(EMPTY, 1).indices.shape == (0, 1)
    assert fastclust.soft_assign(EMPTY, X[:3]).shape == (0, 3)
    assert fastclust.pairwise_kl(EMPTY, torch.empty(0, dtype=torch.long)).item() == 0.0
    assert fastclust.diffuse(GRAPH, torch.empty(20, 0)).f.shape == (20, 0)
