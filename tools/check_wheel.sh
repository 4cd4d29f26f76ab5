#!/bin/sh
# Builds the wheel and the sdist, builds a second wheel from the sdist, and runs the tests of the operator
# against the wheel, installed beside the oldest torch that its library serves and beside the newest, in
# a folder that is not the repository. Downloads about 6 GB; takes $PYTHON and the folder $WORK for it.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORK=${WORK:-build/check_wheel}
OLDEST=2.10.0
NEWEST=$(sed -n 's/^torch==//p' requirements.txt)

make PYTHON="$PYTHON" wheel
rm -rf "$WORK"
mkdir -p "$WORK/tests" "$WORK/from_sdist"
WORK=$(cd "$WORK" && pwd)
wheel=$(ls "$PWD"/dist/psf-*-py3-none-manylinux_2_28_x86_64.whl)

echo "The sdist gives the same files:"
.venv/bin/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$WORK/from_sdist" \
    dist/psf-*.tar.gz
contents() { "$PYTHON" -m zipfile -l "$1" | sed 's/ .*//' | grep -v 'dist-info\|/$' | sort; }
contents "$wheel" >"$WORK/wheel.txt"
contents "$WORK"/from_sdist/*.whl >"$WORK/from_sdist.txt"
diff "$WORK/wheel.txt" "$WORK/from_sdist.txt"
wc -l <"$WORK/wheel.txt"

cp tests/layers/conftest.py tests/layers/deformable_inputs.py tests/layers/test_extension.py \
    tests/layers/test_ms_deform_attn*.py "$WORK/tests/"
for torch in "$OLDEST" "$NEWEST"; do
    echo "torch $torch"
    "$PYTHON" -m venv "$WORK/venv"
    "$WORK/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "torch==$torch" "$wheel" 'setuptools<81' pytest hypothesis omegaconf hydra-core cloudpickle
    site=$("$WORK/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$WORK/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --require-hashes --only-binary=:all: --python-version 3.10 --upgrade --target "$site" \
        -r requirements-nodeps.txt
    (
        cd "$WORK/tests"
        "$WORK/venv/bin/python" -W ignore -c '
import torch, psf
from psf.config import load_config
from psf.layers.ms_deform_attn import has_extension

assert has_extension()
load_config("coco/panoptic_segformer_R50_24ep.yaml")
print(torch.__version__, psf.__file__)
'
        "$WORK/venv/bin/python" -m pytest -q -p no:cacheprovider .
    )
    rm -rf "$WORK/venv"
done
rm -rf "$WORK"
