# Each target works alone on a fresh clone; the first one to run makes .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test check smoke bench mutants mutation soak lowest docs wheel clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: .venv/.installed  ## fine-tune the bundled ViT on digits, evaluate it, predict a few images
	$(BIN)/vitft train --recipe digits --output runs/demo --overwrite
	$(BIN)/vitft eval runs/demo --plot runs/demo/confusion.png
	$(BIN)/vitft predict docs/digits --checkpoint runs/demo
	@echo "The run is in runs/demo: last/ is the model, metrics.jsonl its history, confusion.png its mistakes."

test: .venv/.installed-dev  ## run all tests
	$(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal

check: .venv/.installed-dev  ## lint, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

smoke: .venv/.installed  ## tiny subsets through the real command line
	rm -rf runs/smoke && mkdir -p runs
	$(BIN)/vitft --version
	$(BIN)/vitft recipes ls
	$(BIN)/vitft data info digits
	$(BIN)/vitft data check digits
	$(BIN)/vitft explain --model vit-micro
	$(BIN)/vitft explain --image docs/boot.png --html runs/boot.html
	$(BIN)/vitft bench train --steps 2
	$(BIN)/vitft train --recipe smoke --dry-run
	$(BIN)/vitft train --recipe smoke --output runs/smoke
	$(BIN)/vitft train --resume runs/smoke
	$(BIN)/vitft eval runs/smoke --json
	$(BIN)/vitft predict docs/digits --checkpoint runs/smoke --json

# torch stays at the version of constraints.txt: its own lower bound is declared, and not tested.
lowest: pyproject.toml constraints.txt  ## tests of data, models and commands with the lowest versions that pyproject.toml allows
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	sed -n '/^dependencies/,/^dev/p' pyproject.toml | grep -o '[A-Za-z0-9_-][A-Za-z0-9_-]*>=[0-9.]*' | grep -v '^torch>' | sed 's/>=/==/' \
		> .venv-lowest/lowest.txt
	grep '^torch==' constraints.txt >> .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --constraint .venv-lowest/lowest.txt \
		--editable '.[dev]'
	.venv-lowest/bin/python -m pytest tests/data/test_decoder.py tests/data/sources/test_source.py tests/data/test_augment.py tests/models/test_load.py \
		tests/data/sources/test_features.py tests/evaluation/test_evaluation.py tests/cli/test_app.py

.venv-bench/.installed: pyproject.toml benchmarks/requirements.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet \
		--requirement benchmarks/requirements.txt --editable .
	touch $@

bench: .venv-bench/.installed  ## vitft beside its peers on this machine, in an environment of its own (several GB)
	.venv-bench/bin/python benchmarks/peers.py data --photos 600
	.venv-bench/bin/python benchmarks/peers.py train --model vit-tiny --image-size 96 --batch-size 32
	.venv-bench/bin/python benchmarks/engines.py

mutants: .venv/.installed-dev  ## every contract broken once, on a copy: some test must notice
	$(BIN)/python tests/mutants/run.py

mutation: .venv/.installed-dev  ## a sample of small faults in the code: what share do the tests notice? (hours; it can be broken off)
	$(BIN)/python tests/mutants/sample.py record
	$(BIN)/python tests/mutants/sample.py run --count 600
	$(BIN)/python tests/mutants/sample.py report

.venv/.installed-soak: .venv/.installed-dev
	$(PIP) --editable '.[dev,openvino]'
	touch $@

soak: .venv/.installed-soak  ## the longer proofs: all tests under other kernels, an hour of faults; about four hours, idle
	$(BIN)/python -m tests.kernels
	$(BIN)/python -m tests.soak --minutes 60
	$(BIN)/python -m pytest -m slow -s --timeout 7200

.venv/.installed-docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	touch $@

docs: .venv/.installed-docs  ## build the documentation into dist/docs; it opens from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: .venv/.installed-dev  ## build the wheel into dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what the other targets made, runs/ apart
	rm -rf .venv .venv-bench .venv-lowest dist .ruff_cache .mypy_cache .import_linter_cache
