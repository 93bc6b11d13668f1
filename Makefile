# The commands of the README. Each makes .venv when it is missing and installs what it needs.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test docs lint clean

demo: $(VENV)/.examples
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# One stamp per extra, renewed when the dependencies change.
$(VENV)/.%: pyproject.toml | $(VENV)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist site *.egg-info
