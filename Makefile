# make quickstart   install into .venv and run the main job on the built-in example
# make test         lint, types and tests, after installing what they need
# make lint         ruff, mypy, hadolint and shellcheck

PYTHON ?= python3
# Tests at a time; some start jobs of two processes themselves. WORKERS=0 runs them one after another.
WORKERS ?= 2
PYTEST_ARGS ?=

# What some tests need from Debian: command:package.
DEBIAN_TOOLS = slurmctld:slurm-wlm munged:munge shellcheck:shellcheck chromium:chromium

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test lint clean

quickstart: .venv/installed
	.venv/bin/python train_dpo.py --config ds_configs/zero2.json

test: .venv/installed-dev .venv/installed-debian lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	@if command -v nvidia-smi >/dev/null; then set -x; .venv/bin/python -m pytest -rs -m gpu; fi

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile
	@if command -v shellcheck >/dev/null; then set -x; shellcheck slurm/dpo.sh slurm/env.example.sh .ci/run; fi

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

# The stamps: nothing is installed again until a requirements file changes.
.venv/bin/python:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no venv module: on Debian, apt-get install python3-venv"; exit 1; }

.venv/installed: requirements.txt constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Only as root on Debian; elsewhere, or if this fails, the tests that need these tools skip and say so.
.venv/installed-debian: Makefile | .venv/bin/python
	@missing=; for tool in $(DEBIAN_TOOLS); do \
	    PATH="$$PATH:/usr/sbin" command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "apt-get install$$missing"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } \
	        >.venv/apt.log 2>&1 || { tail -n 5 .venv/apt.log; exit 0; }; \
	fi; touch $@
