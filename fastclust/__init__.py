"""The public names of fastclust, nothing else."""

from . import ops as ops
from ._config import show_config as show_config
