# Two commands for people: `make run` and `make test`. The rest is for who works on Holdfast.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test check lock clean environments test-environments

help:
	@echo "make run     install what is missing, start the demonstration, show that state is kept, go on serving"
	@echo "make test    install what is missing, run every test"
	@echo "make check   lint, types, import contracts"
	@echo "make lock    write requirements/*.txt anew"
	@echo "make clean   remove the environments and every cache"

run: environments
	@exec $(BIN)/holdfast up --demo

test: test-environments
	@$(PYTHON) requirements/needs.py postgresql
	@echo "Unit and end-to-end tests, in the gateway's environment"
	@$(BIN)/python -m pytest tests/unit tests/e2e
	@echo "Tests inside the engine's environment"
	@.venv-engine/bin/python -m pytest tests/engine

check: test-environments
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: test-environments
	@$(BIN)/python requirements/lock.py

clean:
	rm -rf .venv .venv-engine build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environments:
	@$(PYTHON) requirements/install.py gateway engine

test-environments:
	@$(PYTHON) requirements/install.py gateway engine --tests
