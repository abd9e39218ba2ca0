# Two commands do it all: `make run` and `make test`. `make` alone explains.
PYTHON  ?= python3
PROFILE ?= smoke
COHORT  ?=
JOBS    ?= 2
BIN     := .venv/bin
READY   := .venv/.installed
export PYTHONUNBUFFERED = 1

help:
	@echo "make run                  set up, draw the synthetic cohort, run every notebook (PROFILE=smoke or demo)"
	@echo "make run COHORT=my.csv    the same study on your slides"
	@echo "make test                 set up, run every test and compare every notebook's output"
	@echo "make lab                  open the notebooks in JupyterLab"
	@echo "make notebooks            run the notebooks and store their outputs in place (after a change)"
	@echo "make sweep NAME=...       run the missing points of sweeps/NAME.yaml and write results/NAME.csv"
	@echo "make lint                 check style"
	@echo "make clean                remove .venv and runs/cache (the cohort is drawn again)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pathfm needs Python 3.11 or newer; '$(PYTHON)' is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "python's venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing (some minutes the first time; PyTorch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: $(READY)
	@PATHFM_PROGRESS=1 $(BIN)/python -m pathfm cohort embedded > /dev/null
	@PATHFM_PROGRESS=1 $(BIN)/python -m pathfm run --profile '$(PROFILE)' --cohort '$(COHORT)'

# Figures made by tests stay out of figures/, which holds those of the recorded run.
test: $(READY)
	PATHFM_PROGRESS=1 $(BIN)/python -m pathfm cohort embedded > /dev/null
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile
	$(MAKE) nbval

nbval: $(READY)
	PATHFM_FIGURES=runs/nbval-figures OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.nbval_digits --nbval --nbval-current-env \
	  --nbval-cell-timeout=600 --nbval-sanitize-with tests/nbval.cfg notebooks -n $(JOBS) --dist loadfile

lab: $(READY)
	PATHFM_PROGRESS=1 $(BIN)/jupyter lab notebooks/00_quickstart.ipynb

notebooks: $(READY)
	$(BIN)/python -m pathfm store

sweep: $(READY)
	PATHFM_PROGRESS=1 $(BIN)/python -m pathfm sweep $(NAME)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs/cache

.PHONY: help setup run test nbval lab notebooks sweep lint clean
.DEFAULT_GOAL := help
