# The commands: `make` lists them. Each sets up what it needs by itself (cmake/setup.sh, CMake), and nothing twice.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
export CMAKE_EXPORT_COMPILE_COMMANDS := ON
export CTEST_PARALLEL_LEVEL ?= $(CMAKE_BUILD_PARALLEL_LEVEL)
export CTEST_PROGRESS_OUTPUT ?= 1
export CMAKE_COLOR_DIAGNOSTICS ?= OFF

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

demo: environment-demo ## Stream megabytes of real text through a retention layer, train a language model on it; ARGS are passed on
	@$(call build,demo)
	PYTHONPATH=$(CURDIR)/build/demo/python python examples/demo.py $(ARGS)

test: ## What CI checks: variants of each kind, then sanitizers, then Python
	@$(MAKE) --no-print-directory --keep-going test-ci test-asan test-tsan test-python

test-all: ## The same, every variant, and the recipe of docs/adding-hardware.md
	@$(MAKE) --no-print-directory --keep-going test test-variants test-recipe

test-variants: environment-test ## C and C++ tests of every variant
	@$(call build,all)
	ctest --preset all

test-ci: environment-test ## C and C++ tests of variants of each kind
	@$(call build,ci)
	ctest --preset ci

test-asan: environment-test ## The tests under the address and undefined-behaviour sanitizers
	@$(call build,ci,holdfast_generators)
	@$(call build,asan,,$(generators))
	ctest --preset asan

test-tsan: environment-test ## The tests of threads under the thread sanitizer
	@$(call build,ci,holdfast_generators)
	@$(call build,tsan,context_test,$(generators))
	ctest --preset tsan --label-regex threads

test-python: environment-test ## The Python tests
	@$(call build,ci)
	PYTHONPATH=$(CURDIR)/build/ci/python python -m pytest --numprocesses=$(CTEST_PARALLEL_LEVEL) -m "not recipe"

test-recipe: environment-test ## Follow docs/adding-hardware.md in a copy of the tree
	@$(call build,ci)
	PYTHONPATH=$(CURDIR)/build/ci/python python -m pytest -m recipe

bench: environment-bench ## Time Holdfast beside ONNX Runtime and PyTorch; ARGS="--quick" and others are passed on
	@$(call build,release,holdfast _holdfast,-DHOLDFAST_BENCH=OFF)
	PYTHONPATH=$(CURDIR)/build/release/python python -m holdfast bench $(ARGS)

lint: environment-lint ## Format and check all files as a commit would
	pre-commit run --all-files

tidy: environment-test environment-lint ## Static analysis of the runtime (clang-tidy)
	@$(call build,dev,holdfast)
	clang-tidy --quiet -p build/dev runtime/src/*.cpp

clean: ## Remove what was built; the wheels stay in .venv
	rm -rf build

environment-%:
	@cmake/setup.sh $*

# $(call build,PRESET[,TARGETS[,OPTIONS]]): configure once (Ninja configures again when it must), then build.
build = { test -e build/$1/build.ninja || cmake --preset $1 $3; } && cmake --build --preset $1 $(if $2,--target $2)

generators = -Dholdfast-halide_generators_ROOT=$(CURDIR)/build/ci/cmake

.PHONY: help demo test test-all test-variants test-ci test-asan test-tsan test-python test-recipe bench lint tidy clean
.NOTPARALLEL:
