# Every target makes its own .venv where it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made

.PHONY: quickstart test test-all coverage check docs bench bench-full english clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   a real model with early exits, and one that was trained with them (under 10 minutes on two cores);"
	@echo "                  TUNE_STEPS=36 tunes the first one's exits here instead of taking those in adapters/"
	@echo "make test         the tests, under 15 minutes on two cores"
	@echo "make test-all     with the large matrices, kills, load and every command of the docs; under 40 minutes"
	@echo "make coverage     test-all, and which lines of eellm it runs"
	@echo "make check        style, types, layers"
	@echo "make docs         the documentation, into site/"
	@echo "make bench        all benchmarks in their short form, against other programs (20 minutes; bench-out/report.md)"
	@echo "make bench-full   the same in their long form (about six hours)"
	@echo "make english      trains the English model of the docs (about two hours on two cores; goes on where it stopped)"

# torch comes first and by its exact number, so that every environment computes with the same one
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py $(if $(TUNE_STEPS),--tune-steps $(TUNE_STEPS))

# Two files at a time; those of several processes, which wait for each other a lot, apart from those of one. What is slow
# in one process measures or fills the machine, and has it for itself.
TWO := -n 2 --dist loadfile
WORLDS := tests/distributed

test: $(STAMP)
	$(BIN)/python -m pytest $(TWO) --ignore $(WORLDS)
	$(BIN)/python -m pytest $(TWO) $(WORLDS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(TWO) --ignore $(WORLDS)
	$(BIN)/python -m pytest $(TWO) $(WORLDS) -m "slow or not slow"
	$(BIN)/python -m pytest --ignore $(WORLDS) -m slow

coverage: $(STAMP)
	$(BIN)/python -m pytest $(TWO) --ignore $(WORLDS) --cov --cov-report=
	$(BIN)/python -m pytest $(TWO) $(WORLDS) -m "slow or not slow" --cov --cov-append --cov-report=
	$(BIN)/python -m pytest --ignore $(WORLDS) -m slow --cov --cov-append --cov-report=term:skip-covered

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/suite.py $(BENCH)

bench-full: $(STAMP)
	$(BIN)/python benchmarks/suite.py --full $(BENCH)

english: $(STAMP)
	$(BIN)/python examples/english_text.py
	$(BIN)/eellm prepare --input english/text.jsonl --train-tokenizer 4096 --out english/data
	$(BIN)/eellm prepare --input english/validation.jsonl --tokenizer english/data --out english/validation
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 -m eellm train recipes/english.toml
	$(BIN)/eellm export runs/english english/model --dtype float16
	cp english/SOURCES.md english/model/README.md

clean:
	rm -rf $(VENV) site quickstart .pytest_cache .ruff_cache .hypothesis *.egg-info
