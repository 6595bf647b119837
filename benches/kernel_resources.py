"""Registers and spills of every CUDA kernel per architecture, as ptxas tells them: the table of docs/kernels.md.

    python benches/kernel_resources.py [--architectures "80;90a"] [--room knn]

Compiles each csrc/*/*_cuda.cu as the build does; needs nvcc and c++filt, no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def default_architectures() -> str:
    return re.search(r'FASTCLUST_CUDA_ARCHITECTURES "([^"]+)"', (ROOT / "CMakeLists.txt").read_text()).group(1)


def compile_verbosely(source: Path, architectures: list[str]) -> str:
    """What ptxas says about the kernels of `source`."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or sys.exit("kernel_resources: no nvcc on PATH")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    run = subprocess.run([nvcc, *flags, *code, "-c", source, "-o", os.devnull], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr)
    return run.stderr


def readable(mangled: list[str]) -> list[str]:
    """`assign_tiles<float>` of `void fastclust::kmeans::cuda::(anonymous namespace)::assign_tiles<float>(…)`."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = []
    for line in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|fastclust::(\w+::)*|^void ", "", line)
        names.append(name[: name.index("(")])
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default=default_architectures())
    parser.add_argument("--room", default="*", help="a folder of csrc")
    arguments = parser.parse_args()
    architectures = arguments.architectures.split(";")
    sources = sorted((ROOT / "csrc").glob(f"{arguments.room}/*_cuda.cu"))
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda source: compile_verbosely(source, architectures), sources))
    header = " | ".join(f"sm_{a}" for a in architectures)
    print("Each cell: registers per thread, and bytes spilled (stored + loaded) where there are any.\n")
    print(f"| kernel | {header} |")
    print("|---|" + "---|" * len(architectures))
    for source, text in zip(sources, texts, strict=True):
        entries = list(ENTRY.finditer(text))
        cells: dict[str, dict[str, str]] = defaultdict(dict)
        for name, entry in zip(readable([entry["name"] for entry in entries]), entries, strict=True):
            spilled = int(entry["stores"]) + int(entry["loads"])
            cells[name][entry["architecture"]] = entry["registers"] + (f" + {spilled} B" if spilled else "")
        for name, row in sorted(cells.items()):
            print(f"| {source.parent.name} `{name}` | {' | '.join(row.get(a, '') for a in architectures)} |")
    print(
        f"\n{len(sources)} sources for {len(architectures)} architectures: {time.monotonic() - start:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
