# make demo | test | test-slow | lint | docs | bench | bench-check | bench-baseline | peers-venv | llama-venv | faults |
# sanitize | clean. Everything is installed into .venv, from constraints.txt; peers of benchmarks that others need not have
# into venvs of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_VENV := .venv-peers
LLAMA_VENV := .venv-llama
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')

# Builds and runs the C++ tests; $(1): build folder, $(2): options.
define cpp_tests
$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPRUNEKERN_TESTS=ON -DCMAKE_BUILD_TYPE=Release $(2) > /dev/null
$(BIN)/cmake --build $(1)
$(BIN)/ctest --test-dir $(1) -j 2 --output-on-failure
endef

.PHONY: venv peers-venv llama-venv demo test test-slow lint docs bench bench-check bench-baseline faults sanitize clean

venv: $(STAMP)

# One pip call sees all pins; the build itself is isolated and never sees torch.
$(STAMP): $(SOURCES) constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; install it (apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[hf,gguf,bench,docs,dev]'
	@touch $@

# Peers of bench.cpu.models on top of what .venv holds: pip sees it, and leaves it as it is.
peers-venv: $(PEERS_VENV)/.installed
$(PEERS_VENV)/.installed: bench/peers.txt | $(STAMP)
	$(BIN)/python -m venv $(PEERS_VENV)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$($(PEERS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	$(PEERS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r bench/peers.txt
	@touch $@

# llama.cpp, for bench.cpu.decode: built for this CPU, which takes about 8 minutes on two cores.
llama-venv: $(LLAMA_VENV)/.installed
$(LLAMA_VENV)/.installed: bench/llama.txt
	@test -x $(LLAMA_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_VENV)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
	  $(LLAMA_VENV)/bin/python -m pip install -q --disable-pip-version-check -r bench/llama.txt
	@touch $@

demo: venv
	$(BIN)/prunekern demo

test: venv
	$(call cpp_tests,build/cpp,)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# What takes ten seconds and more a test: the wheel, the examples, several processes, every instruction set.
test-slow: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(wildcard examples/cpp/*.cpp)

# The site, into build/site: strictly (broken links fail), with no network, and every public name documented.
# (--quiet would hide warnings from --strict, too.)
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/check_names.py build/site
	$(BIN)/python docs/check_paths.py

# The C++ tests under AddressSanitizer + UndefinedBehaviorSanitizer, then with two threads under ThreadSanitizer
# (threads from std::thread: it knows nothing of libgomp's barriers and would report every loop). A test that went
# on after a report would pass. -O1: gcc spends four minutes
# on generic.cpp with UBSan at -O3.
SANITIZE := -fno-sanitize-recover=all -fno-omit-frame-pointer -g
sanitize: venv
	$(call cpp_tests,build/asan,-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS="-fsanitize=address -fsanitize=undefined $(SANITIZE)")
	$(call cpp_tests,build/tsan,-DCMAKE_CXX_FLAGS="-fsanitize=thread $(SANITIZE)" -DPRUNEKERN_STD_THREADS=ON)

# Models beside all peers where `make peers-venv` was made before.
bench: venv
	$(BIN)/python -m bench.cpu.layers
	$(if $(wildcard $(PEERS_VENV)/.installed),$(PEERS_VENV),$(VENV))/bin/python -m bench.cpu.models
	$(BIN)/python -m bench.cpu.growth
	$(BIN)/python -m bench.cpu.train_step

# Fails where an op lost more than 15 % against PyTorch since bench/regression/baseline.json was written.
bench-check: venv
	@mkdir -p build
	$(BIN)/python -m pytest -q bench/regression --benchmark-disable-gc --benchmark-json=build/bench-check.json

# Writes bench/regression/baseline.json for this CPU's instruction set: on a quiet machine, after a change that is meant.
bench-baseline: venv
	$(BIN)/python -m pytest -q bench/regression --benchmark-disable-gc --new-baseline

# Bad calls, damaged folders, kills, full disks, forks, threads; fails where anything crashed, was lost or wrong.
faults: venv
	$(BIN)/python -m bench.faults

clean:
	rm -rf build $(VENV) $(PEERS_VENV) $(LLAMA_VENV) prunekern/_C*.so
