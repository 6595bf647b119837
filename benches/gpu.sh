#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: builds for that GPU, runs every CUDA test, looks for memory errors and races, benches,
# and writes docs/results/cuda-<gpu>.md. Under ten minutes. Uses the Python that is active, or $PYTHON. What fails is told at the end and in
# the results, and does not keep the rest from running.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-$(command -v python || command -v python3)}
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null) || {
    echo "benches/gpu.sh: no torch that sees a GPU in ${python:-any python}; nothing was measured" >&2
    exit 1
}
[ "$capability" = 90 ] && capability=90a
failed=0
notes=()

echo "== build for sm_$capability (${SECONDS} s)"
export FASTCLUST_CUDA=ON FASTCLUST_CUDA_ARCHITECTURES="$capability"
if "$python" -c 'import setuptools, pybind11' 2> /dev/null && command -v cmake > /dev/null && command -v ninja > /dev/null; then
    "$python" setup.py -q build_ext --inplace || exit 1 # all is there: nothing to fetch or to install
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    "$python" -m pip install -q -e ".[test]" || exit 1
fi

echo "== tests (${SECONDS} s)"
if summary=$(FASTCLUST_REQUIRE_CUDA=1 timeout 240 "$python" -m pytest -q -k cuda | tee /dev/stderr | tail -n 1); then
    notes+=("CUDA tests: $summary")
else
    failed=1
    notes+=("CUDA tests FAILED: $summary")
fi

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer $tool (${SECONDS} s)"
        if timeout 90 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benches/gpu_figures.py --small; then
            notes+=("$tool over benches/gpu_figures.py --small: no error")
        else
            status=$?
            failed=1
            notes+=("$tool over benches/gpu_figures.py --small FAILED: status $status, 124 for its 90 seconds")
        fi
    done
else
    notes+=("compute-sanitizer not found: not run")
fi

echo "== benches (${SECONDS} s)"
note=$(printf '%s; ' "${notes[@]}")
"$python" benches/gpu_figures.py --note "${note%; }" || failed=1
echo "== done (${SECONDS} s)"
exit "$failed"
