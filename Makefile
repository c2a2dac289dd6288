# `make demo` and `make test` set up .venv and do everything; each is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test chaos lint format clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist loadfile

# about seven minutes; more in docs/chaos.md: make chaos CHAOS='--seed 7 --rounds workers'
chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos $(CHAOS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build demo-run *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# installed anew when what it asks for changes; the stamp comes last, so that a setup cut short is done again
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make: expected Python 3.11 or later, got %d.%d; name one: make PYTHON=python3.12" % v[:2])'
	@echo "setting up $(VENV) (once; a few minutes, most of it torch)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[test]'
	@touch $@
