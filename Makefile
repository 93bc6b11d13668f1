# The commands of the README. Each makes .venv when it is missing and installs what it needs.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/.examples
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest $(ARGS)

# With the lowest torch of pyproject.toml, in an environment of its own.
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# One stamp per extra, renewed when the dependencies change.
$(VENV)/.%: pyproject.toml | $(VENV)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

$(VENV)-oldest/.test: pyproject.toml tests/oldest.txt | $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[test]"
	touch $@

$(VENV) $(VENV)-oldest:
	$(PYTHON) -m venv $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info
