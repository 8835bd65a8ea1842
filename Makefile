# make demo      train, sample and score on real images; writes runs/demo/report.html
# make test      the whole test suite
# make lint      style of Python and C++
# make bench     measure ops, steps, sampling and engines against plain PyTorch; writes benchmarks/results/ and the tables
# make sanitize  the ops' tests on kernels built with GCC's AddressSanitizer and UndefinedBehaviorSanitizer
# make budget    compile every CUDA and Triton kernel and write what it uses of a GPU to tests/kernel_budget.json
# make compute-sanitizer   the tests of the CUDA kernels under NVIDIA's checks of memory and races; needs a GPU
# make clean     remove what was built (not .venv, not runs/)
#
# Every target makes .venv if it is missing, installs into it and builds the native library.
#   PYTHON=python3.12   interpreter that makes .venv, >= 3.10      TORCH="torch==2.13.0"   which torch goes into it
#   ARGS="--smoke"      passed on to the command of the target

PYTHON ?= python3
TORCH ?= torch>=2.11
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.maskdm_fast_installed
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test lint format bench sanitize budget compute-sanitizer clean
demo: $(INSTALLED)
	$(BIN)/maskdm-fast demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.ops --save $(ARGS)
	$(BIN)/python -m benchmarks.step --save $(ARGS)
	$(BIN)/python -m benchmarks.sampling --save $(ARGS)
	$(BIN)/python -m benchmarks.scaling --save $(ARGS)
	$(BIN)/python -m benchmarks.predict --save
	$(BIN)/python -m benchmarks.readme

# A build of its own, beside the installed one. The sanitizer's runtime must come first in the process, and what it
# intercepts of libstdc++ must be there by then; Python itself leaks by design. --capture=sys lets its reports through.
sanitize: $(INSTALLED)
	MASKDM_WITH_NATIVE=1 MASKDM_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(BIN)/pytest -o pythonpath=build/sanitize/lib --capture=sys tests/ops/test_parity.py $(ARGS)

budget: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernel_budget --write
	$(BIN)/python -m benchmarks.readme

# PyTorch's caching of memory would hide accesses beyond a tensor.
compute-sanitizer: $(INSTALLED)
	for tool in memcheck racecheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -q -p no:xdist tests/gpu/test_parity.py -k cuda $(ARGS) || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info maskdm_fast/lib .pytest_cache .ruff_cache .benchmarks $(INSTALLED)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The build runs without pip's isolation, which would install a second torch; so torch and the build tools go first.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "maskdm_fast needs Python >= 3.10; $(PYTHON) is `$(PYTHON) --version`. Use make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" "cmake>=3.22" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,eval,bench,test]"
	@$(BIN)/maskdm-fast info  # pip hides the warning of a build that found no compiler
	@touch $@
