# make demo | docs | evaluate | test | test-slow | test-today | check, and on a GPU test-gpu |
# bench-gpu. All lives in .venv (test-today: in .venv-today); needs Python 3.11 or 3.12 only.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
# two tests at once; a process that has none left takes half of those of the other
AT_ONCE := -n 2 --dist worksteal

.PHONY: demo demo-data docs evaluate test test-slow test-today test-gpu bench-gpu check clean

demo: $(VENV)/installed
	@$(BIN)/python tests/run_demo.py

demo-data: $(VENV)/installed
	$(BIN)/python tests/demo_data.py demo

docs: $(VENV)/installed
	$(BIN)/python tests/options_page.py

evaluate: $(VENV)/installed
	@$(BIN)/python tests/run_evaluation.py $(if $(NORMAN),--norman $(NORMAN)) $(if $(TABLE),--table $(TABLE))

test: $(VENV)/installed
	$(BIN)/python -m pytest $(AT_ONCE) -m "not slow and not gpu"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest $(AT_ONCE) -m "not gpu"

# what only a machine with a CUDA device can tell; DEVICE=cpu: every line, tiny, in two minutes
DEVICE ?= cuda
test-gpu: $(VENV)/installed
	TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest tests/test_gpu.py

bench-gpu: $(VENV)/installed
	$(BIN)/python tests/benchmarks/bench_gpu.py --device $(DEVICE) --output bench_gpu.json

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# labels, symbols, tables, checks, copies, trainings, evaluations and documents on what pip gives without constraints.txt
TODAY := test_create_labels test_create_symbols test_create_keys test_create_dates test_experiment \
	test_train_preflight test_train_fast test_train_nodes test_train_precision test_docs
test-today:
	$(MAKE) .venv-today/installed VENV=.venv-today CONSTRAINTS=
	.venv-today/bin/python -m pytest $(AT_ONCE) -m "not slow" $(TODAY:%=tests/%.py) \
		tests/embedding tests/training tests/evaluation

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing State and PyTorch into $(VENV): minutes and gigabytes, this first time only"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-* demo build *.egg-info
