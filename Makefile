PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test quality clean
# `make quality demo test` runs in this order, whatever MAKEFLAGS says.
.NOTPARALLEL:

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,quality]"
	@touch $@

# Combinations that the bundled checkpoint has not seen in training.
demo: $(INSTALLED)
	@mkdir -p out
	$(BIN)/moviegen generate "a yellow square moves up on a black background" -o out/demo.mp4 --force
	$(BIN)/moviegen generate "a yellow star on a brown background" -o out/demo.png --force

# One thread a worker: two workers with a thread pool each would fight over the cores.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .ruff_cache
