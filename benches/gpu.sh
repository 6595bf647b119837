#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: builds for that GPU, benches, runs every CUDA test, looks for memory errors and races,
# and writes docs/results/cuda-<gpu>.md. Under ten minutes. Uses the Python that is active, or $PYTHON. What fails is told at the end
# and in the results, and does not keep the rest from running. What matters most comes first: a run cut short leaves it behind.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-$(command -v python || command -v python3)}
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null) || {
    echo "benches/gpu.sh: no torch that sees a GPU in ${python:-any python}; nothing was measured" >&2
    exit 1
}
[ "$capability" = 90 ] && capability=90a
failed=0
log=$(mktemp -d) || exit 1
trap 'rm -rf "$log"' EXIT

# stage NAME SECONDS COMMAND...: what it prints goes to the terminal and into $log/NAME; its status is that of the command.
stage() {
    local name=$1 limit=$2
    shift 2
    echo "== $name (${SECONDS} s)"
    timeout "$limit" "$@" 2>&1 | tee "$log/$name"
}

# note TEXT: told now, and on the page of results where there is one.
note() {
    echo "$1"
    [ -z "${page:-}" ] || echo "- $1" >> "$page"
}

export FASTCLUST_CUDA=ON FASTCLUST_CUDA_ARCHITECTURES="$capability"
if "$python" -c 'import setuptools, pybind11' 2> /dev/null && command -v cmake > /dev/null && command -v ninja > /dev/null; then
    stage build 400 "$python" setup.py -q build_ext --inplace || exit 1 # all is there: nothing to fetch or to install
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    stage build 400 "$python" -m pip install -q -e ".[test]" || exit 1
fi

stage check 60 "$python" benches/gpu_figures.py --small || failed=1 # each kernel once, against the CPU
page=$("$python" benches/gpu_figures.py --page)
: > "$log/before"
stage benches 200 "$python" benches/gpu_figures.py || failed=1
if [ -f "$page" ] && [ ! "$page" -ot "$log/before" ]; then
    printf '\n## Checks\n\n' >> "$page"
else
    page=
fi
if [ "$failed" = 0 ]; then
    note "each kernel once against the CPU (benches/gpu_figures.py --small): equal; every bench ran"
else
    note "FAILED: a kernel against the CPU (benches/gpu_figures.py --small) or a bench: $(tail -qn 1 "$log/check" "$log/benches" | tr '\n' ' ')"
fi

# Only files with tests on devices: others may want packages that are not here.
mapfile -t files < <(grep -lw device tests/test_{kmeans,half,knn,graph,diffusion,soft_assign,pairwise_kl,outofcore}.py)
if FASTCLUST_REQUIRE_CUDA=1 stage tests 200 "$python" -m pytest -q -k cuda "${files[@]}"; then
    note "CUDA tests: $(tail -n 1 "$log/tests")"
else
    failed=1
    note "CUDA tests FAILED: $(tail -n 1 "$log/tests")"
fi

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
    if [ ! -x "$sanitizer" ]; then
        note "compute-sanitizer $tool not run: there is none"
    elif stage "$tool" 90 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benches/gpu_figures.py --small; then
        note "compute-sanitizer $tool over benches/gpu_figures.py --small: no error"
    elif grep -q "Device not supported" "$log/$tool"; then
        note "compute-sanitizer $tool not run: it says that it does not support this device"
    else
        failed=1
        note "compute-sanitizer $tool FAILED or did not end in 90 s: $(tail -n 1 "$log/$tool")"
    fi
done
echo "== done (${SECONDS} s)"
exit "$failed"
