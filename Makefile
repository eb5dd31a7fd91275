# make demo    train on the handwritten digits, evaluate, write a report
# make test    the whole test suite
# make docs    the documentation, docs/_build/html/index.html
# make lint types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test docs lint types format clean
.DEFAULT_GOAL := test

# One thread: these nets are small, and threads that wait for one another on a busy machine cost more than they give.
demo: export OMP_NUM_THREADS = 1
demo: $(READY)
	@run=runs/digits-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/aevb train digits --out $$run && \
	$(BIN)/aevb evaluate $$run && \
	$(BIN)/aevb report $$run

# A process for each core; within each, one thread.
test: $(READY)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Warnings are errors; nothing is fetched while it builds.
docs: export OMP_NUM_THREADS = 1
docs: $(READY)
	@$(BIN)/python -m sphinx -q -E -n -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Made once; made again when the pins or the package's own needs change. Nothing is fetched after that.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "aevb needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV) (once; some minutes) ..."
	@pin=$$(sed -n 's/^torch==//p' requirements.txt); \
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q "torch==$$pin"; \
	else $(BIN)/pip install -q "torch==$$pin+cpu" 2>/dev/null || $(BIN)/pip install -q "torch==$$pin"; fi
	@$(BIN)/pip install -q -r requirements.txt
	@$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $(READY)
