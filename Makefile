# What people and workflows call. Each target makes the environment it needs when that is missing.
#
#     make test TORCH=2.11.*      with this PyTorch, or TORCH=nightly NIGHTLY=<index of its nightly builds>, in an
#                                environment of its own
#     make test ARGS="-k name"   arguments of the program behind the target

PYTHON ?= python3
TORCH ?=
VENV := .venv$(if $(TORCH),-$(subst *,x,$(TORCH)))
RUN := $(VENV)/bin/python

.PHONY: demo test test-fast test-cuda test-oldest lint docs dist verify clean

demo: $(VENV)/.examples
	$(RUN) examples/quickstart.py $(ARGS)

# A process for each core, files whole: some make what all of their tests use.
test: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist loadfile $(ARGS)

# What to run before each commit: all but trainings, scripts, processes and long comparisons.
test-fast: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test-cuda: $(VENV)/.test
	$(RUN) -m pytest --device cuda $(ARGS)

# With the lowest torch of pyproject.toml, in an environment of its own.
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

dist: $(VENV)/.dev
	rm -rf dist
	$(RUN) -m build --no-isolation
	$(RUN) -m twine check --strict dist/*

# What dist/ holds, installed alone: VERSION, a tag such as v0.1.0, must be its own.
verify:
	$(PYTHON) -m venv --clear .verify
	.verify/bin/python -m pip install --quiet dist/*.whl
	.verify/bin/python .ci/verify.py $(VERSION)

# One stamp per extra, renewed when the dependencies change.
$(VENV)/.%: pyproject.toml | $(VENV)
ifeq ($(TORCH),nightly)
	$(RUN) -m pip install --quiet --pre torch torchvision --index-url $(NIGHTLY)
	$(RUN) -m pip install --quiet --editable ".[$*]"
else
	$(RUN) -m pip install --quiet --editable ".[$*]" $(if $(TORCH),"torch==$(TORCH)")
endif
	touch $@

$(VENV)-oldest/.test: pyproject.toml tests/oldest.txt | $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable ".[test]"
	touch $@

$(VENV) $(VENV)-oldest:
	$(PYTHON) -m venv $@

clean:
	rm -rf .venv .venv-* .verify build dist site *.egg-info
