# Everything runs in the virtual environment .venv; Debian packages are installed when missing.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.complete
# More arguments for pytest: make test ARGS="-k chunk"
ARGS ?=
# Processes that share the tests; 0 = none but pytest's own, as -s wants: make test WORKERS=0 ARGS=-s
WORKERS ?= 2

INSTALL := packaging/install-dependencies
RUNTIME_PACKAGES := packaging/apt-packages.txt
TEST_PACKAGES := packaging/apt-packages-test.txt

.PHONY: help venv test-tools demo test lint man audit bench crash serve clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: ## make .venv with the stratocache command and every test tool
	@$(INSTALL) $(RUNTIME_PACKAGES)
	@$(MAKE) --silent $(STAMP)

# Made again when the dependencies change; a stamp of its own, so that a half-made one never counts.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	@echo "Making the virtual environment $(VENV)"
	@rm -f $@
	@test -x $(RUN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

test-tools: venv
	@$(INSTALL) $(RUNTIME_PACKAGES) $(TEST_PACKAGES)

demo: test-tools ## see the main job: boot a VM from a cached image, keep its disk (root)
	@$(RUN)/python packaging/demo/demo.py

test: test-tools ## run all tests (root)
	@$(RUN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: venv ## check style, format and types
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy

man: venv ## write the manual pages, made from the commands, to build/man
	@$(RUN)/python packaging/man/manual.py build/man

audit: venv ## look for known faults in our code and in the libraries that are installed
	@$(RUN)/bandit -q -ll -r api cache fs packaging
	@$(RUN)/pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	@$(RUN)/pip-audit --local --progress-spinner off

bench: test-tools ## measure, print the table, write build/bench.json (root)
	@mkdir -p build
	@$(RUN)/python tests/bench/run.py --output build/bench.json

crash: test-tools ## run the crash tests with every case; takes hours (root)
	@CRASH_HISTORIES=$${CRASH_HISTORIES:-10000} CRASH_ROUNDS=$${CRASH_ROUNDS:-200} \
		CRASH_CUTS=$${CRASH_CUTS:-200} ATTACH_RACES=$${ATTACH_RACES:-1000} LAZY_KILLS=$${LAZY_KILLS:-100} \
		ATTACHMENT_HISTORIES=$${ATTACHMENT_HISTORIES:-2000} TGT_HISTORIES=$${TGT_HISTORIES:-50} \
		CRASH_FAULTS=$${CRASH_FAULTS:-1000} KEEP_EXAMPLES=$${KEEP_EXAMPLES:-300} \
		ORIGIN_SEQUENCES=$${ORIGIN_SEQUENCES:-200} \
		API_FUZZ_SECONDS=$${API_FUZZ_SECONDS:-1260} LOAD_SECONDS=$${LOAD_SECONDS:-600} LOAD_CLIENTS=$${LOAD_CLIENTS:-100} \
		CACHE_SECONDS=$${CACHE_SECONDS:-600} CACHE_LIMIT_MIB=$${CACHE_LIMIT_MIB:-200} \
		$(RUN)/python -m pytest tests/crash tests/fs/test_connection_end.py tests/fs/test_reconciler.py \
		tests/fs/test_eviction.py tests/cache/test_faulty_origins.py -s \
		-o python_files="test_*.py physical_host.py lio_conformance.py rotten_boot.py" -o faulthandler_timeout=0 $(ARGS)

serve: venv ## run the appliance here, with its state in build/serve (root)
	@mkdir -p build/serve/state build/serve/run
	@STRATOCACHE_STATE_DIR=$(CURDIR)/build/serve/state STRATOCACHE_RUN_DIR=$(CURDIR)/build/serve/run \
		exec $(RUN)/stratocache serve

clean: ## remove what the other targets made
	@rm -rf --one-file-system build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf packaging/src/*.egg-info
