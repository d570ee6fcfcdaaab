# Two commands are the contract: `make demo` and `make test`. Both install what they need into .venv first.
.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench chaos slurm-demo golden clean
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 1)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt .ci/install.sh
	@.ci/install.sh

install: .venv/.installed ## Install everything into .venv (Debian packages for ffcv included)

demo: .venv/.installed ## Install, train OBoW on the embedded data set, evaluate it, say how to browse it
	@$(BIN)/obowlab run demo
	@echo; echo "Browse it:  $(BIN)/obowlab ui      List it:  $(BIN)/obowlab runs list"

test: .venv/.installed ## Install, then run every test
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(CORES) --dist loadscope $(PYTEST)

lint: .venv/.installed ## Check style, types and the direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: .venv/.installed ## Format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: .venv/.installed ## Print the benchmarks, side by side (PHOTOS=an ImageFolder of full-size photos, or a .tar of one)
	@PHOTOS='$(PHOTOS)' $(BIN)/python tests/benchmarks/run.py

slurm-demo: .venv/.installed ## The demo on a real two-node Slurm, requeued, preempted, a node killed (SLURM_CONF or SLURM_TOOLS=DIR; root)
	@$(BIN)/python -m tests.slurm_demo $(if $(SLURM_TOOLS),--tools $(SLURM_TOOLS)) $(ARGS)

FAULTS ?= 200
SEED ?= 0
chaos: .venv/.installed ## Inject faults and judge what is lost (FAULTS=200 SEED=0); stopped and typed again, it goes on
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

golden: .venv/.installed ## Write the golden files again; look at the diff before you commit it
	@OBOWLAB_WRITE_GOLDEN=1 $(BIN)/pytest tests/test_recipes.py tests/test_cli.py

clean: ## Remove .venv and caches; runs and data stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
