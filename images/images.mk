# The images' commands; part of the Makefile at the top, whose variables it uses.
.PHONY: images lock-images test-images image-tools

LOCKED_IMAGES := $(basename $(notdir $(wildcard images/requirements/*.in)))

images: setup ## container images, with whichever of docker and buildah works; ARGS="gateway --base debian"
	@$(BIN)/rankbridge images build $(ARGS)

lock-images: setup ## resolve images/requirements/*.in to the versions of requirements/project.txt, with hashes
	@for name in $(LOCKED_IMAGES); do \
	  echo "lock: images/requirements/$$name.in"; \
	  $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
	    images/requirements/$$name.in -o images/requirements/$$name.txt; done

test-images: setup ## build the gateway's image on a base made here, start it, push and pin it (root; about 3 minutes)
	@RANKBRIDGE_IMAGES=1 $(BIN)/pytest tests/images $(ARGS)

image-tools: ## Debian packages that build images without Docker (root)
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah mmdebstrap
