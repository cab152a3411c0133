PYTHON ?= python3
BIN := .env/bin

.PHONY: demo test notebook team mlflow-server chaos lint lock bench showcase clean

# The virtual environment; brought up to date when what it needs changes. Python compiles modules
# when they are first imported: all of them at once, most of them unused, would take two minutes.
.env/.installed: requirements.txt
	$(PYTHON) -m venv .env
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# And what only tests and benchmarks need.
.env/.installed-dev: .env/.installed requirements-dev.txt
	$(BIN)/pip install --no-compile --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .env/.installed  ## the whole pipeline on scikit-learn's digits
	$(BIN)/python -m utils.demo

# Two processes of one thread are faster than one process of two on small tensors.
test: .env/.installed-dev  ## all tests but those of the notebook and of a team's server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--ignore tests/test_notebook.py --ignore tests/test_team_server.py

# Passive: threads that spin while they wait would stop the training beside another process.
notebook: .env/.installed-dev  ## run docs/quickstart.ipynb
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/test_notebook.py

team: .env/.installed-dev  ## all stages against MLflow on PostgreSQL and S3, with a password
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_team_server.py

mlflow-server: .env/.installed-dev  ## run that server until Ctrl-C; it keeps nothing
	$(BIN)/python -m tests.team_server

chaos: .env/.installed-dev  ## kills, signals, damage, full disks; ARGS=--quick: a few of each
	$(BIN)/python -m tests.chaos $(ARGS)

lint: .env/.installed-dev  ## style and types, as CI checks them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: .env/.installed-dev  ## write the versions of this environment to requirements.lock
	(echo "# Versions that all tests passed with (make lock). The bounds are in requirements.txt."; \
	$(BIN)/pip freeze --all --exclude-editable | grep -v -e ' @ ' -e ^pip=) > requirements.lock

bench: .env/.installed-dev  ## each stage beside its peers and the machine's limits; the presets
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.gpt --compile
	$(BIN)/python -m benchmarks.presets

showcase: .env/.installed-dev  ## figures and pictures of docs/transformer.md, from the MNIST models
	$(BIN)/python -m benchmarks.showcase

clean:  ## remove what trainings wrote, not your data
	rm -rf outputs mlruns mlflow.db mlflow.db.lock
