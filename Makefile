# The README's commands. Everything is installed into .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without build isolation the extension is built against this environment's own torch; isolation would download a second one.
BUILD := 'torch>=2.10' 'torchvision>=0.25' 'setuptools>=77' ninja
# Compiles the CUDA kernels where there is no toolkit; of the version that torch was built with.
NVCC := 'cuda-toolkit[nvcc,cccl]; platform_system == "Linux"'
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

# One process per core, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all check bench clean

demo: $(VENV)/.train
	$(BIN)/lidnet-fast demo $(ARGS)

test: check
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: check
	FUZZ_EXAMPLES=150 $(PYTEST) -m '' $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest --benchmark $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Editable, so that a change in the Python sources needs no new installation; one of the dependencies or of csrc/ does.
$(VENV)/.train: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet $(BUILD)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[train]'
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet $(BUILD) $(NVCC)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.train

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) build *.egg-info lidnet_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache
