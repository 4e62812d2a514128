# Two commands for people: `make run` and `make test`. The rest is for who works on Holdfast.

# The first interpreter that Holdfast runs on; `make PYTHON=… run` names another.
FITS := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do $$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
INSTALL = $(or $(PYTHON),$(error Holdfast needs Python 3.11 or 3.12. Next: sudo apt-get install python3 python3-venv)) requirements/install.py

.DEFAULT_GOAL := help
.PHONY: help run test check lock clean

help:
	@echo "make run     install what is missing, start the demonstration, show that state is kept, go on serving"
	@echo "make test    install what is missing, run every test"
	@echo "make check   lint, types, import contracts"
	@echo "make lock    write requirements/*.txt anew (UPGRADE=--upgrade takes newer versions)"
	@echo "make clean   remove the environments and every cache"

run:
	@$(INSTALL) gateway engine
	@exec .venv/bin/holdfast up --demo

test:
	@$(INSTALL) gateway engine --tests
	@exec .venv/bin/python tests/run.py $(TESTS)

check:
	@$(INSTALL) gateway --tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

lock:
	@$(INSTALL) gateway --tests
	@.venv/bin/python requirements/lock.py $(UPGRADE)

clean:
	rm -rf .venv .venv-engine build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
