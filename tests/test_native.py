"""The CPU kernels without torch, under ThreadSanitizer and under AddressSanitizer with UndefinedBehaviorSanitizer.

Generic code on any CPU; the code with intrinsics where this CPU runs it.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(COMPILER) is None, reason="the sanitizers need g++ on Linux"
)


MEMORY, RACES = "address,undefined", "thread"
MACHINE_FLAGS = {"generic": [], "avx512_vnni": ["-march=icelake-server", "-Wno-maybe-uninitialized"]}


def cpu_has(capability: str) -> bool:
    return capability == "generic" or capability in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module", params=[(RACES, "generic"), (MEMORY, "generic"), (MEMORY, "avx512_vnni")], ids="-".join)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sanitizers, capability = request.param
    if not cpu_has(capability):
        pytest.skip(f"this CPU has no {capability}")
    folder = tmp_path_factory.mktemp("native")
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-std=c++20", "-O1", "-g1"]
    flags += [f"-I{ROOT / 'csrc'}", f"-DFASTCLUST_CAPABILITY={capability}", f"-DFASTCLUST_CAPABILITY_{capability}=1"]
    flags += MACHINE_FLAGS[capability]
    sources = [*sorted((ROOT / "csrc").glob("*/*_cpu.cpp")), ROOT / "tests" / "native" / "driver.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    waiting, running = list(zip(sources, objects, strict=True)), []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            source, out = waiting.pop()
            running.append(subprocess.Popen([COMPILER, *flags, "-c", str(source), "-o", str(out)]))
        assert running.pop(0).wait() == 0
    subprocess.run([COMPILER, flags[0], *map(str, objects), "-pthread", "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def run(driver: Path, threads: int) -> str:
    done = subprocess.run([str(driver), str(threads)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-4000:]
    return done.stdout


def test_no_fault_and_the_same_bits_on_any_number_of_threads(driver):
    assert run(driver, 1) == run(driver, 3)
