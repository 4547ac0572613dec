# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

.PHONY: install demo demos test lint docs bench clean

install: $(VENV)/.installed

# third parties once, our own packages again whenever one is added or its metadata changes
$(VENV)/.thirdparty: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.thirdparty pyproject.toml $(wildcard plugins/*/pyproject.toml exporters/*/pyproject.toml)
	$(BIN)/python tools/dev_install.py
	touch $@

demo: install
	$(BIN)/kd compare pld:digits --seeds 5 --jobs 2 --out runs/demo

demos: install
	$(BIN)/python tools/run_demos.py

test: install lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python tools/make_docs.py

bench: install
	$(BIN)/python tools/bench_all.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
