# The commands of the project; `make help` lists them. All of them build the environment first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.up-to-date
# deepspeed is for Linux; its tests skip themselves where it is not installed.
comma := ,
EXTRAS ?= dev,eval,tensorboard$(if $(filter Linux,$(shell uname)),$(comma)deepspeed)
# More arguments for pytest, e.g. make test ARGS="-m 'not slow' tests/data"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-thorough check format coverage bench lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## build .venv from constraints.txt (does nothing when it is up to date)

# The stamp is written last, so an installation that failed half way is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: lit_llm needs Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.11" >&2; exit 1; }
	@rm -f $@
	@test -x $(BIN)/python && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the environment into .venv (a minute or two, more where torch comes with CUDA) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

quickstart: env ## the main job: tokenizer, pre-training, evaluation, samples, export and report, in minutes
	$(BIN)/python recipes/lifecycle.py

# One worker a core, each with one thread: more threads than cores slow each other down.
test: env ## the tests, without network (ARGS="..." goes to pytest)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-thorough: env ## what is left of the tests: every recipe under every strategy, and the like
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --thorough -m thorough $(ARGS)

check: env ## lint, format, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## mend what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: env ## the tests with a coverage report
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term $(ARGS)

bench: env ## ours beside the peers on the same work (minutes; keep the machine idle)
	$(BIN)/python benchmarks/pretrain.py $(ARGS)

# torch stays where it is: raise its pin by hand, with the notes on its version.
lock: ## write constraints.txt anew for every Python and platform (needs uv)
	uv pip compile --universal --python-version 3.10 --all-extras --no-annotate --custom-compile-command "make lock" \
	  $(ARGS) pyproject.toml --output-file constraints.txt

clean: ## remove caches and build products (.venv and runs/ stay)
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find lit_llm recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
