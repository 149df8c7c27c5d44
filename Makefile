# `make help` lists what there is to do.
.DEFAULT_GOAL := help
.PHONY: help setup vm-setup demo vm-demo test test-vm ci lint protos lock bench clean
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(CURDIR)/node_modules/.bin:$(PATH):/usr/sbin:/sbin

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## install what taploom needs (Debian packages, .venv, buf); root
	@scripts/setup.sh

demo: setup ## run the whole fabric on this machine and show it working; root; KEEP=1 leaves it up
	@$(PYTHON) -m lab.demo $(if $(KEEP),--keep)

vm-setup: setup ## install what virtual machines need besides (QEMU, vhost-device-vsock, compilers); root
	@scripts/vm-setup.sh

vm-demo: vm-setup ## the fabric between virtual machines, shown working; builds kernel and images first; root; KEEP=1
	@$(PYTHON) -m lab.vm_demo $(if $(KEEP),--keep)

test: setup lint ## every test that needs no virtual machine; root
	@scripts/test.sh

test-vm: setup ## build kernel and images, verify the kernel, and run the tests over virtual machines; root; ARCH=arm64
	@scripts/test-vm$(if $(ARCH),-arch.sh $(ARCH),.sh)

ci: vm-setup ## all tests, as CI runs them: test and then test-vm, the kernel being built beside the first; root
	@scripts/ci.sh

lint: setup ## formatting, lint, types, the contracts (lint, breaking changes, generated code), generated documents
	ruff format --check .
	ruff check .
	mypy
	cd protos && buf lint && buf format --diff --exit-code
	@scripts/buf-breaking.sh
	$(PYTHON) tools/gen_protos.py --check
	PYTHONPATH=tests $(PYTHON) tests/conformance/differences.py --check

protos: setup ## generate taploom/contracts from protos/
	$(PYTHON) tools/gen_protos.py

lock: setup ## resolve requirements.lock and package-lock.json anew
	pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
		--no-emit-find-links --no-emit-options --no-header --extra guest,helper,bridge,lab,dev \
		--output-file requirements.lock pyproject.toml
	npm install --package-lock-only --no-audit --no-fund

bench: setup ## measure against veth, gvproxy and Docker in one run; root; BENCH=--quick for a short one, --vm for VMs
	@bench/setup.sh
	@$(if $(findstring --vm,$(BENCH)),scripts/vm-setup.sh,:)
	@$(PYTHON) -m bench $(BENCH)
	@$(if $(findstring --vm,$(BENCH)),:,$(PYTHON) -m bench.policy $(filter --quick,$(BENCH)))

clean: ## remove what was built and installed in this checkout
	rm -rf .venv node_modules build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
