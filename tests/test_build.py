"""The build, its packaging and its loading, as a user meets them."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastclust
from fastclust import _library

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_config_tells_versions_capability_and_cuda():
    printed = python("-m", "fastclust").stdout
    assert torch.__version__ in printed
    assert re.search(r"CPU kernels +(generic|avx2|avx512|avx512_vnni|amx), \d+ threads", printed)
    assert re.search(r"CUDA kernels +(not built|built for \d+)", printed)


def test_runs_from_any_folder(tmp_path):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(fastclust.__file__).parent.parent)])
    told = python("-m", "fastclust", cwd=tmp_path, PYTHONPATH=path)
    assert told.returncode == 0, told.stderr


def test_import_is_light():
    code = (
        "import sys, time, torch; start = time.perf_counter(); import fastclust;"
        "print(time.perf_counter() - start, *(m for m in ('scipy', 'sklearn', 'matplotlib') if m in sys.modules))"
    )
    seconds, *heavy = python("-c", code).stdout.split()
    assert float(seconds) < 0.3
    assert not heavy


def _copy_of_package(folder: Path, libraries: bool) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", *([] if libraries else ["*.so"]))
    shutil.copytree(Path(fastclust.__file__).parent, folder / "fastclust", ignore=ignore)
    if libraries:
        for library in Path(fastclust.ops.C.__file__).parent.glob("*.so"):
            shutil.copy2(library, folder / "fastclust")
    return folder / "fastclust"


def test_missing_library_says_what_to_type(tmp_path):
    _copy_of_package(tmp_path, libraries=False)
    # -S -E with an explicit path to torch hides an installed fastclust, where the library would rightly be found.
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path += [{str(Path(torch.__file__).parent.parent)!r}];"
        "import importlib.metadata as m; m.distributions = lambda **_: []; import fastclust"
    )
    failed = python("-c", code, cwd=tmp_path)
    assert failed.returncode == 1
    assert "ImportError: fastclust is not compiled for this Python: run `pip install .`" in failed.stderr


def test_stale_library_is_refused(tmp_path):
    package = _copy_of_package(tmp_path, libraries=True)
    source = (package / "_library.py").read_text()
    (package / "_library.py").write_text(re.sub(r"^SCHEMA = \d+", "SCHEMA = 999999", source, flags=re.M))
    failed = python("-c", "import fastclust", cwd=tmp_path)
    assert failed.returncode == 1
    assert "was built from another version of fastclust's source: run `pip install .`" in failed.stderr


def test_schema_number_goes_with_the_schemas():
    """A changed schema needs a new number, or new Python would meet an old library."""
    source = ROOT / "csrc" / "library.cpp"
    schemas = "".join(re.findall(r'"([^"]+)"', source.read_text().split("STABLE_TORCH_LIBRARY", 1)[1]))
    digest = hashlib.sha256(schemas.encode()).hexdigest()[:12]
    assert (_library.SCHEMA, digest) == (2, "2737c971b85c"), "raise SCHEMA in fastclust/_library.py and note both here"


def test_capability_can_be_lowered():
    assert "generic, " in python("-m", "fastclust", FASTCLUST_CPU_CAPABILITY="generic").stdout


def test_unknown_capability_is_an_error():
    assert "sse9 is none of generic" in python("-m", "fastclust", FASTCLUST_CPU_CAPABILITY="sse9").stderr


def _capability_objects() -> list[Path]:
    return sorted((ROOT / "build").glob("cmake-*/CMakeFiles/fastclust_*.dir/**/*.o"))


def test_no_shared_weak_symbol_is_compiled_for_a_capability():
    """The linker keeps one copy of a weak symbol: an AVX-512 one would crash an older CPU."""
    objects = [o for o in _capability_objects() if re.search("fastclust_(avx|amx)", str(o))]
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the build folder and nm")
    leaks = set()
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for line in symbols.splitlines():
            _, kind, name = line.split(" ", 2)
            ours = re.search(r"\d(avx2|avx512|avx512_vnni|amx)(E|\d)", name) or name.startswith("DW.ref.")
            if kind in "WVu" and not ours:
                leaks.add(f"{path.name}: {name}")
    assert not leaks


@pytest.mark.skipif(torch.version.cuda is None or not fastclust.ops.C.CUDA_ARCHITECTURES, reason="no CUDA build")
def test_cuda_library_is_loaded_beside_a_cuda_torch():
    maps = Path("/proc/self/maps").read_text()
    assert "libfastclust_cuda.so" in maps


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs the source folder")
    told = python("setup.py", "-q", "sdist", "-d", str(tmp_path), "--formats=gztar")
    assert told.returncode == 0, told.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = [f for f in listed if f.split("/")[0] in ("csrc", "cmake", "fastclust", "methods", "tests")]
    assert not [f for f in [*wanted, "LICENSE", "README.md", "CMakeLists.txt", "setup.py"] if f not in names]
