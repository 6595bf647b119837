"""Builds the CUDA kernels for the CPU (simt.h) and calls them in a process of their own."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
SIMT = ROOT / "tests" / "simt"
KERNELS = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))

needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(COMPILER) is None, reason="the shim needs g++ on x86-64"
)


def build(folder: Path) -> Path:
    """Compiles what has changed, two sources at a time, and links the kernels with the shim."""
    flags = ["-std=c++20", "-O1", "-g1", "-DFASTCLUST_SIMT_SHIM", f"-I{SIMT}", f"-I{ROOT / 'csrc'}"]
    watched = [*flags, "-fsanitize=thread,undefined", "-fno-sanitize-recover=undefined", "-Wno-unknown-pragmas"]
    jobs = [(source, watched) for source in [*KERNELS, SIMT / "planted.cu"]]
    jobs += [(SIMT / "worker.cpp", flags), (SIMT / "simt.cpp", [*flags, "-O3"])]
    headers = max(path.stat().st_mtime for path in [*SIMT.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), Path(__file__)])
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / "worker"
    objects, running = [], []
    for source, options in jobs:
        objects.append(folder / f"{source.parent.name}_{source.name}.o")
        if objects[-1].exists() and objects[-1].stat().st_mtime > max(headers, source.stat().st_mtime):
            continue
        binary.unlink(missing_ok=True)
        objects[-1].unlink(missing_ok=True)
        running.append(subprocess.Popen([COMPILER, *options, "-x", "c++", "-c", source, "-o", objects[-1]]))
        if len(running) == 2:
            assert running.pop(0).wait() == 0, "a kernel does not compile for the shim"
    assert all(process.wait() == 0 for process in running), "a kernel does not compile for the shim"
    if not binary.exists():
        subprocess.run([COMPILER, *objects, "-fsanitize=address,undefined", "-o", binary], check=True)
    return binary


class Worker:
    """The process that runs the kernels."""

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        self.process = subprocess.Popen(
            [self.binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )

    def call(self, name: str, ints=(), reals=(), arrays=()) -> list[bytes]:
        """Raises RuntimeError with what the shim says if it finds a fault."""
        parts = [_block(name.encode()), _block(np.asarray(ints, np.int64)), _block(np.asarray(reals, np.float64))]
        parts.append(struct.pack("q", len(arrays)))
        for array in arrays:
            data = (
                array if isinstance(array, bytes) else b"" if array is None else np.ascontiguousarray(array).tobytes()
            )
            parts.append(_block(data))
        try:
            self.process.stdin.write(b"".join(parts))
            self.process.stdin.flush()
            (count,) = struct.unpack("q", self._read(8))
            return [self._read(struct.unpack("q", self._read(8))[0]) for _ in range(count)]
        except (BrokenPipeError, EOFError):
            message = self.process.stderr.read().decode()
            self.close()
            self.start()
            raise RuntimeError(message) from None

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def _block(data: bytes | np.ndarray) -> bytes:
    return struct.pack("q", len(data)) + bytes(data)


def shared_worker() -> Worker:
    """For a module's fixture: the build is there after the first."""
    return Worker(build(ROOT / "build" / "simt"))
