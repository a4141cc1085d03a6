# The README's commands. Everything is installed into .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without build isolation the extension is built against this environment's own torch; isolation would download a second one.
BUILD := 'torch>=2.10' 'torchvision>=0.25' 'setuptools>=77' ninja pybind11
# Compiles the CUDA kernels where there is no toolkit; of the version that torch was built with.
NVCC := 'cuda-toolkit[nvcc,cccl]; platform_system == "Linux"'
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/* csrc/planner/*)

# pip is quiet for as long as it takes.
SETTING_UP := Installing torch (gigabytes) and compiling the kernels: minutes on a few cores, more where there is an nvcc.

# One process per core, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all check bench docs wheel versions clean

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

# The pages of docs/ and the reference made from docstrings, in build/docs.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet

# One wheel for every Python, torch and glibc since 2.28, in dist/. It has the window planner for the Python of .venv and for
# those of PYTHONS, such as "python3.12 python3.13".
wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python tools/wheel.py dist $(PYTHONS)

# Installs the wheel next to every torch that pyproject.toml declares, and runs the operators' tests there; 20 GB, in .nox.
# ARGS chooses one: make versions ARGS="--session lowest". Needs Python 3.11, 3.12 and 3.13 on the PATH.
versions: wheel
	$(BIN)/nox $(ARGS)

# Editable, so that a change in the Python sources needs no new installation; one of the dependencies or of csrc/ does.
$(VENV)/.train: $(SOURCES) | $(BIN)/python
	@echo '$(SETTING_UP)'
	$(BIN)/pip install --quiet $(BUILD)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[train]'
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	@echo '$(SETTING_UP)'
	$(BIN)/pip install --quiet $(BUILD) $(NVCC)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --group docs
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) .nox build dist *.egg-info lidnet_fast/_C*.so lidnet_fast/_build.json .pytest_cache .ruff_cache .mypy_cache
