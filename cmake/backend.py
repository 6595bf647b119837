"""The PEP 517 backend: setuptools, plus what a build needs that only the target environment can tell.

`pip install .` compiles against the torch that is already installed and asks PyPI for one only where there is none; a
CUDA torch without nvcc gets NVIDIA's compiler wheels in the build environment.
"""

import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the backend's hooks
from toolchain import build_requirements


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for packed in Path("build").glob("lib*"):  # setuptools would pack files that the source no longer has
        shutil.rmtree(packed)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
