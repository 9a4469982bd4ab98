# The commands of this repository. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Steps that build would only wait for each other's lock.
.NOTPARALLEL:

# Whatever the caller's environment says: scripts look for the program here. (`make CARGO_TARGET_DIR=…` overrides it.)
export CARGO_TARGET_DIR := $(CURDIR)/target

SCRIPTS := hack/lib.sh hack/setup hack/build-tools hack/cluster hack/demo hack/bench hack/fuzz .ci/run

.PHONY: help
help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: build
build: ## The program, optimized: target/release/larder
	cargo build --release --locked

.PHONY: test
test: setup tools lint ## Everything: lint, unit, store, mount and API-server tests (root; minutes when the tools are built)
	cargo test --locked
	for road in paths copy; do LARDER_TEST_ROAD=$$road cargo test --locked --test mounts; done

.PHONY: lint
lint: setup tools ## Formatting, clippy, rustdoc, shellcheck, rendering of deploy/
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	shellcheck -x $(SCRIPTS)
	bin=$$(hack/build-tools) && KUBECONFIG=/dev/null KUBERC=off $$bin/kubectl kustomize deploy >/dev/null

.PHONY: demo
demo: setup ## larder at work in a cluster of its own; KEEP=1 leaves it running
	hack/demo $(if $(KEEP),--keep)

.PHONY: demo-stop
demo-stop: ## Ends what `make demo KEEP=1` left running
	hack/demo --stop

.PHONY: bench
bench: setup tools ## Times and memory against goals; ONLY=ready, store, layers or retention runs one part
	hack/bench $(ONLY)

.PHONY: soak
soak: setup tools ## The long forms of the tests, for the night
	LARDER_SOAK=1 cargo test --release --locked --no-fail-fast

.PHONY: fuzz
fuzz: ## Each fuzz target for SECONDS=60, or those of ONLY="size ref"
	hack/fuzz $(or $(SECONDS),60) $(ONLY)

.PHONY: crds
crds: ## Writes crds/ anew from the Rust types
	cargo run --quiet --locked -- crds --output crds

.PHONY: setup
setup: ## Installs the Debian packages that are missing, or says which
	@hack/setup

.PHONY: tools
tools: ## Builds etcd, kube-apiserver and kubectl, once
	@hack/build-tools >/dev/null

.PHONY: clean
clean: demo-stop ## Removes all that was built, the tools too
	cargo clean
	rm -rf .cache
