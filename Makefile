# The two commands of the README, and the checks behind them.
PYTHON := .venv/bin/python
TEST_WORKERS ?= 2

.PHONY: train test check format lint types imports clean

train: .venv/ready  ## plan, freeze and train the example run here
	$(PYTHON) -m launcher train experiment=first_run

test: .venv/ready .venv/colossalai .venv/mlflow/ready  ## all tests; a file stays on one worker, so that its fixtures are made once
	MESHWRIGHT_COLOSSALAI_PYTHON=$$(cat .venv/colossalai) MESHWRIGHT_MLFLOW=$(CURDIR)/.venv/mlflow \
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

# The one engine whose pins exclude the others'; its tests run in an environment of its own.
.venv/colossalai: .venv/ready launcher/environments/locks/base.txt launcher/environments/locks/colossalai.txt
	MESHWRIGHT_HOME=$(CURDIR)/.venv/home $(PYTHON) -m launcher env create colossalai --json | \
		$(PYTHON) -c 'import json, sys; print(json.load(sys.stdin)["path"] + "/bin/python")' > $@

# Kept apart: it brings a web server and clients of clouds along, which nothing else here needs.
.venv/mlflow/ready: .venv/ready launcher/environments/locks/base.txt
	rm -rf .venv/mlflow
	$(PYTHON) -m pip --disable-pip-version-check --quiet install --target .venv/mlflow \
		--constraint launcher/environments/locks/base.txt 'mlflow-skinny==3.17.2'
	touch $@

.DELETE_ON_ERROR:

clean:
	rm -rf .venv build dist *.egg-info
