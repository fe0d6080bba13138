# Every target sets up what it needs: a fresh machine needs Python 3.11, gcc and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find kernels -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

# What TRL imports; beside the project and not of it, so that its two releases can stand side by side.
PEERS_NEED := accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 psutil fsspec aiohttp aiohappyeyeballs \
  aiosignal frozenlist multidict yarl propcache attrs pyarrow pandas
NUMERIC := verification/m4_numerics/test_implementation.py -q --write-table docs/peers-numerics.md

# Two processors and more do the tests' files at the same time; benchmarks then run once and are not timed.
SPREAD := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --benchmark-disable

.PHONY: install demo test test-all verify_m1 bench cuda lint clean verify_m4 peers

install: $(INSTALLED)

# Python compiles what it imports, once; pip would compile every file there is, which takes a minute more. Where the
# environment forbids to keep what was compiled, every process would do it again: 7 s more each.
unexport PYTHONDONTWRITEBYTECODE

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## train the embedded task and print the result (one to three minutes on two cores)
	$(BIN)/rlhf train

test: install  ## everything but the tests marked slow, the files on several processors
	$(BIN)/python -m pytest verification/ -m "not slow" $(SPREAD)

test-all: test  ## everything; the slow tests, some of which measure, one after the other
	$(BIN)/python -m pytest verification/ -m slow

verify_m1: install  ## determinism
	$(BIN)/python -m pytest verification/ -m "m1 and not slow"

bench: install  ## the benchmarks, ours beside the peers, saved as the baseline of `pytest --benchmark-compare`
	rm -rf verification/benchmarks/baseline
	$(BIN)/python -m pytest verification/benchmarks --benchmark-only --benchmark-save=baseline

verify_m4: install  ## numerics
	$(BIN)/python -m pytest verification/ -m "m4 and not slow"

peers: install  ## TRL's functions held to the numeric tests: writes docs/peers-numerics.md
	$(BIN)/python -m pip install --quiet --no-deps --target .peers/deps $(PEERS_NEED)
	$(BIN)/python -m pip install --quiet --no-deps --target .peers/trl_1_12 trl==1.12.0
	$(BIN)/python -m pip install --quiet --no-deps --target .peers/trl_1_16 trl==1.16.0
	$(BIN)/python -m pytest $(NUMERIC)
	for peer in trl_1_12 trl_1_16; do PYTHONPATH=.peers/$$peer:.peers/deps $(BIN)/python -m pytest -W default $(NUMERIC) \
	  --implementation rlhf_core.testing.adapters.trl:$$peer || test $$? -eq 1; done

cuda: install  ## compile the CUDA extension: no warning, no spill, 16-byte accesses; skips where there is no nvcc
	$(BIN)/python -m pytest verification/unit/kernels/test_kernel_cuda_build.py -rs

lint: install  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels rlhf_core verification -name __pycache__ -prune -exec rm -rf {} +
	find kernels -name '*.so' -delete
	find kernels -name '_*.c' -path '*/cpu/*' -delete
