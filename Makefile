# Everything from nothing: needs Python 3.11 to 3.13 with venv, and git. PYTHON=python3.12 make test chooses another one.
PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test lint notebooks clean

quickstart: $(VENV)/.ready
	$(VENV)/bin/w2s quickstart --workdir quickstart

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

# runs the .py and writes the .ipynb, with the quickstart's student
notebooks: quickstart
	$(VENV)/bin/python notebooks/execute.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) quickstart
