# Each target does its own set-up: a virtual environment with the versions of constraints.txt. Nothing else is needed.
#   make demo [SEED=n]   train the tiny student, about two minutes on two CPU cores
#   make test            the default tests
#   make test-slow       more variants of some, six minutes
#   make test-min        the same with the oldest supported versions of trl, transformers, accelerate, datasets and peft
#   make check           lint, format, types, spelling
#   make bench           the measurements behind the README's tables, a day or two
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help demo test test-slow test-min check bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(READY)
	$(LAUNCH) examples/math.py --seed $(SEED) --output_dir runs/demo-$(SEED)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m slow

test-min: tests/minimum_versions.py setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)-min
	$(PYTHON) tests/minimum_versions.py > $(VENV)-min/constraints.txt
	$(VENV)-min/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-min/constraints.txt torch -e ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-min/bin/$(PYTEST)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(READY)
	$(BIN)/python benchmarks/students.py
	$(BIN)/python benchmarks/prefix_tree.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/values.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/gate.py
	$(BIN)/python benchmarks/gate.py --task word_problems --seeds 0 1 2 3 4
	$(BIN)/python benchmarks/iterations.py
	$(BIN)/python benchmarks/second_iteration.py
	$(BIN)/python benchmarks/kill.py
	$(BIN)/python benchmarks/execution.py
	$(BIN)/python benchmarks/code_demo.py
	$(BIN)/python benchmarks/servers.py
	$(BIN)/python docs/draw_prefix_tree.py

# The requirements are in setup.cfg; a change there, or of the pinned versions, installs anew.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-min runs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
