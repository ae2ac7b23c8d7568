# The foundation's commands; part of the Makefile at the top, whose variables it uses.
.PHONY: localstack localstack-install localstack-stop localstack-reset local-up local-down
.PHONY: infra-docs graph policy-venv preview-rules lock-infra infra-tools

EMULATOR := $(BIN)/python -m infra.emulator

localstack-install: setup ## LocalStack with its plugin into .tools/localstack (Python 3.13)
	@$(EMULATOR) install --uv $(UV)

localstack: localstack-install ## AWS on this machine, http://127.0.0.1:4566
	@$(EMULATOR) start

localstack-stop: ## end it
	@$(EMULATOR) stop

localstack-reset: ## empty it
	@$(EMULATOR) reset

local-up: localstack-install ## the foundation on LocalStack (needs the pulumi CLI)
	@$(EMULATOR) up

local-down: ## take it down again
	@$(EMULATOR) down

infra-docs: setup ## docs/fidelity.md, tables and picture from the declared resources
	@$(BIN)/python -W ignore -m infra.paper

graph: infra-docs ## docs/foundation.svg, the declared architecture

policy-venv: setup ## the policy pack's own environment: pulumi preview --policy-pack policy
	@test -x policy/.venv/bin/python || $(UV) venv --quiet --seed --python $(BIN)/python policy/.venv
	@$(UV) pip sync --quiet --require-hashes --python policy/.venv/bin/python requirements/policy.txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation --python policy/.venv/bin/python --editable .

preview-rules: setup ## judge a preview: pulumi preview --json --show-sames | make preview-rules
	@$(BIN)/python -m infra.rules.preview

lock-infra: setup ## resolve requirements/{localstack,policy}.in anew, with hashes
	@$(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	  $(if $(UPGRADE),--upgrade) requirements/policy.in -o requirements/policy.txt
	@$(UV) pip compile --quiet --generate-hashes --python-version 3.13 --no-header \
	  $(if $(UPGRADE),--upgrade) requirements/localstack.in -o requirements/localstack.txt

# cloud-init is wanted for its schema check only, and must never set this machine up.
infra-tools: ## Debian packages that the tests call: checkers, redis-server, strace, faketime (root; throw-away machines)
	@mkdir -p /etc/cloud && touch /etc/cloud/cloud-init.disabled
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  shellcheck nftables frr strongswan-swanctl charon-systemd libstrongswan-standard-plugins \
	  libcharon-extra-plugins cloud-init prometheus redis-server strace faketime

.PHONY: cluster-tools test-cluster

cluster-tools: setup ## kube-apiserver and the rest from their Go modules into .tools/controlplane (10 minutes, once)
	@$(BIN)/python -m infra.controlplane build

test-cluster: cluster-tools ## what is declared, on a real Kubernetes control plane; ARGS="-k name"
	@RANKBRIDGE_CLUSTER=1 $(BIN)/pytest tests/cluster $(ARGS)

.PHONY: test-sites

test-sites: setup ## two real tunnels between network namespaces, cut and healed (root); ARGS="-k name"
	@RANKBRIDGE_SITES=1 $(BIN)/pytest tests/sites $(ARGS)
