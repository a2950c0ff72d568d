# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Fast tests take under 12 minutes on a quiet machine, all of them under 60; a busy one gets more.
FAST_LIMIT := 1500
ALL_LIMIT := 3600

.PHONY: demo test test-all parity chaos check format install install-dev clean

# The stamps say for which dependencies the environment was made: a second call reuses it.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "Python 3.10, 3.11 or 3.12 is needed, but $(PYTHON) is $$($(PYTHON) -V); call: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-parity: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	touch $@

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

# A real campaign: MindSpore children in Ray workers on scikit-learn's digits, latency measured
# by ONNX Runtime on this machine, the best network retrained and exported.
demo: $(VENV)/installed
	$(BIN)/mnas search digits

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	timeout $(FAST_LIMIT) $(BIN)/python -m pytest -m "not slow and not parity and not chaos"

test-all: check
	timeout $(ALL_LIMIT) $(BIN)/python -m pytest -m "not parity and not chaos"

# Converted networks beside timm's, torchvision's and MindCV's own, with the differences; ONNX files
# of 200 members of each space.
parity: $(VENV)/installed-parity
	timeout $(ALL_LIMIT) $(BIN)/python -m pytest -m parity -rP tests/test_parity.py tests/test_onnx_parity.py

# 100 kills of workers, nodes and drivers while MindSpore children train.
chaos: $(VENV)/installed-dev
	timeout 5400 $(BIN)/python -m pytest -m chaos tests/test_cluster.py

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
