# make setup   .venv with everything in it        make test    lint, types, tests
# make serve   a real model answering on HOST:PORT make bench   the benchmarks
# make soak    minutes of mixed traffic             make test-slow, test-browser, test-animate
#
# TORCH names the build of PyTorch; PIP_ARGS goes to every pip install (say --index-url or
# --extra-index-url where the CPU builds are elsewhere than the default index).
PYTHON   ?= python3
TORCH    ?= torch==2.13.0
PIP_ARGS ?=
HOST     ?= 127.0.0.1
PORT     ?= 8000
MODEL    ?= smollm2
ARGS     ?=
BENCH    ?= batching grouping throughput latency prefix books

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.astrai-setup
DEV   := $(VENV)/.astrai-dev

.PHONY: setup serve test test-slow animate-setup test-animate browser-setup test-browser soak bench gpu-check format clean

setup: $(STAMP)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that nothing after it can choose another build.
$(STAMP): pyproject.toml Makefile | $(BIN)/pip
	$(BIN)/python -m pip install $(PIP_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[serve]'
	@touch $@

# What only the tests need.
$(DEV): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[serve,dev]'
	@touch $@

serve: setup
	$(BIN)/astrai pull '$(MODEL)'
	$(BIN)/astrai serve --model '$(MODEL)' --host '$(HOST)' --port '$(PORT)' $(ARGS)

test: $(DEV)
	$(BIN)/ruff check astrai tests bench
	$(BIN)/ruff format --check astrai tests bench
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

# Manim draws text with Cairo and Pango, whose headers are Debian's; without the right to install
# them this prints the one command that does.
ANIMATE_PACKAGES := libcairo2-dev libpango1.0-dev pkg-config

animate-setup: $(DEV)
	@pkg-config --exists cairo pangocairo 2>/dev/null || \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q $(ANIMATE_PACKAGES); \
	  else echo "first: sudo apt-get install $(ANIMATE_PACKAGES)"; exit 1; fi
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[animate]'

test-animate: animate-setup
	$(BIN)/python -m pytest -m animate tests/animate $(ARGS)

# The live page in Debian's Chromium, driven by Playwright.
browser-setup: $(DEV)
	@command -v chromium >/dev/null || \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q chromium; \
	  else echo "first: sudo apt-get install chromium"; exit 1; fi
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[browser]'

test-browser: browser-setup
	$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

bench: setup
	for name in $(BENCH); do $(BIN)/astrai bench $$name $(ARGS) || exit 1; done

soak: $(DEV)
	$(BIN)/python bench/soak.py $(ARGS)

# On a machine with a GPU and its own build of PyTorch and Triton: no .venv.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix astrai tests bench
	$(BIN)/ruff format astrai tests bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find astrai tests -name __pycache__ -type d -prune -exec rm -rf {} +
