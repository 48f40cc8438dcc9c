# Two commands do everything on a machine that has Python >= 3.11, make and a C compiler:
#   make quickstart    sets up .venv, trains a small GPT on this Python's own library, evaluates it, samples it, writes a report
#   make test          sets up .venv with the developer's tools and runs the tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FOLDERS := kernels model data evaluation training scripts configs benchmarks
RUN    ?= runs/quickstart

.PHONY: quickstart test check lint format types contracts typing docs-check compile-gate compile-gate-full build clean help

help:
	@sed -n 's/^#  *make/make/p' Makefile
	@echo "make check         lint, types, import contracts, tests: what CI runs"
	@echo "make format        formats and fixes what can be fixed"
	@echo "make docs-check    runs the checks of the documentation alone"
	@echo "make compile-gate  compiles the listed attention kernels for sm_80 and sm_90 (no GPU), holds them to their table"
	@echo "make compile-gate-full   the same for every spec, head dim and dtype; about an hour on two cores"
	@echo "make build         a wheel and a source archive in dist/"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Longspan needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The stamps are renewed when the dependencies change; code changes need no reinstall (the install is editable).
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Longspan into $(VENV) (some minutes the first time: PyTorch is large) ..."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Longspan and its developer tools into $(VENV) (some minutes the first time: PyTorch is large) ..."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.run

quickstart: $(VENV)/.run
	$(BIN)/longspan train experiment=quickstart output=$(RUN) resume=auto
	$(BIN)/longspan uptrain checkpoint=$(RUN) kv_heads=[2,1] alpha=[0,0.03] schedule=rewarm lr_fraction=0.1 \
	    evaluation.max_tokens=10_000 retrieval.trials=4 speed.batches=1 speed.contexts=256 output=$(RUN)-gqa resume=auto
	@echo
	@echo "The model continues a prompt:  $(BIN)/longspan generate checkpoint=$(RUN) prompt='def main'"
	@echo "The report:                    $(RUN)/report.html"
	@echo "Fewer key/value heads:         $(RUN)-gqa/report.html"

# A process for each core (at most 4), one thread each: two threads in each of two processes would wait for each other.
test: $(VENV)/.dev typing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: lint types contracts test

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Static tools cannot see a namespace that setuptools maps from folders; this farm of links shows it to them.
typing:
	@mkdir -p .typing/longspan
	@for folder in $(FOLDERS); do ln -sfn ../../$$folder .typing/longspan/$$folder; done

types: $(VENV)/.dev typing
	$(BIN)/pyright

contracts: $(VENV)/.dev typing
	PYTHONPATH=.typing $(BIN)/lint-imports

docs-check: $(VENV)/.dev typing
	$(BIN)/python -m pytest tests/test_docs.py tests/scripts/test_docs.py tests/kernels/test_docs.py $(ARGS)

compile-gate: $(VENV)/.dev typing
	PYTHONPATH=.typing $(BIN)/python -m longspan.kernels.attention.triton.gate $(ARGS)

compile-gate-full: $(VENV)/.dev typing
	PYTHONPATH=.typing $(BIN)/python -m longspan.kernels.attention.triton.gate --full $(ARGS)

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf build dist .typing .pytest_cache .ruff_cache .hypothesis *.egg-info
