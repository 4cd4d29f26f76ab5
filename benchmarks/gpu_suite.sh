#!/usr/bin/env bash
# What a machine with an NVIDIA GPU can say of the operator. Each step takes minutes and can be run
# alone; it needs nvcc, torch, and no network.
#
#   benchmarks/gpu_suite.sh build      compile the extension in place, for this GPU
#   benchmarks/gpu_suite.sh test       the tests that need a GPU
#   benchmarks/gpu_suite.sh sanitize   compute-sanitizer on every kernel
#   benchmarks/gpu_suite.sh bench      operator, whole model and training against their peers
#   benchmarks/gpu_suite.sh all        all of these, going on after a failure; the default
#
# Logs and results go to $OUT, else to benchmarks/results/. PYTHON names the interpreter. Packages
# that it lacks are taken from .whl/ where that exists.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
SITE=${TMPDIR:-/tmp}/psf-site
mkdir -p "$OUT"

prepare() {
    export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    if [ -d .whl ] && ! [ -d "$SITE" ]; then
        rm -rf "$SITE.part"
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --target "$SITE.part" .whl/*.whl
        for archive in .whl/*.zip; do "$PYTHON" -m zipfile -e "$archive" "$SITE.part"; done
        mv "$SITE.part" "$SITE"
    fi
}

logged() {  # logged NAME COMMAND...: the output goes to $OUT/NAME.log too
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$OUT/$name.log"
}

build() {
    local arch
    arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv
    logged build env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" \
        "$PYTHON" setup.py build_ext --inplace
}

run_tests() {
    logged test "$PYTHON" -m pytest -m cuda tests -q
}

sanitize() {
    local tool
    # Without torch's caching, so that a read beyond a tensor is one beyond its allocation.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck initcheck; do
        logged "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" benchmarks/cuda_check.py
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
    logged bench "$PYTHON" benchmarks/ms_deform_attn.py --device cuda --output "$OUT"
    logged bench-model "$PYTHON" benchmarks/model.py --device cuda --size 800 1333 --rounds 11 \
        --output "$OUT"
    logged train "$PYTHON" benchmarks/train.py --device cuda --steps 5 --rounds 3 --output "$OUT"
}

step() {
    case $1 in
        build | sanitize | bench) "$1" ;;
        test) run_tests ;;
        *)
            echo "unknown step $1: build, test, sanitize, bench or all" >&2
            return 2
            ;;
    esac
}

prepare
if [ "${1:-all}" != all ]; then
    step "$1"
    exit
fi
failed=()
for name in build test sanitize bench; do
    bash benchmarks/gpu_suite.sh "$name" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
