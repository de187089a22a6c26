# `make demo` and `make test` set up what they need on a fresh machine; `make help` lists the rest.
VENV ?= .venv
PY := $(VENV)/bin/python
CMAKE ?= cmake
BUILD ?= build
# In this environment rather than in one of pip's own, for a second build to go on from the first.
BUILD_TOOLS := scikit-build-core nanobind ninja
# One thread a process: the test runner starts one process a core, and two pools on the same cores
# wait for each other. A process that dies ends the run: its files would be begun anew, without end.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0

.PHONY: help setup demo test test-python test-native llama-cpp test-slow test-sanitize test-threads test-arm fuzz lint format docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/installed  ## a virtual environment with Squat and all tools

$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt $(BUILD_TOOLS)
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup  ## the whole job on built-in text, in a few minutes; results in runs/demo
	$(VENV)/bin/squat demo

test: test-python test-native  ## the fast tests, Python and C++

test-python: setup
	$(PYTEST) -m 'not slow'

test-native:
	$(CMAKE) -S . -B $(BUILD)/native
	$(CMAKE) --build $(BUILD)/native -j 2
	cd $(BUILD)/native && ctest --output-on-failure -j 2

llama-cpp: setup  ## llama.cpp, built from PyPI, with which a slow test compares
	$(PY) benchmarks/build_llama_cpp.py $(BUILD)/llama-cpp

test-slow: llama-cpp  ## what takes minutes: real training, lm-eval and llama.cpp side by side
	PYTHONPATH=$(BUILD)/llama-cpp/source LLAMA_CPP_LIB_PATH=$(abspath $(BUILD))/llama-cpp/build/bin $(PYTEST) -m slow

# One build for both: tests, and what libFuzzer looks for.
.PHONY: sanitized
sanitized:
	$(CMAKE) -S . -B $(BUILD)/sanitized -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
	  -DSQUAT_SANITIZE=address,undefined -DSQUAT_FUZZ=ON -DSQUAT_APPS=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(CMAKE) --build $(BUILD)/sanitized -j 2

test-sanitize: sanitized  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer (needs clang)
	cd $(BUILD)/sanitized && ctest --output-on-failure -j 2

test-threads:  ## the C++ tests of threads and of engines that share a model or a step, under ThreadSanitizer
	$(CMAKE) -S . -B $(BUILD)/threads -DSQUAT_SANITIZE=thread -DSQUAT_APPS=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(CMAKE) --build $(BUILD)/threads -j 2 --target test_thread_pool test_shared test_step
	cd $(BUILD)/threads && SQUAT_TEST_ISAS=best ctest --output-on-failure -R 'test_(thread_pool|shared|step)'

test-arm:  ## the C++ tests for ARM, in an emulator: without dot products, with dotprod, with i8mm
	$(CMAKE) -S . -B $(BUILD)/aarch64 -DCMAKE_TOOLCHAIN_FILE=native/cmake/aarch64.cmake
	$(CMAKE) --build $(BUILD)/aarch64 -j 2
	cd $(BUILD)/aarch64 && ctest --output-on-failure -j 2 --timeout 900

FUZZ_SECONDS ?= 300
FUZZ := $(BUILD)/fuzz
# Both at once: one a core.
fuzz: sanitized  ## libFuzzer on model files and saved sessions, FUZZ_SECONDS long (needs clang); goes on where it stopped
	$(BUILD)/sanitized/write_seeds $(FUZZ)/seeds
	mkdir -p $(FUZZ)/found/gguf $(FUZZ)/found/session
	printf 'gguf\nsession\n' | xargs -P 2 -I {} env ASAN_OPTIONS=malloc_context_size=2:quarantine_size_mb=16 \
	  $(BUILD)/sanitized/fuzz_{} $(FUZZ)/found/{} $(FUZZ)/seeds/{} \
	  -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=$(FUZZ)/

CPP := $(shell git ls-files 'native/*.cpp' 'native/*.h')

lint: setup  ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: setup  ## put all code into its format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

clean:  ## remove what was built; runs/ stays
	rm -rf $(BUILD) .mypy_cache .pytest_cache .ruff_cache
