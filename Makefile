# make demo    set up, compress the default model three ways, compare, write out/report.html
# make test    set up, run every test
# make check   set up, lint, format check, types
# make sanitize   compile the kernels with sanitizers and run them over ragged shapes
# make bench   set up, run the measurements of bench/ beside peers and of the engine
# make bench-roles   set up, run every layer-wise preset on the default model: one table
# make bench-learning   set up, run the presets that learn beside what they improve on: one table
#
# PYTHON chooses the interpreter of the virtual environment. Arguments for the installation of torch
# (a CPU-only index, for example) go into TORCH_ARGS.

PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
READY := .venv/.done

.PHONY: setup demo test check bench bench-roles bench-learning sanitize clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python bench/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize:
	for kind in address,undefined thread; do \
	  cmake -S . -B build/sanitize-$${kind%%,*} -D RAREFY_SANITIZE=$$kind > /dev/null && \
	  cmake --build build/sanitize-$${kind%%,*} -j 2 && \
	  for level in portable avx2 avx512; do \
	    RAREFY_KERNELS=$$level build/sanitize-$${kind%%,*}/ragged || exit 1; \
	  done || exit 1; \
	done

bench: $(READY)
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/resume.py
	$(BIN)/python bench/peer_gptq.py
	$(BIN)/python bench/peer_pruning.py
	$(BIN)/python bench/kernels.py

bench-roles: $(READY)
	$(BIN)/python bench/roles.py

bench-learning: $(READY)
	$(BIN)/python bench/learning.py

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache
