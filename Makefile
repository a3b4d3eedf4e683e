# Two commands matter: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := training,ingestion,serving,dev
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all bench check
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: install
	$(BIN)/reir demo

test: install
	$(BIN)/python -m pytest -q -m "not slow and not milvus"

# The real Milvus server comes as a package of its own.
test-all: install
	$(BIN)/python -m pip install -q --no-deps milvus==2.3.5
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done
