# Everything here sets itself up: a C++ compiler and Python are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell git ls-files csrc 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: demo test test-full clients sanitize bench lint format verify clean
.DELETE_ON_ERROR:

demo: $(VENV)/built ## train a small language model with torch.nn and with fusedrnn, side by side
	$(BIN)/python -m fusedrnn demo

test: $(VENV)/built ## the tests: a pairwise sample of all combinations
	$(BIN)/python -m pytest -m "not full"

test-full: $(VENV)/built ## the whole product of combinations
	$(BIN)/python -m pytest

verify: $(VENV)/built ## every engine against float64 on this machine
	$(BIN)/python -m fusedrnn verify

bench: $(VENV)/built ## the grid against torch.nn; results under bench/results
	$(BIN)/python -m fusedrnn bench

# Programs of other packages, trained with torch.nn and with fusedrnn: in an environment of their own.
CLIENTS := build/clients
clients: $(CLIENTS)/ready ## other packages, stock against converted
	$(CLIENTS)/bin/python tests/clients/run.py

$(CLIENTS)/ready: $(SOURCES) $(shell git ls-files python 2>/dev/null) tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -r tests/clients/requirements.txt .
	touch $@

# The C++ tests, under the address and undefined-behaviour sanitizers, and the barrier under the thread sanitizer.
sanitize: $(VENV)/tools
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DFUSEDRNN_TESTS=ON -DFUSEDRNN_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DFUSEDRNN_TESTS=ON -DFUSEDRNN_SANITIZE=thread
	$(BIN)/cmake --build build/tsan --target test_barrier
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R barrier

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp')
	$(BIN)/mypy

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp')

# The extension is built again when its sources change; Python sources are used where they lie.
$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy numba pytest pytest-benchmark hypothesis onnx onnxruntime onnxscript rich matplotlib ruff mypy clang-format \
	  scikit-build-core pybind11 cmake ninja
	touch $@

clean:
	rm -rf $(VENV) build dist
