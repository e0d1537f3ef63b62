# A fresh machine needs git, make, a C++ compiler and Python >= 3.10. `make demo` and `make test` do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# CUDA headers for the emulator come from a toolkit if there is one, else from PyPI's NVIDIA packages.
CUDA_HEADERS := $(shell command -v nvcc >/dev/null || test -e /usr/local/cuda/include/cuda_fp16.h && echo yes)
RUN := PYTHONUNBUFFERED=1 $(BIN)/python
# A run starts many processes; without bytecode each would compile torch's Python again, whatever the shell asks for.
export PYTHONDONTWRITEBYTECODE :=
# One process per core, of one thread each.
PYTEST := $(RUN) -m pytest -n $(or $(MAX_JOBS),$(shell n=$$(nproc); echo $$((n < 16 ? n : 16)))) --dist worksteal
# new ones too, before git knows them
FILES := git ls-files --cached --others --exclude-standard

.PHONY: demo test thorough bench build gpu gpu-wheels emulator capabilities asan room fmt lint check sanitize profile sass clean

$(VENV)/.toolchain: requirements/build.txt requirements/emulator.txt
	@$(PYTHON) -c "import sys; sys.exit('pyops needs Python 3.10 or newer, this is ' + sys.version) if sys.version_info < (3, 10) else None"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -r requirements/build.txt
	@test -n "$(CUDA_HEADERS)" || $(PIP) install -q --no-compile -r requirements/emulator.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.toolchain requirements/dev.txt
	$(PIP) install -q --no-compile -r requirements/dev.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.installed requirements/demo.txt requirements/demo-no-deps.txt
	$(PIP) install -q -r requirements/demo.txt
	$(PIP) install -q --no-deps -r requirements/demo-no-deps.txt
	@touch $@

build: $(VENV)/.toolchain ## libpyops.so and _host into the editable install
	$(PIP) install -q -e . --no-build-isolation --no-deps

emulator: $(VENV)/.toolchain ## the same, with the CUDA kernels compiled for the CPU
	PYOPS_BUILD_EMULATOR=1 $(PIP) install -q -e . --no-build-isolation --no-deps

capabilities: $(VENV)/.installed ## the CPU kernels for every instruction set, compared on the samples of every op
	PYOPS_CPU_CAPABILITIES=all $(PIP) install -q -e . --no-build-isolation --no-deps
	$(RUN) -m pytest tests/test_cpu_capabilities.py tests/test_nms.py -k "instruction_set"

# AddressSanitizer has to be in the process before everything else; Python and torch never free all they allocate.
ASAN := LD_PRELOAD="$(shell $(or $(CXX),c++) -print-file-name=libasan.so) $(shell $(or $(CXX),c++) -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 PYOPS_EMULATOR=asan

DETECTION := $(patsubst %,tests/test_%.py,detection_input nms boxes roi_align roi_pool deform_conv)

# The property tests of detection hand the kernels what no caller should.
asan: $(VENV)/.installed ## the CUDA kernels on the CPU, and detection on the CPU, under AddressSanitizer
	PYOPS_BUILD_EMULATOR=asan $(PIP) install -q -e . --no-build-isolation --no-deps
	$(ASAN) $(RUN) -m pytest tests -m race --backend emulator
	$(ASAN) $(RUN) -m pytest $(DETECTION) -m "not slow" -k "not capabilit and not instruction_set" --backend cpu

demo: $(VENV)/.toolchain ## the main job: real networks on real photos, then a quick benchmark
	@$(MAKE) --no-print-directory -j2 $(VENV)/.demo build
	$(RUN) -m pyops demo --out out

test: $(VENV)/.toolchain ## the whole suite, with the race detector on the smallest cases
	@$(MAKE) --no-print-directory -j2 $(VENV)/.demo emulator  # while one loads, the other compiles
	$(PYTEST) tests -m "not slow and not thorough"

thorough: $(VENV)/.demo emulator ## what `make test` leaves out for its quarter of an hour, without the slow tests
	$(PYTEST) tests -m "thorough and not slow"

check: $(VENV)/.demo emulator ## everything, slow tests included
	$(PYTEST) tests
	$(RUN) -m pyops check
	$(MAKE) capabilities

bench: $(VENV)/.demo build ## all benchmark rooms on this machine; table, JSON and plots in out/
	$(RUN) -m pyops bench --out out $(OP)

gpu: ## on a machine with an NVIDIA GPU, nvcc, torch and ninja, offline: build, test, sanitize, bench
	$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu.py --part "$(PART)" --op "$(OP)"

GPU_PYTHON ?= 3.12
FOR_GPU := --only-binary=:all: --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
           --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64
gpu-wheels: $(VENV)/.installed ## what `make gpu` needs on a machine without a package index, for its Python, into wheels/
	$(PIP) download -q -d wheels $(FOR_GPU) -r requirements/gpu.txt
	$(PIP) download -q -d wheels $(FOR_GPU) --no-deps -r requirements/gpu-peers.txt
	@du -sh wheels

room: ## every file of one op: make room OP=layer_norm
	@$(FILES) "*$(OP)*"

fmt: $(VENV)/.installed ## format Python and C++
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .
	$(FILES) '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

lint: $(VENV)/.installed ## style, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(FILES) '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: ## compute-sanitizer on the smallest case of each kernel (GPU)
	$(MAKE) gpu PART=sanitize

sass: $(VENV)/.installed ## compile the CUDA and Triton kernels for sm_80 and sm_90a: registers, spills, shared memory; OP=rms_norm
	$(RUN) tests/cuda_compile.py $(OP)
	$(RUN) tests/triton_compile.py $(OP)

# perf sees the C++ kernels by name; without it the Python profiler shows the path of a call.
profile: $(VENV)/.demo build ## where the time of one room goes on the CPU, first in Python, then in C++: make profile OP=layer_norm
	@test -n "$(OP)" || { echo "make profile needs OP=, for example OP=layer_norm"; exit 2; }
	@mkdir -p out
	$(RUN) -m cProfile -o out/profile.pstats -m pyops bench $(OP) --quick --device cpu
	$(RUN) -c "import pstats; pstats.Stats('out/profile.pstats').sort_stats('tottime').print_stats('pyops|torch.ops|bench', 15)"
	@if command -v perf >/dev/null && perf record -q -o out/perf.data -- true 2>/dev/null; then \
	  perf record -q -g -o out/perf.data -- $(BIN)/python -m pyops bench $(OP) --quick --device cpu >/dev/null; \
	  perf report --stdio --no-children -g none --percent-limit 1 -i out/perf.data 2>/dev/null | grep -v '^#'; \
	else echo "perf is not here, or may not record: no profile of the C++ kernels"; fi

clean:
	rm -rf build out dist *.egg-info pyops/*.so
