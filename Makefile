# `make demo` and `make test` need Python ≥ 3.11 and nothing else; everything is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types layers unit mutations long properties-long gpu faults bench wheel clean services

demo: $(STAMP)
	$(BIN)/rmctl demo

# Two runs: the tests of processes and descriptors look at their own process, which must not have Ray in it.
test: lint types layers services
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not ray and not own_ray and not gpu and not long"
	$(BIN)/python -m pytest -n 2 -m "(ray or own_ray) and not long" --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

# The tests that need neither Ray nor a database server: seconds.
unit: $(STAMP)
	$(BIN)/python -m pytest -m "not ray and not own_ray and not gpu and not postgres and not torch and not long"

# The tests that take long: floods, real autoscaling, a restarted GCS, a restored ledger, second trainings.
long: $(STAMP)
	$(BIN)/python -m pytest -m "long and not gpu" --timeout=900

# What only real GPUs can show: memory that is free again, NVML, NCCL, errors that the driver reports. One GPU will do.
# Fails where there is none.
gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,gpu]'
	$(BIN)/python -m pytest -m gpu tests/gpu

# Breaks each rule of the scheduler by hand and demands that a test notices: many minutes.
mutations: $(STAMP)
	$(BIN)/python benchmarks/mutations.py

# The random histories of tests/properties at length: 5,000 clusters of 200 steps each, about a million in all.
# RM_PROPERTY_EXAMPLES and RM_PROPERTY_STEPS choose other numbers.
properties-long: $(STAMP)
	RM_PROPERTY_EXAMPLES=$${RM_PROPERTY_EXAMPLES:-5000} RM_PROPERTY_STEPS=$${RM_PROPERTY_STEPS:-200} \
	  $(BIN)/python -m pytest --timeout=0 tests/properties/test_policies.py

# A Ray of three nodes on which whatever can die is killed under random work: about four minutes.
faults: $(STAMP)
	$(BIN)/python benchmarks/faults.py --seed 1 --minutes 2

# The ledger is tested against a real PostgreSQL server, and a GCS that is killed against a real Redis. Where they are
# not installed and we may install them, do.
services: $(STAMP)
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y postgresql >/dev/null; } || \
	  echo "no PostgreSQL server here: its tests are skipped (Debian: apt-get install postgresql)"
	@command -v redis-server >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y redis-server >/dev/null; } || \
	  echo "no redis-server here: tests of a GCS that comes back are skipped (Debian: apt-get install redis-server)"

# The quick ones of benchmarks/, three minutes: from one job to the next, and what a decision costs.
bench: $(STAMP)
	$(BIN)/python benchmarks/handover.py --jobs 20 --burst 400
	$(BIN)/python benchmarks/scheduler.py --only event,fill

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
