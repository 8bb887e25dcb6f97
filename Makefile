# setup   the environment in .venv, from pinned versions
# demo    the main job on real data: report in runs/demo/report.html; DEMO="--steps 400" adds options
# test    the tests: CPU, offline
# check   lint, format, types, architecture
# docs    the documentation site in build/site; a broken link is an error
# engines the tests of several processes, with DeepSpeed, which it installs
# kills   20 runs killed at random moments end with the same weights; minutes
# wheel   wheel and source archive in dist
# fresh   the wheel, from the source archive, alone in an environment of its own in build/fresh: the demo runs there
# notebook  the example notebook run, and its outputs written into it
# lmms-eval  an environment with lmms-eval in build/lmms, and the plug-in's test in it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LMMS := build/lmms
export HF_HUB_OFFLINE := 1
# Containers often set it; then every process that a test or a launch starts compiles some 4,000 modules for itself, 15 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check docs engines kills lmms-eval wheel fresh notebook clean

setup: $(READY)

# torch first: a looser requirement of another package would pull another build of it. Modules are compiled when they
# are first imported, and kept so: most never are.
$(READY): requirements/constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $$(grep '^torch==' requirements/constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c requirements/constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/align-ti demo --out runs/demo $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 40

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# DeepSpeed is built against the torch that is there, without its own kernels.
engines: $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements/constraints.txt -e '.[deepspeed]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_engines.py tests/test_engine_runs.py

kills: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills

# lmms-eval pulls torchvision, whose build on the index is for CUDA: beside torch for CPUs it cannot be imported, and transformers tries to.
$(LMMS)/.ready: requirements/lmms.txt requirements/constraints.txt pyproject.toml
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements/constraints.txt)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -r requirements/lmms.txt -e .
	$(LMMS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

lmms-eval: $(LMMS)/.ready
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest tests/test_lmms_eval.py

# The wheel is built from the source archive, so that both are whole.
wheel: $(READY)
	$(BIN)/python -m build --no-isolation

# As `pip install align-ti` for a user: no extras, nothing of the repository in reach.
fresh: $(READY)
	rm -rf build/fresh
	$(BIN)/python -m build --no-isolation --outdir build/fresh/dist
	$(PYTHON) -m venv build/fresh/venv
	build/fresh/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $$(grep '^torch==' requirements/constraints.txt)
	build/fresh/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c requirements/constraints.txt build/fresh/dist/*.whl
	cd build/fresh && env -u PYTHONPATH venv/bin/align-ti demo --out demo --steps 4

notebook: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.notebook examples/digits.ipynb

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
