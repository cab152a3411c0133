PYTHON ?= python3
BIN := .env/bin

.PHONY: demo test lint bench clean

# The virtual environment; made anew when what it needs changes.
.env/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .env
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .env/.installed  ## the whole pipeline on scikit-learn's digits
	$(BIN)/python -m utils.demo

test: .env/.installed  ## all tests
	$(BIN)/python -m pytest

lint: .env/.installed  ## style, as CI checks it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .env/.installed  ## attention, sampling and training beside their peers
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/gpt.py

clean:  ## remove what trainings wrote, not your data
	rm -rf outputs mlruns mlflow.db mlflow.db.lock
