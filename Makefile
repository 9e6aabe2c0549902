# make demo   train, evaluate and draw on the mini dataset      make test   run the tests
# make env    only build .venv                                 make lint   style, imports
# make docs   build the documentation into site/               make clean  remove output/demo
# make test-processes  the tests of 2 and 4 processes     make test-long   those of many minutes
# make test-oldest   the tests with the oldest torch, in .venv-oldest; needs Python 3.10
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BUILT := $(VENV)/.built
DEMO := output/demo
DEMO_CONFIG := configs/mini/faster_rcnn_R_18_FPN.yaml

# The oldest Python, torch and torchvision, with Detectron2's compiled extension.
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
PIP := -m pip install --quiet --disable-pip-version-check
# A process a core, each of one thread: most tests are too small for two. Each takes whole files,
# whose tests share fixtures, in the order of tests/conftest.py.
TESTS := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help env demo test test-processes test-long test-oldest lint format docs clean
help:
	@sed -n '/^[^#]/q; s/^# //p' Makefile

env: $(BUILT)

$(BUILT): requirements.txt requirements-common.txt requirements-detectron2.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(None if (3, 10) <= v <= (3, 12) else "error: $(PYTHON) is Python %d.%d; give one \
	of 3.10 to 3.12, for example: make PYTHON=python3.11 $(MAKECMDGOALS)" % v)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) -r requirements.txt
	$(RUN) $(PIP) --no-deps --upgrade \
	  --target "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  --python-version 3.10 --only-binary=:all: --require-hashes -r requirements-detectron2.txt
	$(RUN) $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(BUILT)
	$(RUN) -m fpn_plugin train --config-file $(DEMO_CONFIG) --resume OUTPUT_DIR $(DEMO)
	$(RUN) -m fpn_plugin detect --config-file $(DEMO)/config.yaml --ground-truth mini_val \
	  --max-images 12 --threshold 0.4 --output $(DEMO)/pictures MODEL.WEIGHTS $(DEMO)/model_final.pth
	@echo; cat $(DEMO)/results.md
	@echo "pictures of detections and ground truth:    $(DEMO)/pictures/"
	@echo "losses of the training:                     $(DEMO)/loss_curve.png"

test: $(BUILT)
	OMP_NUM_THREADS=1 $(RUN) $(TESTS)

# One at a time: each starts as many processes as there are cores, or more.
test-processes: $(BUILT)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m processes

test-long: $(BUILT)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m long

test-oldest: $(OLDEST)/.built
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(TESTS)

$(OLDEST)/.built: requirements-oldest.txt requirements-common.txt requirements-detectron2.txt pyproject.toml setup.py
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -r requirements-oldest.txt
	$(OLDEST)/bin/python $(PIP) --no-deps --require-hashes -r requirements-detectron2.txt
	$(OLDEST)/bin/python $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

lint: $(BUILT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(BUILT)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Every link is checked, and a warning is an error.
docs: $(BUILT)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(DEMO)
