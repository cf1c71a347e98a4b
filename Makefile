# Every target makes its own .venv from setup.cfg; all that the machine needs is Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks convert_flux_weights.py

.PHONY: demo test style quality benchmark clean

# The stamp is newer than setup.cfg when the environment is up to date.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev,demo]"
	touch $@

demo: $(VENV)/.installed ## reconstruct a real video with the bundled model, into out/
	$(BIN)/vcvae demo --out out

# One thread a process: two processes whose threads wait for each other are far slower than either alone.
test: $(VENV)/.installed ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

style: $(VENV)/.installed ## format and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

quality: $(VENV)/.installed ## check format and lint
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

benchmark: $(VENV)/.installed ## speed against diffusers' video VAEs, on an idle machine
	$(BIN)/python benchmarks/vae_speed.py

clean:
	rm -rf $(VENV) out build dist src/*.egg-info .pytest_cache .ruff_cache
