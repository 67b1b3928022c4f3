# make install    a virtual environment in .venv with everything the tests need; a second time it takes no time
# make quickstart the whole loop, from no model to its dossier, in runs/quickstart
# make format     writes the code as formatter and linter want it
# make fast       the linter and the tests that answer in about two minutes
# make test       formatter, linter, type checker and tests
# make evidence   the slow tests, then every script that measures what the docs claim: hours; EVIDENCE names some
# make lock       constraints.txt anew: every package of the tested set at its newest release, torch at TORCH
# make newest     the suite on the newest releases, in an environment of its own, and what they are
# make parity     the losses beside TRL's own, in an environment for each of its two releases
# make bench      against TRL, in turns: needs PEER, PEER_PPO and ROWS
# make clean      removes .venv and caches; runs/ stays

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# The release of torch that `lock` and `newest` take; its newest may be a CUDA build of several gigabytes.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

# Scripts that measure what the docs claim, each into docs/evidence/data; `make evidence` runs them after the slow tests.
# speed.py and plan_memory.py are not among them: they need another program and rows (`make bench`).
EVIDENCE ?= $(addprefix benchmarks/,spine.py algorithms.py tools.py hh.py real_data.py agreement.py feedback_load.py \
  feedback_newcomer.py sandbox.py)

.PHONY: install quickstart format fast test evidence lock newest parity bench bench-needs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trimtab needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

quickstart: install
	$(BIN)/trimtab quickstart

# One thread: the models of the tests are too small to share, and their sums keep one order on every machine.
fast test evidence: export OMP_NUM_THREADS = 1

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

FAST := $(addprefix tests/,architecture batches core evals math runs test_stats.py votes)
fast: install
	$(BIN)/ruff check
	$(BIN)/pytest $(FAST)

# Files share what they make once, so each is run by one process. Four of them need about 5 GB.
test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

evidence: export TRIMTAB_EVIDENCE = 1
evidence: install
	$(BIN)/pytest -m slow
	@set -e; for script in $(EVIDENCE); do echo "$$script"; $(BIN)/python "$$script"; done

lock:
	$(PYTHON) -m venv --clear .venv/lock
	.venv/lock/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -e ".[test]"
	.venv/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
	rm -rf .venv/lock

# Says what differs from constraints.txt (< locked, > newest) before the tests run and again after they fail.
newest: export OMP_NUM_THREADS = 1
newest:
	$(PYTHON) -m venv --clear .venv/newest
	.venv/newest/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -e ".[test]"
	@.venv/newest/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > .venv/newest/releases
	@diff constraints.txt .venv/newest/releases && echo "the newest releases are the locked ones" || true
	@.venv/newest/bin/pytest || { echo "fails with:"; diff constraints.txt .venv/newest/releases; exit 1; }

# 1.12 is the last release with a PPO trainer. Tests that need the other release skip.
parity:
	@set -e; for trl in 1.16.0 1.12.0; do \
	  $(PYTHON) -m venv .venv/trl-$$trl; \
	  .venv/trl-$$trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]" "trl==$$trl"; \
	  .venv/trl-$$trl/bin/python -m pytest -m parity tests/parity; \
	done

# The peer's interpreters are yours to name, or those that `make parity` has made.
PEER ?= $(wildcard .venv/trl-1.16.0/bin/python)
PEER_PPO ?= $(wildcard .venv/trl-1.12.0/bin/python)
bench: bench-needs install
	$(BIN)/python benchmarks/speed.py --peer $(PEER) --peer-ppo $(PEER_PPO) --rows $(ROWS)

bench-needs:
	@$(if $(and $(PEER),$(PEER_PPO),$(ROWS)),,echo "make bench needs PEER=PYTHON with trl 1.16.0, PEER_PPO=PYTHON with trl 1.12.0 (make parity makes both in .venv), and ROWS=harmless-base/test.jsonl.gz of Anthropic/hh-rlhf" >&2 && exit 1)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
