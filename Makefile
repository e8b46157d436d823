# Each target works as the only command after `git clone`: it makes .venv and installs what is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
export MPLBACKEND ?= Agg

.PHONY: help demo test docs readme bench lab constraints
help:   ## this list
	@grep -hE '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed 's/:.*## / — /; s/^/make /'

# The stamp comes last: an installation that broke off is not taken for a whole one. uv is quick; pip does without it.
$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv || true
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	touch $@

demo: $(READY)  ## train a ResNet-50 on drawn photos and predict with 50 crops, a few minutes on a CPU: runs/demo
	$(BIN)/resnet-fastai demo

test: $(READY)  ## notebooks and modules in step and clean, every notebook, pytest, the docs site
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/test.py

docs: $(READY)  ## the site, in _docs/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/docs.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/readme.py

bench: $(READY)  ## every script in benchmarks/
	@ls benchmarks/*.py >/dev/null 2>&1 || echo 'there are no benchmarks yet'
	@for f in benchmarks/*.py; do test -e "$$f" || continue; echo "$$f"; $(BIN)/python "$$f" || exit 1; done

lab: $(READY)  ## JupyterLab at the front page
	$(BIN)/jupyter lab nbs/index.ipynb

constraints: $(READY)  ## constraints.txt from what is installed
	$(BIN)/python -m uv pip freeze --python $(BIN)/python --exclude-editable | grep -v '^uv==' > constraints.txt
	touch $(READY)
