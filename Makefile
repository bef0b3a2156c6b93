# `make help` lists the targets. Everything is installed into .venv; nothing needs root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/demo

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
unexport PYTHONDONTWRITEBYTECODE # pytest keeps the assertions that it rewrites: 4 s a worker

# A worker takes a file's tests in a row, for the fixtures that they share; an idle one, of another's.
TWO := --numprocesses=2 --dist=worksteal
QUICK := not full_size and not processes and not training \
    and not interchange and not exhaustive

PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo check quick test test-faults interchange theory docs bench lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-dev ## make .venv with everything that development needs

# Captions that the embedded model was trained on, in four languages, and four that it was not.
demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.installed ## draw "a cat" and a grid of sixteen prompts with the embedded model
	@rm -rf $(DEMO)
	$(BIN)/latentdiff generate "a cat" --model emoji --steps 50 --seed 0 --out $(DEMO)/a-cat
	$(BIN)/latentdiff generate "a cat, 3D style" "a rose, black and white" "猫" \
	    "pizza, 3D style" "rocket, bold style" "guitar, bold style" "sunflower, shaded style" \
	    "éléphant" "ein Haus, 3D-Stil" "足球" "un corazón rojo" "penguin, black and white" \
	    "a happy cat" "two red hearts" "红色的车" "a birthday cake with candles" \
	    --model emoji --steps 50 --seed 0 --out $(DEMO)/grid --grid
	@echo
	@echo "The images:"
	@printf '  %s\n' "$(CURDIR)/$(DEMO)"/a-cat/*.png "$(CURDIR)/$(DEMO)/grid/grid.png"

check: $(VENV)/.installed-dev ## style, types, architecture and the quick tests
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target quick lint types

quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "$(QUICK)" $(TWO)

test: lint types ## every check and every test but those of test-faults
	$(BIN)/python -m pytest -q -m "not faults" --durations=10 $(TWO)

test-faults: $(VENV)/.installed-dev ## kill, stop and starve real training runs in every way
	$(BIN)/python -m pytest -q --durations=10 tests/test_faults.py tests/test_faults_within.py

interchange: $(VENV)/.installed-dev ## measure every file format against other tools, into docs/interchange.md
	$(BIN)/python -m pytest -q --interchange_table docs/interchange.md tests/test_interchange.py \
	    tests/test_full_size.py tests/test_single_file.py tests/test_single_file_reading.py \
	    tests/test_open_clip.py tests/test_lora.py tests/test_a1111.py tests/test_editing.py \
	    tests/test_convert.py tests/test_inpainting_training.py

theory: $(VENV)/.installed-dev ## run the experiments of docs/theory: figures, numbers, links
	MPLBACKEND=Agg $(BIN)/python docs/theory/figures.py

# Strict: a broken link, a missing image or a notebook's error ends it.
docs: $(VENV)/.installed-dev ## build the pages of docs/ into site/, with its notebooks run
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "Open $(CURDIR)/site/index.html"

bench: $(VENV)/.installed-dev ## how fast, beside the peers and the last figures; half an hour, alone
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py all --compare benchmarks/speed.json

lint: $(VENV)/.installed-dev ## style and formatting; tests/test_architecture.py has the imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev ## the type checker
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean: ## remove .venv, caches and build products; runs and outputs stay
	rm -rf $(VENV) build dist site .import_linter_cache .pytest_cache .ruff_cache

# A stamp is written last, so that an interrupted install is taken up again. The stamps depend on
# what decides an install, so that nothing is installed twice and a changed pin is installed once.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "latentdiff needs Python 3.11 or newer, and '$(PYTHON)' is none:" \
	        "name one, as in 'make demo PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: on Debian and Ubuntu, install the" \
	        "package python3-venv (as root: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing latentdiff into $(VENV): some minutes, 5 GB with torch's CUDA libraries ..."
	@$(PIP_INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing latentdiff and its development tools into $(VENV): some minutes, 5 GB ..."
	@$(PIP_INSTALL) '.[dev]'
	@touch $(VENV)/.installed $@
