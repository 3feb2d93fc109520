# Everything from nothing: needs Python 3.11 to 3.13 with venv, and git. make PYTHON=python3.12 chooses another one.
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

# pip says nothing until it is done, or far too much: its log tells every ten seconds where it is
$(VENV)/.ready: pyproject.toml constraints.txt
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || version=missing; \
	case $$version in 3.11 | 3.12 | 3.13) exit 0;; esac; \
	for other in python3.13 python3.12 python3.11; do $$other -c '' 2> /dev/null && break; other=python3.12; done; \
	echo "w2s_jax needs Python 3.11 to 3.13; $(PYTHON) is $$version. Choose another one: make $(MAKECMDGOALS) PYTHON=$$other" >&2; exit 1
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): JAX, TensorFlow and others, about 0.7 GB to download, 4 GB on disk, 2 to 10 minutes"
	@log=$(VENV)/install.log; rm -f $$log; \
	(seconds=0; while sleep 10; do seconds=$$((seconds + 10)); \
	  echo "  $$seconds s: $$(sed -n 's/^[^ ]* *\(Collecting\|Downloading\|Using cached\|Installing\) /\1 /p' $$log | tail -n 1 | cut -c 1-90)"; \
	done) & ticks=$$!; trap 'kill $$ticks 2> /dev/null' EXIT INT TERM; \
	$(VENV)/bin/python -m pip install --quiet --progress-bar off --disable-pip-version-check --log $$log \
	  --constraint constraints.txt --editable '.[dev]' || { echo "the whole of pip's log: $$log" >&2; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) quickstart
