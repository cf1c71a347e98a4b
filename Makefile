# Every target makes its own .venv from setup.cfg; all that the machine needs is Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks integrations docs/hooks.py convert_flux_weights.py

.PHONY: demo test test-isa style quality package audit soak docs benchmark clean

# The stamp is newer than setup.cfg when the environment is up to date.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev,demo]"
	touch $@

demo: $(VENV)/.installed ## reconstruct a real video with the bundled model, into out/
	$(BIN)/vcvae demo --out out --overwrite
	@echo 'See out/picture.png. Then ". $(BIN)/activate" and "vcvae app", or "vcvae reconstruct YOURS.mp4 OUT.mp4 --compare BOTH.mp4".'

# One thread a process: two processes whose threads wait for each other are far slower than either alone.
test: $(VENV)/.installed ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What ATen and oneDNN choose depends on the processor's instructions: the operators' tests with fewer of them than this one has.
ISA_TESTS := tests/operators tests/autoencoder/test_dtypes.py --quiet --numprocesses auto --maxprocesses 4 --dist loadfile
test-isa: $(VENV)/.installed ## run the tests of operators as older processors would
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest $(ISA_TESTS)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(ISA_TESTS)

style: $(VENV)/.installed ## format and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

quality: $(VENV)/.installed ## check format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

package: $(VENV)/.installed ## build sdist and wheel, install the wheel without extras in a fresh environment and use it
	OMP_NUM_THREADS=1 $(BIN)/python tests/try_package.py

audit: $(VENV)/.installed ## known holes in the packages of the environment
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

# What takes minutes, of random cases with seeds; MINUTES bounds each program.
MINUTES ?= 5
soak: $(VENV)/.installed ## hostile files and command lines, kills, signals, full disks, random models, long videos, many visitors (docs/reliability.md)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/hostile_files.py --cases 100000 --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/hostile_words.py --cases 100000 --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py --kills 200 --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py --kills 30 --seconds $$((60 * $(MINUTES))) --long
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/signals.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/disk.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/memory.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/moving_files.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/numerics.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/mutants.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/streams.py --seconds $$((60 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/long_video.py --frames $$((4000 * $(MINUTES)))
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/app_load.py --requests $$((100 * $(MINUTES)))

docs: $(VENV)/.installed ## build the site of docs/ into build/site, links checked
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

benchmark: $(VENV)/.installed ## speed against diffusers' video VAEs, on an idle machine
	$(BIN)/python benchmarks/vae_speed.py

clean:
	rm -rf $(VENV) out build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
