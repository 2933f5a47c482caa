# Everything here runs on a bare machine: Python >= 3.9 with venv, git and make. Virtual environments
# live under build/. `make help` lists the commands.

PYTHON ?= python3
# What pip installs as torch, e.g. TORCH=torch for the newest, TORCH='torch==2.8.*' for an older one.
TORCH ?= torch==2.13.0
# Processes of the test run; each runs torch on one thread.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	if [ $$cores -gt 8 ]; then echo 8; else echo $$cores; fi)
# What clang-format looks after.
CPP = $(shell find csrc tests -name '*.cuh' -o -name '*.h' -o -name '*.cpp')
# More arguments for pytest, e.g. ARGS='-k causal'.
ARGS ?=

VENV := build/venv
DEMO := build/demo-venv
BIN := $(VENV)/bin
FACTORY := build/factory
# The image of `make wheels-container`: empty for the one of pyproject.toml, or bullseye.
IMAGE ?=

.PHONY: help demo test test-gpu lint format bench factory wheels-container clean FORCE
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18
	@echo
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) JOBS=$(JOBS) ARGS=$(ARGS)"

demo: ## install as a user would, run the quickstart and compare with standard attention
	rm -rf $(DEMO) build/lib build/bdist.*
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --upgrade pip
	$(DEMO)/bin/python -m pip install '$(TORCH)'
	$(DEMO)/bin/python -m pip install . matplotlib rich
	$(DEMO)/bin/python benchmarks/demo.py --plot build/demo.png

# By file, as what the fixtures of one make is made once; in their order, long ones first.
test: $(VENV)/.test ## run every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: $(VENV)/.test ## run the tests that need a GPU (see TORCH)
	@$(BIN)/python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
		{ echo "make test-gpu: torch sees no GPU here; on a GPU machine, TORCH=torch" >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu $(ARGS)
	FLASH_ATTN_BACKEND=triton $(BIN)/python -m pytest -m gpu tests/test_triton.py tests/test_flash_attention_plus.py

lint: $(VENV)/.lint ## check format, style, types, spelling and rendered tables
	@status=0; \
	for step in 'ruff check .' 'ruff format --check .' mypy typos \
			'shellcheck .ci/run tools/bullseye_image.sh tools/wheels_container.sh' \
			'zizmor --offline --quiet .github/workflows' actionlint \
			'python tools/render_docs.py --check'; do \
		if [ "$$step" = actionlint ] && [ ! -e $(BIN)/actionlint ]; then \
			echo 'actionlint: skipped, it could not be installed here'; continue; \
		fi; \
		echo "$$step"; \
		$(BIN)/$$step || status=1; \
	done; \
	echo clang-format; \
	$(BIN)/clang-format --dry-run -Werror $(CPP) || status=1; \
	exit $$status

format: $(VENV)/.lint ## rewrite sources and rendered tables in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/python tools/render_docs.py

bench: $(VENV)/.test ## measure this machine and add the result to benchmarks/
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python tools/render_docs.py

factory: $(FACTORY)/.done ## the environment that makes wheels, build/factory

wheels-container: $(FACTORY)/.done ## the universal wheel by cibuildwheel (docs/releasing.md)
	tools/wheels_container.sh $(FACTORY)/bin/python $(IMAGE)

clean: ## remove everything that was built
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A step is done when its stamp stands. Stamps live in the environment they speak of, and making the
# environment anew starts by removing it, so an install that failed is never taken for a good one.
$(VENV)/.torch: build/settings
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install '$(TORCH)'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python -m pip install --quiet --group actionlint || true
	@touch $@

$(FACTORY)/.done: pyproject.toml
	rm -rf $(FACTORY)
	$(PYTHON) -m venv $(FACTORY)
	$(FACTORY)/bin/python -m pip install --upgrade pip
	$(FACTORY)/bin/python -m pip install --group wheels
	@touch $@

# Rewritten only when a setting differs from the last run, so that only then it is newer.
build/settings: FORCE
	@mkdir -p build
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH)' > $@
