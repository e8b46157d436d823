# Each target works as the only command after `git clone`: it makes .venv and installs what is missing.
PYTHON ?= python3
BIN := .venv/bin
INPUTS := settings.ini setup.py pyproject.toml constraints.txt
READY := .venv/.installed-$(shell cat $(INPUTS) | cksum | cut -d' ' -f1)

.PHONY: help demo test docs readme bench gpu lab constraints
help:   ## this list
	@grep -hE '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed 's/:.*## / — /; s/^/make /'

# The stamp is named after what was asked for and comes last: an installation that broke off is not taken for a whole one.
# uv is quick; pip does without it.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.11 …")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/.installed*
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q uv || echo 'no uv; pip takes a little longer'
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	@touch $@

demo test docs readme bench gpu: export MPLBACKEND = Agg
demo test docs readme bench gpu: export PATH := $(CURDIR)/$(BIN):$(PATH)

demo: $(READY)  ## train a ResNet-50 on drawn photos and predict with 50 crops, a few minutes on a CPU: runs/demo
	$(BIN)/resnet-fastai demo

test: $(READY)  ## notebooks and modules in step and clean, every notebook, pytest, the docs site
	$(BIN)/python tools/test.py

docs: $(READY)  ## the site, in _docs/
	$(BIN)/python tools/docs.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

bench: $(READY)  ## every script in benchmarks/
	@for f in $(filter-out %/common.py %/gpu.py,$(wildcard benchmarks/*.py)); do echo "$$f"; $(BIN)/python "$$f" || exit 1; done

gpu: $(READY)  ## all that needs a GPU: checks, rates, CIFAR-10 (CIFAR=its folder) for an hour or MINUTES=…; again goes on: runs/gpu
	$(BIN)/python benchmarks/gpu.py --minutes $(or $(MINUTES),60) $(if $(CIFAR),--cifar $(CIFAR))

lab: $(READY)  ## JupyterLab at the front page
	$(BIN)/jupyter lab nbs/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

constraints: $(READY)  ## constraints.txt anew: today's versions of everything
	$(BIN)/python -m uv pip compile -q --upgrade --universal --python-version 3.10 --extra dev --no-annotate \
	  --custom-compile-command 'make constraints' -o constraints.txt setup.py
