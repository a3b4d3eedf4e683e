# Two commands matter: `make demo` and `make test`. Both install everything that they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := training,ingestion,serving,operations,dev
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

# One OpenMP thread a process: tests start many processes, whose threads would wait for each other.
test test-all: export OMP_NUM_THREADS ?= 1
# Two test files at a time, on any machine: each may start a Ray, a store and a browser of its own. They
# keep their order, because by default files with few tests come last: those that start Ray, side by side.
test: install
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not milvus"

# The real Milvus server comes as a package of its own.
test-all: install
	$(BIN)/python -m pip install -q --no-deps milvus==2.3.5
	$(BIN)/python -m pytest -q -rs

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The last three measure nothing: they compute docs/scale.md and docs/operations/capacity.md, and write figures into the docs.
BENCHMARKS := $(filter-out %/scale_plan.py %/capacity.py %/tables.py,$(wildcard benchmarks/[a-z]*.py))
bench: install
	for script in $(BENCHMARKS) benchmarks/scale_plan.py benchmarks/capacity.py benchmarks/tables.py; do \
		$(BIN)/python $$script || exit 1; \
	done
