"""`python -m fastclust`: versions, devices and how the kernels were built."""

from ._config import show_config

show_config()
