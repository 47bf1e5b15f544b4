# Every target makes the environment it needs, so any of them can be the first on a fresh clone.
#
#   make pretrain                       a whole small pre-training, minutes long, ending in a report
#   make pretrain ARGS="--preset ..."   the same command with options (see README.md)
#   make test                           the tests that need no GPU and little time

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Python 3.11 where it has a name of its own, else whatever `python3` is; `make PYTHON=...` chooses another.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
ARGS ?=

# Workers of the tests: one a core, two at most, as some tests start two processes of their own.
WORKERS ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 0)

HAS_GPU := $(shell (nvidia-smi -L 2>/dev/null || ls /dev/nvidia0 2>/dev/null) | head -n 1)
CONSTRAINT := $(if $(HAS_GPU),,--constraint constraints-cpu.txt)
INSTALL_INPUTS := setup.py pyproject.toml constraints-cpu.txt

# Puts the sources of this folder before a PYTHONPATH of the caller's, which it keeps.
SOURCES := PYTHONPATH="$(CURDIR)/build/types$${PYTHONPATH:+:$$PYTHONPATH}"

.PHONY: help .venv .venv-peers pretrain test test-all test-gpu test-peers sanitize lint kernel-report bench-smoke bench bench-gpu results peers clean .links

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|'

.venv: .venv/installed

.venv/installed: $(INSTALL_INPUTS)
	@$(call check_python)
	$(call install,$(CONSTRAINT) --editable '.[dev]')

pretrain: .venv/installed  ## pre-train; ARGS="--preset beit_tiny --data.path FOLDER" adds options
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed engine/pretrain.py $(ARGS)

# Triton decides once in a process whether its kernels are interpreted: these are, on a machine with a GPU too.
INTERPRETED := TRITON_INTERPRET=1

test: .venv/installed  ## the tests that need no GPU and little time
	$(INTERPRETED) $(BIN)/pytest -n $(WORKERS) --dist loadgroup -m 'not slow and not gpu' $(ARGS)

test-all: .venv/installed  ## all tests; those for a GPU are skipped where there is none
	$(INTERPRETED) $(BIN)/pytest -n $(WORKERS) --dist loadgroup -m 'not gpu' $(ARGS)
	$(BIN)/pytest -m gpu $(ARGS) || [ $$? -eq 5 ]

test-gpu: .links  ## the tests that need a GPU, but for `make sanitize`
	$(call with_torch,pytest) -m pytest -m 'gpu and not slow' $(ARGS)

sanitize: .links  ## no kernel accesses what is not its own, as compute-sanitizer sees it on a GPU
	$(call with_torch,pytest) -m pytest -m gpu tests/test_sanitizer.py $(ARGS)

test-peers: .venv-peers/installed  ## fuse(model) on the models of timm and transformers
	$(INTERPRETED) .venv-peers/bin/pytest tests/test_fuse_*.py $(ARGS)

lint: .venv/installed .links  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With TRITON=3.6.0, or another version, that one compiles; the tables are not of it, so the rules alone are checked.
OTHER_TRITON = $(if $(TRITON),build/triton-$(TRITON))

kernel-report: .venv/installed $(OTHER_TRITON)  ## what the compiler makes of the kernels, to RESOURCES.md; ARGS=--check compares
	env -u TRITON_INTERPRET $(if $(TRITON),PYTHONPATH="$(OTHER_TRITON)$${PYTHONPATH:+:$$PYTHONPATH}") \
		$(BIN)/python -m fused_beit.kernels.report $(if $(TRITON),--check) $(ARGS)

build/triton-%: | .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@ triton==$*

bench-smoke: .venv/installed  ## every benchmark once at a small size; its times mean nothing
	$(BIN)/pytest benchmarks/ --benchmark-only --sizes smoke $(ARGS)

bench: .venv/installed  ## the benchmarks at full size; ARGS=--keep-results writes them to benchmarks/results
	$(BIN)/pytest benchmarks/ --benchmark-only $(ARGS)

results: .venv/installed  ## RESULTS.md, the README's tables and the plots, from benchmarks/results; ARGS=--check compares
	$(BIN)/python -m benchmarks.publish $(ARGS)

# By hand, with no install, the same is
#   mkdir -p build/types/fused_beit
#   for part in kernels engine ds_configs; do ln -sfn ../../../$part build/types/fused_beit/$part; done
#   PYTHONPATH=build/types python3 -m benchmarks.gpu
# `make bench-gpu BIN=.venv-peers/bin`, after `make peers`, compares with timm, transformers and xformers too.
bench-gpu: .links  ## all that is measured on a GPU, in one go; ARGS="--rehearse --output FOLDER" tries it without one
	$(call with_torch) -m benchmarks.gpu $(ARGS)

.links:
	@mkdir -p build/types/fused_beit
	@for part in kernels engine ds_configs; do ln -sfn ../../../$$part build/types/fused_beit/$$part; done

peers: .venv-peers/installed  ## an environment with the libraries that the benchmarks compare with

.venv-peers: .venv-peers/installed

.venv-peers/installed: $(INSTALL_INPUTS)
	@$(call check_python)
	$(call install,--editable '.[dev$(,)peers]')

clean:  ## delete the environments and what the tools remember, but no run's output
	rm -rf .venv .venv-peers build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and Python 3.11 or newer is needed;" \
	"give one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

, := ,

# An environment is complete, and only then taken, when it has the file `installed`. One that is new is deleted where
# the install fails; one that was there is left as it was.
define install
new=$$([ -x $(@D)/bin/python ] || echo new); \
	{ [ -z "$$new" ] || $(PYTHON) -m venv $(@D); } && \
	$(@D)/bin/python -m pip install --disable-pip-version-check $(1) || { \
	[ -z "$$new" ] || rm -rf $(@D); \
	echo "error: $(@D) could not be installed; the message of pip is above" >&2; exit 1; }
@touch $@
endef

# A python with torch: that of BIN where its environment is complete. Else PYTHON where it has torch, triton and what is
# given, as machines with a GPU come, often without a network; nothing is installed into it. Else .venv is made. The
# engine needs deepspeed and more (docs/benchmarks.md): without them its tests are skipped, its benchmarks left out.
define with_torch
@python=$(BIN)/python; \
	if [ ! -e $(BIN)/../installed ]; then \
		if [ $(BIN) != .venv/bin ]; then echo "error: there is no complete environment at $(BIN)/.." >&2; exit 1; fi; \
		if $(call has,torch triton $(1)); then python=$(PYTHON); else $(MAKE) .venv/installed || exit; fi; \
	fi; \
	set -x; $(SOURCES) $$python
endef

has = $(PYTHON) -c 'import sys, importlib.util as i; sys.exit(not all(map(i.find_spec, sys.argv[1:])))' $(1)
