# make demo | test | lint | bench | clean. Everything is installed into .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: venv demo test lint bench clean

venv: $(STAMP)

# One pip call sees all pins; the build itself is isolated and never sees torch.
$(STAMP): $(SOURCES) constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; install it (apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[hf,bench,dev]'
	@touch $@

demo: venv
	$(BIN)/prunekern demo

test: venv
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPRUNEKERN_TESTS=ON -DCMAKE_BUILD_TYPE=Release > /dev/null
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

bench: venv
	$(BIN)/python bench/layers.py
	$(BIN)/python bench/models.py
	$(BIN)/python bench/train_step.py

clean:
	rm -rf build $(VENV) prunekern/_C*.so
