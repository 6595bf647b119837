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
NATIVE = ROOT / "tests" / "native"
VNNI = ["-march=icelake-server", "-Wno-maybe-uninitialized"]
FLAGS = {"generic": [], "avx512_vnni": VNNI, "amx": [*VNNI, "-DFASTCLUST_EMULATE_AMX", f"-I{NATIVE}"]}


def build_driver(folder: Path, sanitizers: str, capability: str) -> Path:
    """Without optimisation, which would take the compiler twice as long as it spares the runs."""
    if capability != "generic" and "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no avx512_vnni")
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined", "-std=c++20", "-g1"]
    flags += [f"-I{ROOT / 'csrc'}", f"-DFASTCLUST_CAPABILITY={capability}", *FLAGS[capability]]
    sources = [*sorted((ROOT / "csrc").glob("*/*_cpu.cpp")), NATIVE / "driver.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    waiting, running = list(zip(sources, objects, strict=True)), []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            source, out = waiting.pop()
            running.append(subprocess.Popen([COMPILER, *flags, "-c", str(source), "-o", str(out)]))
        assert running.pop(0).wait() == 0
    subprocess.run([COMPILER, flags[0], *map(str, objects), "-pthread", "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def digests(driver: Path) -> set[str]:
    """What it prints on one thread and on three: at the same time, as one thread leaves the other cores idle."""
    commands = [[str(driver), threads] for threads in ("1", "3")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        ended = [(process, *process.communicate(timeout=600)) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, _, errors in ended:
        assert process.returncode == 0, errors[-4000:]
        assert "Sanitizer" not in errors, errors[-4000:]
    return {out for _, out, _ in ended}


@pytest.mark.parametrize(
    ("sanitizers", "capability"), [(RACES, "generic"), (MEMORY, "generic")], ids=["races", "memory"]
)
def test_no_fault_and_the_same_bits_on_any_number_of_threads(tmp_path, sanitizers, capability):
    assert len(digests(build_driver(tmp_path, sanitizers, capability))) == 1


def test_intrinsics_without_a_fault_and_tiles_give_the_same_bits(tmp_path):
    """The tiles of AMX are emulated: what they compute are integers, so nothing may differ from VNNI's."""
    found = set()
    for capability in ("avx512_vnni", "amx"):
        (tmp_path / capability).mkdir()
        found |= digests(build_driver(tmp_path / capability, MEMORY, capability))
    assert len(found) == 1
