#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: builds for that GPU, tests with every CUDA test required, looks for memory errors and
# races, benches, and writes docs/results/cuda-<gpu>.md. Under ten minutes. Uses the Python that is active.
set -euo pipefail
cd "$(dirname "$0")/.."

python - <<'PYTHON'
import torch

if not torch.cuda.is_available():
    raise SystemExit("benches/gpu.sh: torch sees no GPU here; nothing was measured")
PYTHON
capability=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
[ "$capability" = 90 ] && capability=90a

echo "== build for sm_$capability"
FASTCLUST_CUDA=ON FASTCLUST_CUDA_ARCHITECTURES="$capability" pip install -q --no-build-isolation --no-deps -e .

echo "== tests"
FASTCLUST_REQUIRE_CUDA=1 pytest -q

sanitized="compute-sanitizer not found: not run"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 python benches/gpu_figures.py --small
    done
    sanitized="compute-sanitizer memcheck and racecheck over benches/gpu_figures.py --small: no error"
fi

echo "== benches"
python benches/gpu_figures.py --note "$sanitized"
