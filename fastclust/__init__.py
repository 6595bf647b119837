"""The public names of fastclust, nothing else. What needs heavy packages is imported when asked for."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import outofcore as outofcore
    from ._estimators import ConstrainedKMeans as ConstrainedKMeans
    from ._estimators import KMeans as KMeans
    from ._estimators import KNeighborsGraph as KNeighborsGraph
    from ._estimators import LabelPropagation as LabelPropagation

_ESTIMATORS = ("ConstrainedKMeans", "KMeans", "KNeighborsGraph", "LabelPropagation")
_MODULES = ("distributed", "outofcore")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _ESTIMATORS:
        return getattr(importlib.import_module("._estimators", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ESTIMATORS, *_MODULES])
