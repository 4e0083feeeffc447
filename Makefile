# On a fresh machine (nothing but Python and a compiler) `make demo` and `make test` make .venv,
# install torch and this package there, and run. Variables, on the command line or exported:
#   TORCH=torch==2.13.0   the torch to install in .venv (default: the newest)
#   VENV=.venv            where
#   PYTHON=/path/python   instead of all that: an environment that has torch, setuptools >= 77 and
#                         what the command itself needs; used as it is, without network
#   PYTEST_ARGS=...       more for pytest
#   GPU_CHECKED=folder    for all that gpu-check leaves (default: build/gpu-check)
#   BENCH_ARGS=...        for the benchmarks; `make bench BENCH_ARGS=--help` says which there are
#   MUTATIONS_ARGS=...    for the planted faults: --jobs 8, -k schedule; --help says which there are
# and what setup.py reads: LSOFTMAX_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, LSOFTMAX_WERROR.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

TORCH ?= torch
VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTATIONS_ARGS ?=

space := $(subst ,, )
ifneq ($(findstring $(space),$(CURDIR)$(VENV)$(PYTHON)),)
$(error make cannot do with a space in a path: $(CURDIR), VENV=$(VENV), PYTHON=$(PYTHON); pip install . can)
endif

# What was done in an environment is remembered by files: in .venv itself, so that they go when it
# goes; for somebody else's environment in build/.
ifeq ($(PYTHON),)
PY := $(abspath $(VENV))/bin/python
STATE := $(VENV)/state
else
PY := $(abspath $(shell command -v '$(PYTHON)'))
STATE := build/state$(subst /,-,$(PY))
$(if $(PY),,$(error PYTHON=$(PYTHON) is not there))
# Somebody else may have installed another package there since, or removed this one.
INSTALLED := cd / && $(PY) -c 'import importlib.util as u, os; s = u.find_spec("lsoftmax"); \
	print(s.origin, os.stat(s.origin).st_mtime_ns) if s else print("none")'
ifneq ($(filter-out help clean,$(MAKECMDGOALS)),)
ifneq ($(shell $(INSTALLED)),$(shell cat $(STATE)/package 2>/dev/null))
$(shell rm -f $(STATE)/package)
endif
endif
endif
PIP := $(PY) -m pip --disable-pip-version-check

# Kernels or an error. (Up here, so that a package installed without them counts as out of date.)
ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
export LSOFTMAX_CUDA := 1
endif

SOURCES := $(wildcard csrc/* lsoftmax/*.py lsoftmax/py.typed) setup.py pyproject.toml MANIFEST.in
SETTINGS := $(LSOFTMAX_CUDA)/$(LSOFTMAX_WERROR)/$(TORCH_CUDA_ARCH_LIST)/$(CUDA_HOME)$(CUDA_PATH)
PYTHON_FILES := $(wildcard lsoftmax tests examples benchmarks docs) setup.py
C_DIRS := csrc tests tests/emulation
C_FILES := $(wildcard $(foreach dir,$(C_DIRS),$(dir)/*.cu $(dir)/*.cuh $(dir)/*.cpp $(dir)/*.h))

.PHONY: help demo demo-distributed test test-install test-mutations test-nightly docs bench lint format gpu-check kernel-report install clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make demo          train on the handwritten digits with softmax and L-Softmax; saves a picture'
	@echo 'make demo-distributed  the digits in two processes that share the classes, and in one'
	@echo 'make test          all tests, then all of them again on the emulated CUDA kernels'
	@echo 'make test-nightly  many more cases, a fuzzer, a soak, kills: docs/reliability.md (half an hour)'
	@echo 'make test-install  build and install in every supported way (minutes; network)'
	@echo 'make test-mutations  plants faults, one at a time, and sees whether the tests notice (half an hour)'
	@echo 'make bench         the layer beside everything else; BENCH_ARGS="--quick" in two minutes'
	@echo 'make gpu-check     on a machine with a GPU: kernels, tests, benchmark, compute-sanitizer'
	@echo 'make kernel-report compile every kernel for every device; registers, shared memory, spills'
	@echo 'make docs          the documentation, as pages in docs/_build/html'
	@echo 'make lint          ruff, clang-format and mypy, checking only'
	@echo 'make format        ruff and clang-format, rewriting'
	@echo 'make install       what all of these begin with'
	@echo 'make clean         remove what builds left (not $(VENV))'
	@echo 'Variables: see the top of the Makefile.'

# ---- the environment ----------------------------------------------------------------------------

# A file that holds a setting, and is touched only when the setting changes.
define remember
@mkdir -p $(@D); echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@
endef

ifeq ($(PYTHON),)
$(STATE)/venv:
	python3 -m venv $(VENV)
	@mkdir -p $(@D); touch $@

$(STATE)/torch-wanted: $(STATE)/venv FORCE
	$(call remember,$(TORCH))

# Torch before the package, which is built for the torch it finds. From then on it stays as it is,
# whatever else comes: torchvision, say, would rather have the newest.
$(STATE)/torch: $(STATE)/torch-wanted
	$(PIP) install '$(TORCH)'
	@$(PY) -c 'from importlib.metadata import version as v; print("torch==" + v("torch").partition("+")[0])' > $@

PIP_INSTALL := $(PIP) install --constraint $(STATE)/torch
INSTALL := $(PIP_INSTALL) '.[test,examples]'
else
$(STATE)/torch:
	$(PY) -c 'import torch, setuptools as s; v = s.__version__; \
	int(v.split(".")[0]) >= 77 or exit(f"setuptools >= 77 is needed, here is {v}")'
	@mkdir -p $(@D); touch $@

INSTALL := $(PIP) install --no-build-isolation --no-deps --force-reinstall .
endif

$(STATE)/settings: $(STATE)/torch FORCE
	$(call remember,$(SETTINGS))

# As users install it, not editable: what is tested is what they get.
$(STATE)/package: $(STATE)/torch $(STATE)/settings $(SOURCES)
	$(INSTALL)
	@cd tests && $(PY) -m lsoftmax
	@($(or $(INSTALLED),true)) > $@

install: $(STATE)/package

# ---- what to run --------------------------------------------------------------------------------

demo: $(STATE)/package
	$(PY) examples/digits.py

demo-distributed: $(STATE)/package
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

# `python -m` puts the working directory first on sys.path. In the root that would make ./lsoftmax,
# which holds no kernels, hide the installed package: so tests run from tests/.
test: $(STATE)/package
	cd tests && $(PY) -m pytest $(PYTEST_ARGS)
	cd tests && $(PY) -m pytest --backend emulation $(PYTEST_ARGS)

# The other libraries that are used with this one, where there is an environment of our own.
$(STATE)/nightly: $(STATE)/package
	$(if $(PYTHON),,$(PIP_INSTALL) 'lsoftmax[docs,ecosystem]')
	@touch $@

test-nightly: $(STATE)/nightly
	cd tests && $(PY) -m pytest -m nightly $(PYTEST_ARGS)
	cd tests && $(PY) -m pytest test_docs.py test_export.py test_frameworks.py $(PYTEST_ARGS)
	cd tests && $(PY) -m pytest --backend emulation -m nightly $(PYTEST_ARGS)

test-install: $(STATE)/package
	cd tests && $(PY) -m pytest -m install install $(PYTEST_ARGS)

# What the benchmarks compare with; on a machine with a GPU more of it.
PEERS := $(if $(shell command -v nvidia-smi),bench-gpu,bench)

$(STATE)/bench: $(STATE)/package
	$(if $(PYTHON),,$(PIP_INSTALL) 'lsoftmax[$(PEERS)]')
	@touch $@

# Of the sources, not of the installed package; in build/mutations. An interrupted run goes on.
test-mutations: $(STATE)/package
	cd tests && $(PY) -m mutations $(MUTATIONS_ARGS)

bench: $(STATE)/bench
	$(PY) -m benchmarks $(BENCH_ARGS)

# Nine minutes from here and some seconds, all in all.
GPU_CHECKED ?= build/gpu-check
DEADLINE := $(shell expr $$(date +%s) + 520)

gpu-check: $(STATE)/bench
	@mkdir -p $(GPU_CHECKED)
	@tests/gpu_check.sh $(PY) $(abspath $(GPU_CHECKED)) $(DEADLINE) 2>&1 | tee $(GPU_CHECKED)/log.txt

# Needs nvcc, no GPU.
kernel-report: $(STATE)/package
	$(PY) -m benchmarks.kernels

# ---- pages --------------------------------------------------------------------------------------

$(STATE)/docs: $(STATE)/package
	$(if $(PYTHON),,$(PIP_INSTALL) 'lsoftmax[docs]')
	@touch $@

# From docs/, so that it is the installed package whose docstrings are read.
docs: $(STATE)/docs
	cd docs && $(PY) -m sphinx -W --keep-going -n -q -E . _build/html
	@echo docs/_build/html/index.html

# ---- looks --------------------------------------------------------------------------------------

$(STATE)/lint: $(STATE)/package
	$(if $(PYTHON),,$(PIP_INSTALL) 'lsoftmax[lint]')
	@touch $@

lint: $(STATE)/lint
	$(PY) -m ruff check $(PYTHON_FILES)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(dir $(PY))clang-format --dry-run -Werror $(C_FILES)
	$(PY) -m mypy

format: $(STATE)/lint
	$(PY) -m ruff check --fix $(PYTHON_FILES)
	$(PY) -m ruff format $(PYTHON_FILES)
	$(dir $(PY))clang-format -i $(C_FILES)

clean:
	rm -rf build dist docs/_build *.egg-info lsoftmax/_C.* lsoftmax/_build_info.json
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
