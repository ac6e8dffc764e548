# make setup       .venv from requirements.lock (idempotent; every other target calls it)
# make quickstart  train, export and score a tiny Qwen2.5-VL on this machine's CPU
# make test        the fast tests; make test-all adds the campaigns of minutes
# make test-slurm  all tests of the jobs, on a throw-away Slurm of their own; -core: ten minutes
# make check       format, lint, types, layering, sizes, spelling, shell scripts
# make bench       every benchmark (make bench-env first, for the columns of other programs)
# make gpu-check   the benchmark of an NVIDIA GPU
#
# On a machine without a GPU the default index serves a CUDA build of torch (gigabytes). Take the
# CPU build from the index that the install page of pytorch.org names:  make setup TORCH_INDEX=URL
PYTHON ?= python3.11
TORCH_INDEX ?=
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' requirements.lock)

.PHONY: setup quickstart tiny-base test test-all test-slurm test-slurm-core check format bench \
        bench-env gpu-check lock clean

setup: .venv/installed

.venv/installed: requirements.lock setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: setup
	$(BIN)/python -m launch.quickstart $(if $(FRESH),--fresh)

tiny-base: setup
	DS_ACCELERATOR=cpu $(BIN)/python -m launch.chain $(sort $(wildcard configs/tiny-base/phase*.yaml)) --ranks 2

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "" --timeout 3000

test-slurm: setup
	$(BIN)/python -m pytest -m "" tests/slurm

test-slurm-core: setup
	$(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/shellcheck -x slurm/*.sh benchmarks/gpu/*.sh .ci/run
	$(BIN)/python -m pytest tests/test_layering.py tests/test_house_rules.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	for name in $$(ls benchmarks/*.py | xargs -n1 basename | grep -v '^_' | sed 's/\.py$$//'); do \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-env: setup
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/bench-env -r benchmarks/requirements.txt

gpu-check:
	bash benchmarks/gpu/check.sh

lock: setup
	{ sed -n '1p' requirements.lock; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv runs build *.egg-info
