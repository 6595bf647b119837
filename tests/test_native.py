"""The CPU kernels without torch, under ThreadSanitizer and under AddressSanitizer with UndefinedBehaviorSanitizer."""

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


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    flags = [f"-fsanitize={request.param}", "-fno-sanitize-recover=undefined", "-std=c++20", "-O1", "-g1"]
    flags += [f"-I{ROOT / 'csrc'}", "-DFASTCLUST_CAPABILITY=generic", "-DFASTCLUST_CAPABILITY_generic=1"]
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
