# make quickstart   an environment, then a real distillation, offline
# make test         an environment with ColossalAI, then the test suite
# make gemini        ColossalAI, for the gemini backend
# make lint types docs   what continuous integration runs besides
# make methods-table     all methods on a file of labelled sentences: DATA=reviews.tsv (id, rating, text, tabs between)
# make methods-quick     the same in a few steps; on docstrings of Python where there is no such file

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data/movie_reviews.tsv
STAMP := $(VENV)/.installed
DEV := $(VENV)/.developer
GEMINI := $(VENV)/.gemini
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export NO_MKDOCS_2_WARNING ?= 1
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test gemini lint types docs methods-table methods-quick clean

quickstart: $(STAMP)
	$(BIN)/gkd run examples/sentence_encoder.gkd

test: $(DEV) $(GEMINI)
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -m gemini -n 2 --dist loadfile

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers cannot follow the folder mapping of pyproject.toml, so they look at an installed copy.
types: $(DEV)
	$(PIP) --no-deps --no-build-isolation \
		--target build/installed --upgrade .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python gkd_dsl

docs: $(DEV)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

methods-table: $(STAMP)
	$(BIN)/python benchmarks/methods_table.py --data $(DATA) $(ARGS)

methods-quick: $(STAMP)
	$(BIN)/python benchmarks/methods_table.py --quick --out build $(if $(wildcard $(DATA)),--data $(DATA)) $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e . --group example
	touch $@

$(DEV): $(STAMP)
	$(PIP) -c constraints.txt \
		--group test --group lint --group docs
	touch $@

gemini: $(GEMINI)

# ColossalAI asks for older versions of torch and transformers than the ones it runs on: nothing that it asks for is
# installed but what the Gemini part imports.
$(GEMINI): $(STAMP)
	$(PIP) -c constraints.txt --no-deps psutil accelerate peft einops galore_torch bitsandbytes
	$(PIP) --no-deps colossalai==0.5.0
	touch $@

clean:
	rm -rf $(VENV) build site
