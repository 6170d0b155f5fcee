# Two commands set everything up: `make demo` pretrains on embedded photographs, `make test` checks the project.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo test lint

demo: $(VENV)/installed
	$(PYTHON) main_pretrain.py --recipe demo --overwrite

test: lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/installed-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt pyproject.toml
	$(PYTHON) -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --editable .[test]
	touch $@
