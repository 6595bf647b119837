"""Builds fastclust._C, libfastclust and, where nvcc is found, libfastclust_cuda. All else is in pyproject.toml.

Environment: FASTCLUST_CUDA=AUTO|ON|OFF, FASTCLUST_CUDA_ARCHITECTURES="90a;100", FASTCLUST_TORCH_DIR, and CMake's own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))

from toolchain import BuildError, cuda_architectures, find_nvcc, find_torch, wants_cuda  # noqa: E402


def schema_number() -> str:
    return re.search(r"^SCHEMA = (\d+)", (ROOT / "fastclust" / "_library.py").read_text(), re.M).group(1)


def cuda_options(torch) -> list[str]:
    wanted, nvcc = wants_cuda(), find_nvcc()
    if wanted == "ON" and torch.cuda is None:
        raise BuildError(f"FASTCLUST_CUDA=ON, but torch {torch.version} is a CPU build")
    if wanted == "ON" and nvcc is None:
        raise BuildError("FASTCLUST_CUDA=ON, but there is no nvcc: put it on PATH or set CUDACXX")
    if wanted == "OFF" or torch.cuda is None or nvcc is None:
        reason = (
            "FASTCLUST_CUDA=OFF" if wanted == "OFF" else "torch is a CPU build" if torch.cuda is None else "no nvcc"
        )
        print(f"fastclust: building for the CPU alone ({reason})", flush=True)
        return ["-DFASTCLUST_CUDA=OFF"]
    architectures = cuda_architectures(nvcc)
    print(f"fastclust: building CUDA kernels for {architectures} with {nvcc}", flush=True)
    return ["-DFASTCLUST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFASTCLUST_CUDA_ARCHITECTURES={architectures}"]


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        torch = find_torch()
        if torch is None:
            raise BuildError("torch is not installed: pip install torch, or set FASTCLUST_TORCH_DIR")
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        output.mkdir(parents=True, exist_ok=True)
        if "-DFASTCLUST_CUDA=OFF" in (cuda := cuda_options(torch)):
            (output / "libfastclust_cuda.so").unlink(missing_ok=True)
        # One build folder per interpreter, kept in the source tree: a second build compiles only what has changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=NEW",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTCLUST_OUTPUT_DIR={output}",
            f"-DFASTCLUST_TORCH_DIR={torch.folder}",
            f"-DFASTCLUST_TORCH_VERSION={torch.version}",
            f"-DFASTCLUST_VERSION={self.distribution.get_version()}",
            f"-DFASTCLUST_SCHEMA={schema_number()}",
            *cuda,
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: setuptools would copy fastclust._C alone and leave the libraries beside it behind."""
        package = ROOT / "fastclust"
        for stale in package.glob("*.so"):
            stale.unlink()
        for library in (Path(self.build_lib) / "fastclust").glob("*.so"):
            shutil.copy2(library, package)


setup(ext_modules=[Extension("fastclust._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
