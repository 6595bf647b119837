"""How rows, labels and weights come into an estimator, and how results go out: the same kind as X, NumPy or torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.utils.validation import _check_sample_weight, column_or_1d, validate_data  # type: ignore[import-untyped]
from torch import Tensor

from .. import ops


def tensor(array: object) -> Tensor:
    """The tensor itself, or one in the memory of a NumPy array, be that read-only (nothing here writes to it)."""
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def read_rows(estimator: Any, X: Any, *, reset: bool) -> Tensor:
    """X as a dense (n, D) tensor, float32 and float64 as they are, integers as float64, half precision as float32.

    NumPy arrays, data frames and lists go through scikit-learn's checks; a sparse matrix is made dense. A tensor stays
    on its device. `reset`: X is what `fit` sees, else it must have the features that `fit` saw.

    Raises:
        ValueError: not two-dimensional, empty, not finite, or of another number of features.
        TypeError: a sparse or complex tensor.
    """
    if not isinstance(X, Tensor):
        dtypes = [np.float64, np.float32]
        checked = validate_data(estimator, X, accept_sparse="csr", dtype=dtypes, order="C", reset=reset)
        return tensor(checked.toarray() if sparse.issparse(checked) else checked)
    name = type(estimator).__name__
    if X.layout != torch.strided or X.is_complex():
        raise TypeError(f"{name}: X must be a dense real tensor, got {X.dtype}, {X.layout}")
    if X.dim() != 2 or 0 in X.shape:
        raise ValueError(f"{name}: X must be (n_samples, n_features), neither of them 0, got {tuple(X.shape)}")
    validate_data(estimator, X, reset=reset, skip_check_array=True)
    return ops.float_tensor(name, "X", X.detach() if X.is_floating_point() else X.double())


def read_weight(sample_weight: Any, x: Tensor) -> Tensor | None:
    """sample_weight as (n,) of the dtype and on the device of x, None where there is none."""
    if sample_weight is None or isinstance(sample_weight, Tensor):
        return None if sample_weight is None else sample_weight.detach().to(x)
    rows = np.empty((len(x), 0))  # all that the check looks at is how many
    return tensor(_check_sample_weight(sample_weight, rows, dtype=np.float64)).to(x)


def read_labels(estimator: Any, y: Any, x: Tensor) -> npt.NDArray[Any]:
    """y as a NumPy array (n,)."""
    labels = column_or_1d(y.cpu().numpy() if isinstance(y, Tensor) else y, warn=True)
    if len(labels) != len(x):
        raise ValueError(
            f"{type(estimator).__name__}: y must have one label for each of {len(x)} rows, got {len(labels)}"
        )
    return np.asarray(labels)


def like(X: Any, result: Tensor) -> Any:
    """`result` as a tensor where X is one, else as a NumPy array."""
    return result if isinstance(X, Tensor) else result.cpu().numpy()
