# Every target sets up what it needs in .venv, from a bare clone. PYTHON=python3.12 chooses another
# interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: run test test-slow test-resume test-browser test-engines test-slurm docs lint clean

run: .venv/installed
	@# progress bars only: the report prints the table, and where everything is
	$(BIN)/rnngrad -m experiment=first_look cell=rnn,lstm hydra.sweep.dir=runs/first_look >/dev/null
	@$(BIN)/rnngrad-report runs/first_look

test: .venv/installed-test
	$(BIN)/python -m tests.compiled
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

test-resume: .venv/installed-test
	$(BIN)/python -m pytest -s -m "slow or not slow" tests/test_resume.py tests/test_resume_command.py tests/test_signals.py \
		tests/test_killed.py tests/test_disk.py tests/test_one_writer.py

test-browser: .venv/installed-test
	$(INSTALL) --editable ".[browser]"
	$(BIN)/python -m pytest -m browser

test-engines: .venv/installed-test
	$(INSTALL) --editable ".[joblib,slurm,optuna]"
	$(BIN)/python -m pytest -s -m "engines or slow" tests/test_engines.py tests/test_sweeps_killed.py

test-slurm: .venv/installed-test
	@command -v slurmctld munged >/dev/null || (echo "make test-slurm: apt-get install slurm-wlm munge"; false)
	$(INSTALL) --editable ".[slurm]"
	$(BIN)/python -m pytest -s -m slurm tests/test_slurm.py

docs: .venv/installed
	$(BIN)/python -m rnngrad.menu > docs/menu.md
	$(BIN)/python -m rnngrad.reproduce.page

lint: .venv/installed-dev
	$(BIN)/python -m rnngrad.menu | diff docs/menu.md - || (echo "docs/menu.md is behind: make docs"; false)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing rnngrad and torch into .venv (a minute or two) ..."
	$(INSTALL) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --editable ".[test]"
	touch $@

.venv/installed-dev: .venv/installed-test
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
