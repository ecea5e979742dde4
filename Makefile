SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that runs and for which TensorFlow has wheels.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# uv takes a third of pip's time, but does not read pip's settings: where they name another index, pip does it.
install = $(BIN)/uv pip install --quiet --compile-bytecode --python $(1)/bin/python --require-hashes -r $(2) || \
	$(1)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $(2)

$(READY): requirements/uv.txt requirements/dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Temper needs Python 3.11, 3.12 or 3.13 (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(call install,$(VENV),requirements/dev.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(READY) ## Create .venv from the lock file (a minute or two, 3.5 GB)

demo: $(READY) ## Fine-tune on real digits and predict, from start to finish
	$(BIN)/python demo.py

serve: $(READY) ## Run the service on http://127.0.0.1:8080
	$(BIN)/temper serve

# Each of the two has a service of its own, and runs whole files.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
test: $(READY) ## Run the tests (MARKED='not exhaustive' for the slow ones, too)
	$(BIN)/pytest $(TWO) $(if $(MARKED),-m '$(MARKED)')

test-slow: $(READY) ## Run the tests that kill and freeze processes, or train for long
	$(BIN)/pytest -m 'slow and not exhaustive' $(TWO)

test-exhaustive: $(READY) ## Run the tests that CI has no time for: kills in every stage, thousands of histories
	$(BIN)/pytest -m exhaustive $(TWO)

test-contract: $(READY) ## Run the contract suite against the embedded server or TEMPER_TFS_BINARY
	$(BIN)/pytest tests/contract

test-gpu: $(READY) ## Run the trainer's tests and a training benchmark on a GPU
	$(BIN)/python -m tests.gpu

test-art: $(READY) ## Compare the attacks with the Adversarial Robustness Toolbox's, in an environment of its own
	$(PYTHON) -m venv $(VENV)-art
	$(call install,$(VENV)-art,requirements/art.txt)
	$(VENV)-art/bin/python -m pytest tests/trainer/test_art.py

test-onnx: $(READY) ## Convert versions to ONNX and run them, in an environment of its own
	$(PYTHON) -m venv $(VENV)-onnx
	$(call install,$(VENV)-onnx,requirements/onnx.txt)
	$(VENV)-onnx/bin/python -m pytest tests/trainer/test_convert.py

SECONDS ?= 600
torture: $(READY) ## Kill and freeze the processes of a service for SECONDS=600, and check that nothing is lost
	$(BIN)/python -m tests.torture --seconds $(SECONDS)

SECURITY := $(VENV)-security
$(SECURITY)/.installed: requirements/security.txt | $(READY)
	$(PYTHON) -m venv $(SECURITY)
	$(call install,$(SECURITY),$<)
	@touch $@

CASES ?= 1000
fuzz: $(READY) $(SECURITY)/.installed ## Try the whole API with made-up requests (CASES=1000, LIMIT= seconds, SEED=1)
	$(BIN)/python -m tests.fuzz --tool $(SECURITY)/bin/schemathesis --cases $(CASES) \
		$(if $(LIMIT),--seconds $(LIMIT)) $(if $(SEED),--seed $(SEED))

bandit: $(SECURITY)/.installed ## Look for insecure code
	$(SECURITY)/bin/bandit --quiet --configfile pyproject.toml --recursive api cli serving store temper trainer

audit: bandit ## Look for insecure code, and for known vulnerabilities of what is installed (needs a network)
	$(SECURITY)/bin/python -m tests.audit

lint: $(READY) ## Check style, types and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

deploy-check: $(READY) ## Check the Dockerfile, the manifests, the alerts and the dashboard
	$(BIN)/hadolint Dockerfile
	$(BIN)/pytest tests/deploy

TARGETS ?= gateway model-server trainer
images: $(READY) ## Build the images without Docker, run and measure them (Debian, root; TARGETS=gateway)
	$(BIN)/python -m deploy.images build $(TARGETS:%=--target %)

load: $(READY) ## Load a service of its own for half a minute, and judge it (docs/load.md)
	$(BIN)/python -m load

bench: $(READY) ## Run the benchmarks and write docs/benchmarks.md (half an hour; apt-get install wrk)
	$(BIN)/python -m load.bench

docs: $(READY) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

reference: $(READY) ## Write docs/reference anew, from the code
	$(BIN)/python -m docs.generate

quality: $(READY) ## Measure the recipes on MNIST, Fashion-MNIST and digits (takes hours; resumes where it stopped)
	$(BIN)/python -m quality

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
LOCK := $(COMPILE) pyproject.toml
GATEWAY := --extra postgres --extra s3 --extra otel
DEV := $(GATEWAY) --extra ray --extra trainer --extra bench --extra dev
lock: $(READY) ## Update the lock files
	rm -f requirements/*.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt
	$(LOCK) $(GATEWAY) -o requirements/gateway.txt
	$(LOCK) -c requirements/gateway.txt $(GATEWAY) --extra ray --extra trainer -o requirements/trainer.txt
	$(LOCK) -c requirements/trainer.txt $(GATEWAY) --extra ray --extra gpu -o requirements/gpu.txt
	$(LOCK) -c requirements/trainer.txt $(DEV) -o requirements/dev.txt
	for extra in art onnx; do { echo "-r dev.txt"; $(LOCK) -c requirements/dev.txt $(DEV) --extra $$extra \
		$$(sed -nE 's/^([a-z0-9._-]+)==.*/--no-emit-package \1/p' requirements/dev.txt); } > requirements/$$extra.txt; done
	$(LOCK) -c requirements/gateway.txt --extra security -o requirements/security.txt

pb: $(READY) ## Regenerate serving/pb from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=serving/pb --pyi_out=serving/pb proto/model_server.proto

.PHONY: help setup demo serve test test-slow test-exhaustive test-art test-onnx test-contract test-gpu torture fuzz bandit audit lint deploy-check images load bench docs reference quality lock pb
