# The commands to remember. Each does everything from a fresh clone: creates .venv, installs the pinned packages, builds, runs.
#   make demo    distil a real teacher into a smaller student and show what it kept
#   make test    all tests            make asan   the kernels' tests under the address and undefined sanitizers
#   make bench   measure              make lint   style
#   make build   stop before running anything
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install
INSTALLED := $(VENV)/.installed

.PHONY: build test asan demo bench lint clean

# The virtual environment and the editable install are made again only when what they are made from changes.
$(INSTALLED): requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements-dev.txt into $(VENV) and building: some minutes the first time"
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

build: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

# A file of tests stays on one process: what it builds, trains or interprets is made once.
test: build
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

demo: build
	$(BIN)/kdkernels demo

bench: build
	$(BIN)/python -m benches.run

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is built once more, whole, into build/asan, with every C++ file instrumented, and each ISA computes the cases of
# the table on that copy. libasan must be there before Python starts; leaks are not looked for, since Python and torch keep
# memory until they exit. One float32 and one bfloat16 run of each case walk through every load and store.
ASAN := $(CURDIR)/build/asan
asan: $(INSTALLED)
	rm -rf $(ASAN)
	KDKERNELS_BUILD_VARIANT=asan KDKERNELS_CMAKE_ARGS="-DKDKERNELS_SANITIZE=address,undefined -DKDKERNELS_CUDA=OFF" \
	  $(BIN)/python setup.py --quiet build --build-lib $(ASAN)
	for isa in $$($(BIN)/python -c "import kdkernels._native as n; print(*[isa for isa, runs in n.isas().items() if runs])"); do \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(ASAN):$(CURDIR) KDKERNELS_CPU_ISA=$$isa $(BIN)/pytest -q -o pythonpath= --import-mode=importlib \
	    python_tests/test_sanitizer.py || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache kdkernels/*.so
