# gatednb: `make` lists what can be done. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SITE   := _build/html
TOO_OLD = "gatednb needs Python 3.11 or newer; this is %d.%d. Name another one: make PYTHON=python3.12"
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help env export site picture book test bench clean

help:           ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

env:            ## make .venv and install into it, if it is missing or out of date
	@wanted=$$(cat settings.ini setup.py pyproject.toml constraints.txt | cksum); \
	if [ "$$(cat $(VENV)/installed.cksum 2>/dev/null)" = "$$wanted" ]; then exit 0; fi; set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(TOO_OLD) % sys.version_info[:2])'; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No $(VENV) could be made. On Debian: apt install python3-venv"; exit 1; }; \
	fi; \
	echo "Installing what settings.ini and constraints.txt ask for into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	echo "$$wanted" > $(VENV)/installed.cksum

export: env     ## write gatednb/*.py from the notebooks, and clean the notebooks
	@nbdev_export && nbdev_clean

site: env       ## run every chapter that changed and build the site, warnings as errors
	@python -m gatednb.book execute
	@jupyter-book build . -W -n --keep-going --quiet || { rm -rf _build/.doctrees; exit 1; }

picture: env    ## draw the README's picture again
	@python -c 'from pathlib import Path; from gatednb.plots import front_picture; Path("nbs/_static/gates.svg").write_text(front_picture(), encoding="utf-8")'

book: export    ## export, run what changed, build the site; says where to open it
	@$(MAKE) --no-print-directory site
	@echo "The book is built. Open file://$(CURDIR)/$(SITE)/index.html"

test: site      ## everything that must hold; leaves the working tree as it is
	@python -m pytest

bench: env      ## measure time and memory beside PyTorch and other libraries; writes benchmarks/cpu.json
	@gatednb bench

clean:          ## remove what was built (but not .venv)
	rm -rf _build build dist *.egg-info .pytest_cache .hypothesis
