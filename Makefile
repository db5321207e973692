# Environment, main job, checks. `make help` lists the targets; ARGS="..." passes options on.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python -m

.DEFAULT_GOAL := help
.PHONY: help install cv test test-versions faults lint benchmark accelerator docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.dev ## create the environment with everything for running, testing and linting

cv: $(VENV)/.experiments ## five-fold cross-validation, e.g. make cv ARGS="--accelerator=cpu --folds 0 2"
	@$(RUN) experiments.cv $(ARGS)

test: $(VENV)/.dev ## run the tests
	@$(RUN) pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-versions: $(VENV)/.dev ## a short suite on the oldest and the newest releases, or ARGS=onnx
	@.ci/versions $(BIN)/uv $(ARGS)

faults: $(VENV)/.dev ## kill, corrupt, fill the disk, and count what is lost, e.g. make faults ARGS="--share 0.1"
	@$(RUN) tests.faults $(ARGS)

lint: $(VENV)/.dev ## ruff, its formatter, pyright
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: $(VENV)/.experiments ## every benchmark in one table, e.g. make benchmark ARGS=--quick
	@$(RUN) benchmarks $(ARGS)

accelerator: $(VENV)/.dev ## the first nine minutes on a GPU or TPU: tests, kernels, train steps, a short run
	@$(RUN) benchmarks.accelerator $(ARGS)

docs: $(VENV)/.dev ## build the documentation into site/, or serve it: make docs ARGS=serve
	@$(RUN) mkdocs $(or $(ARGS),build --strict)

# A stamp is newer than pyproject.toml once its extra is installed, so a second run starts at once.
$(VENV)/.experiments: pyproject.toml | $(BIN)/uv
	@echo "Installing cmsad-jax and the packages of its experiments into $(VENV) (once)"
	@$(call install,.[experiments])
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/uv
	@echo "Installing cmsad-jax and its development tools into $(VENV) (once)"
	@$(call install,.[dev])
	@touch $(VENV)/.experiments $@

# uv takes seconds where pip takes minutes; pip knows indexes and proxies of pip's settings, which uv
# does not read. What is imported is compiled once, at its first import, unless Python may not keep it.
install = $(BIN)/uv pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) \
    --python $(BIN)/python --editable "$(1)" || \
  { echo "uv could not install these; pip tries it now, which takes minutes"; \
    $(RUN) pip install --quiet --editable "$(1)"; }

$(BIN)/uv: | $(BIN)/python
	@$(RUN) pip install --quiet "uv>=0.7"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"Python must be 3.11 or newer; got {v[0]}.{v[1]}. Use make PYTHON=/path/to/python3.11.")'
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }
