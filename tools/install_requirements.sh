#!/bin/sh
# Makes the virtual environment $VENV with $PYTHON and installs the pinned requirements into it.
set -eu

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "psf needs Python 3.10 or newer, but '$PYTHON' is $("$PYTHON" --version 2>&1)." >&2
    echo "Name another one: make PYTHON=/path/to/python3.11 setup" >&2
    exit 1
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() {
    "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

echo "Installing the requirements into $VENV (about 6 GB with PyTorch's CUDA libraries) ..."
pip install -r requirements.txt

site_packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# pip refuses a wheel of another Python version unless it is told the version and a target folder.
pip install --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
    --upgrade --target "$site_packages" -r requirements-nodeps.txt
"$VENV/bin/python" -W ignore -c 'import detectron2, panopticapi'
