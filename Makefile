# The two commands of the README, and the checks behind them.
PYTHON := .venv/bin/python
TEST_WORKERS ?= 2

.PHONY: train test check format lint types imports clean

train: .venv/ready  ## plan, freeze and train the example run here
	$(PYTHON) -m launcher train experiment=first_run

test: .venv/ready  ## all tests; a file stays on one worker, so that its fixtures are made once
	$(PYTHON) -m pytest -n $(TEST_WORKERS) --dist loadfile

check: .venv/ready format lint types imports test  ## everything that has to pass

format: .venv/ready
	$(PYTHON) -m ruff format --check .

lint: .venv/ready
	$(PYTHON) -m ruff check .

types: .venv/ready
	$(PYTHON) -m mypy

imports: .venv/ready
	.venv/bin/lint-imports --no-cache

.venv/ready: pyproject.toml constraints.txt bootstrap.sh
	./bootstrap.sh

clean:
	rm -rf .venv build dist *.egg-info
