# make demo: the main job; make test: the tests; make test-tpu: compilations for TPUs (none is needed);
# make bench: the benchmarks. Each makes the environment that it needs, in .venv or .venv-tpu.
# Tests run on all cores; PYTEST adds options of pytest, as in make test PYTEST="-k prompts -n 0".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TPU_VENV := .venv-tpu
DATA := $(wildcard ../shared/data)
export IP_JAX_DATA_DIR ?= $(if $(DATA),$(abspath $(DATA)),)
# Large pages (Linux): handing out 4 KiB pages takes 0.8 s of system time in a step of 5 s, large ones 0.25 s.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow test-tpu bench lint clean
demo: $(VENV)/ready
	$(BIN)/ip-jax run gcd_sycophancy --preset demo

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n auto -m "not slow and not tpu" $(PYTEST)

test-slow: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n auto -m slow $(PYTEST)

test-tpu: $(TPU_VENV)/ready
	$(TPU_VENV)/bin/python -m pytest -m tpu tests/planning tests/models/test_kernels.py tests/models/test_prompt_kernels.py $(PYTEST)

bench: $(VENV)/ready-dev
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The constraints file holds the versions that were tested together.
$(VENV)/ready: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The TPU's compiler beside the same packages, without those of the parity tests.
$(TPU_VENV)/ready: setup.py constraints.txt
	test -x $(TPU_VENV)/bin/python || $(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[tpu]" pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(TPU_VENV) build *.egg-info
