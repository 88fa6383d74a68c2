# Everything a fresh machine needs beyond Python 3.11+, a C++ compiler and make is installed by these targets.
#
#   make demo       the first five minutes: this machine, a model, its lean twin and the proof
#   make test       the tests that take seconds      make test-slow  the others
#   make test-clients   others' clients, installed apart, against our server
#   make test-arm   the core on ARM, emulated: its tests, and answers bit by bit beside this machine's
#   make check      what a change must pass: format, lint, types, warnings, tests
#   make lock       resolve the dependencies of pyproject.toml anew into requirements/lock.txt

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORE   := snello/native/libsnello.so
SOURCE := $(wildcard csrc/* csrc/*/*)
CPP    := $(shell find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.inl' -o -name '*.cpp' 2>/dev/null)
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install core demo test test-slow test-clients test-arm check format format-check lint types lock clean

help:
	@sed -n 's/^#   //p' Makefile

# ---- the environment: stamps, so that nothing is done twice ---------------------------------------------------------

$(VENV)/.locked: requirements/lock.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages (torch is the large one)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	@touch $@

$(CORE): CMakeLists.txt $(SOURCE) | $(VENV)/.locked
	@echo "compiling the core" >&2
	@$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSNELLO_INPLACE=ON \
	  --log-level=WARNING > /dev/null
	@$(BIN)/cmake --build build/native --parallel $(JOBS) -- --quiet
	@touch $@

# In place: an edit of a Python file needs no new installation; the core above lies beside its Python face.
$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  -Ceditable.mode=inplace -Cwheel.cmake=false -e .
	@touch $@

core: $(CORE)
install: $(VENV)/.locked $(VENV)/.installed $(CORE)

# ---- the product ----------------------------------------------------------------------------------------------------

demo:
	@start=$$(date +%s); $(MAKE) --no-print-directory install; \
	 echo "set up in $$(( $$(date +%s) - start )) s (downloads and compiling; not part of the five minutes)" >&2
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh

# ---- the checks -----------------------------------------------------------------------------------------------------

test: install
	@$(PYTEST) -n $(JOBS) --dist loadfile

test-slow: install
	@$(PYTEST) -m slow

# Slow tests too, which skip where these are absent.
test-clients: install
	@PYTHON=$(PYTHON) bash scripts/clients.sh
	@$(PYTEST) -m slow tests/serve/test_foreign_clients.py tests/serve/test_openapi.py

test-arm: install
	@bash scripts/arm.sh

# The core is compiled with warnings as errors here; only a wheel is built whatever its compiler warns of.
check: install format-check lint types
	@$(PYTEST) -n $(JOBS) --dist loadfile

format: $(VENV)/.locked
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

format-check: $(VENV)/.locked
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

lint: $(VENV)/.locked
	@$(BIN)/ruff check .

types: $(VENV)/.installed
	@$(BIN)/mypy

lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python scripts/lock.py requirements/lock.txt

clean:
	@rm -rf build/native build/lock build/arm dist $(CORE) $(VENV)/.installed
