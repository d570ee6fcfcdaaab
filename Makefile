# Two commands are the contract: `make demo` and `make test`. Both install what they need into .venv first.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-optimized test-gpu gpu-check lint format lock licences sbom mutants bench chaos slurm-demo golden clean secrets images pin backup restore services
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 1)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# Each part contains the ones before it: demo, train, test, dev. Only what is missing is installed.
.venv/.installed-%: pyproject.toml constraints.txt $(wildcard .ci/locks/*.txt) .ci/install.sh
	@.ci/install.sh $*

install: .venv/.installed-train ## Install what training needs into .venv (ffcv and its Debian packages included)

demo: .venv/.installed-demo ## Install, train OBoW on the embedded data set, evaluate it, say how to browse it
	@$(BIN)/obowlab run demo
	@echo; echo "Browse it:  $(BIN)/obowlab ui      List it:  $(BIN)/obowlab runs list"

PYTEST_ALL = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(CORES) --dist loadscope --no-loadscope-reorder
test: .venv/.installed-test ## Install, then run the tests (HIDE=postgresql,chromium: as on a machine without them)
	@OBOWLAB_TEST_HIDE='$(HIDE)' $(PYTEST_ALL) $(PYTEST)

test-all: .venv/.installed-test ## The tests, with all rounds of the slow ones
	@OBOWLAB_TEST_ALL=1 $(PYTEST_ALL) $(PYTEST)

test-optimized: .venv/.installed-test ## The tests, on the package as PYTHONOPTIMIZE=1 makes it: without its asserts
	@OBOWLAB_TEST_OPTIMIZE=1 $(PYTEST_ALL) $(PYTEST)

test-gpu: .venv/.installed-test ## The tests that need an NVIDIA GPU, which `make test` hides
	@OBOWLAB_TEST_GPU=1 $(BIN)/pytest -m gpu $(PYTEST)

# Installs nothing, so that it runs on a machine without network: packages that it lacks may lie in .gpu-kit/site (docs/gpu.md).
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
KIT := $(wildcard $(CURDIR)/.gpu-kit/site)
gpu-check: ## One table of what is right and how fast on this GPU; installs nothing (OUT=folder, ARGS="--only step render")
	@PYTHONPATH="$(CURDIR)$(KIT:%=:%)$${PYTHONPATH:+:$$PYTHONPATH}" OUT='$(OUT)' $(PYTHON) -m tests.gpu.check $(ARGS)

lint: .venv/.installed-dev ## Check style, types and the direction of imports
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports \
	    && $(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml && $(BIN)/hadolint Dockerfile

format: .venv/.installed-dev ## Format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: .venv/.installed-dev ## Write .ci/locks/ again: every package, with hashes (UPGRADE=1: the newest that constraints.txt allows)
	@UPGRADE='$(UPGRADE)' .ci/lock.sh

licences: .venv/.installed-dev ## List the licence of every package that is installed in .venv (ARGS=--format=markdown)
	@$(BIN)/pip-licenses --from=mixed --order=license --with-system $(ARGS)

sbom: .venv/.installed-dev ## Write sbom.json: what is installed in .venv, as a CycloneDX bill of materials
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file sbom.json --output-reproducible .venv/bin/python
	@echo "sbom.json lists $$(grep -c '"purl"' sbom.json) packages"

mutants: .venv/.installed-dev ## Change the pure modules bit by bit and count which changes the tests notice (MUTATE="bow views", all by default)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTATE)

bench: .venv/.installed-test ## Print the benchmarks, side by side (PHOTOS=an ImageFolder of full-size photos, or a .tar of one; STORE=a full run store)
	@PHOTOS='$(PHOTOS)' STORE='$(STORE)' $(BIN)/python tests/benchmarks/run.py

slurm-demo: .venv/.installed-test ## The demo on a real two-node Slurm, requeued, preempted, a node killed (SLURM_CONF or SLURM_TOOLS=DIR; root)
	@$(BIN)/python -m tests.slurm_demo $(if $(SLURM_TOOLS),--tools $(SLURM_TOOLS)) $(ARGS)

FAULTS ?= 200
SEED ?= 0
chaos: .venv/.installed-test ## Inject faults and judge what is lost (FAULTS=200 SEED=0); stopped and typed again, it goes on
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

golden: .venv/.installed-test ## Write the golden files again; look at the diff before you commit it
	@OBOWLAB_WRITE_GOLDEN=1 $(BIN)/pytest tests/test_recipes.py tests/test_cli.py tests/test_report_values.py

secrets: ## Write .env for docker-compose.yml: settings and random passwords; what is there already stays
	@python3 dashboards/services/write_env.py .env.example .env

images: ## Build the images of docker-compose.yml; runs made in them say which commit it was
	@COMMIT="$$(git describe --always --abbrev=40 --dirty)" docker compose --profile worker build

pin: ## Pin what docker-compose.yml pulls by content: the digests of the images that this machine has
	@docker compose pull --quiet database objects web
	@sed -nE 's/^ *image: ((postgres|chrislusf|caddy)[^@ ]*).*/\1/p' docker-compose.yml | while read -r image; do \
	    digest="$$(docker image inspect --format '{{index .RepoDigests 0}}' "$$image" | sed 's/.*@//')" && test -n "$$digest" \
	    && sed -i -E "s|(image: $$image)(@sha256:[0-9a-f]*)?$$|\1@$$digest|" docker-compose.yml && echo "$$image@$$digest"; done

BACKUP_AS = mkdir -p backups && BACKUP_USER="$$(id -u):$$(id -g)" docker compose run --rm
backup: ## Save the services' databases and objects to backups/ (WITH=--runs=/lab/runs: runs too)
	@$(BACKUP_AS) backup save /backups $(WITH)

restore: ## Put a backup back: make restore FROM=backups/obowlab-... (WITH=--runs=/lab/runs: runs too)
	@test -n "$(FROM)" || { echo "Say which: make restore FROM=backups/obowlab-..." >&2; exit 2; }
	@docker compose stop web studies mlflow reporter
	@$(BACKUP_AS) restore restore "/backups/$(notdir $(FROM:/=))" $(WITH)
	@docker compose up --detach

services: .venv/.installed-test ## Run the same services without Docker, on this machine, until Ctrl-C (TO=folder)
	@$(BIN)/python -m tests.services $(or $(TO),services)

clean: ## Remove .venv and caches; runs and data stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
