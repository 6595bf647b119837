"""scikit-learn's faces of the ops. Imported when first asked for: importing scikit-learn takes seconds."""

from .kmeans import ConstrainedKMeans as ConstrainedKMeans
from .kmeans import KMeans as KMeans
from .neighbors import KNeighborsGraph as KNeighborsGraph
from .propagation import LabelPropagation as LabelPropagation
