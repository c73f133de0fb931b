# AArch64 without such a machine: the package is cross-compiled, and the tests of its kernels run under qemu-user with an
# AArch64 Python and torch, on a processor that has bf16 instructions (`max`) and on one that has none (`neoverse-n1`).
#
#   make test-aarch64        what CI runs: every kind of test, on fewer problems
#   make test-aarch64-long   all tests of the CPU backend, of the operations, of determinism and of misuse
#
# What is slow is the emulation: importing torch takes 15 seconds. Times under qemu say nothing about a processor.

AARCH64_TORCH := 2.10.0
AARCH64_VENV := .venv-aarch64
AARCH64_STAMP := $(AARCH64_VENV)/.ready-torch$(AARCH64_TORCH)
AARCH64_BUILT := $(AARCH64_VENV)/.built
AARCH64_CXX := aarch64-linux-gnu-g++
AARCH64_PROCESSORS := max neoverse-n1
# A checkout with the package as the wheel holds it: the sources' own folder holds this machine's library.
AARCH64_RUN := $(AARCH64_VENV)/run
# pytest would put its own `assert` into all modules of a plugin that it finds by itself, and Hypothesis is one: that
# takes most of a minute under qemu. A cap of this machine's instruction sets is none of the emulated processor's.
AARCH64_PYTEST = env -u QWEN3_FP8_ASCEND_CPU_ISA CI=true PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 AARCH64_PROCESSOR=$* \
	../bin/python-$* -m pytest -q -p no:cacheprovider -p pytest_timeout -p _hypothesis_pytestplugin --durations=5

MISSING_test-aarch64 = $(shell scripts/create_venv_aarch64.sh --missing)

$(AARCH64_STAMP): scripts/create_venv_aarch64.sh | $(VENV)/.dependencies
	PYTHON=$(PY) scripts/create_venv_aarch64.sh $(AARCH64_VENV) $(AARCH64_TORCH)
	touch $@

$(AARCH64_BUILT): $(AARCH64_STAMP) setup.py build_ascend.py pyproject.toml $(wildcard csrc/cpu/*) \
		$(shell find qwen3_fp8_ascend -name '*.py')
	rm -rf $(AARCH64_VENV)/build $(AARCH64_VENV)/dist $(AARCH64_RUN)
	env -u ASCEND_HOME_PATH CXX=$(AARCH64_CXX) PYTHONPATH=$(AARCH64_VENV)/site-packages $(PY) setup.py -q \
		build --build-base $(AARCH64_VENV)/build bdist_wheel --skip-build --dist-dir $(AARCH64_VENV)/dist
	mkdir -p $(AARCH64_RUN)
	$(PY) -m zipfile -e $(AARCH64_VENV)/dist/*-py3-none-linux_aarch64.whl $(AARCH64_RUN)
	for name in tests docs benchmarks csrc pyproject.toml setup.py build_ascend.py; do \
		ln -s ../../$$name $(AARCH64_RUN)/$$name || exit 1; \
	done
	touch $@

.PHONY: test-aarch64 test-aarch64-long $(AARCH64_PROCESSORS:%=test-aarch64-%) $(AARCH64_PROCESSORS:%=test-aarch64-long-%)

test-aarch64: $(AARCH64_PROCESSORS:%=test-aarch64-%)  ## the CPU kernels for AArch64, cross-compiled, under qemu

test-aarch64-long: $(AARCH64_PROCESSORS:%=test-aarch64-long-%)  ## the same on all problems; long, since all of it is emulated

$(AARCH64_PROCESSORS:%=test-aarch64-%): test-aarch64-%: $(AARCH64_BUILT)
	cd $(AARCH64_RUN) && $(AARCH64_PYTEST) \
		-p tests.aarch64.short tests/aarch64 $(addprefix tests/backends/test_cpu_,backend.py experts.py)

$(AARCH64_PROCESSORS:%=test-aarch64-long-%): test-aarch64-long-%: $(AARCH64_BUILT)
	cd $(AARCH64_RUN) && $(AARCH64_PYTEST) tests/aarch64 \
		$(addprefix tests/backends/test_cpu_,backend.py experts.py determinism.py misuse.py odd_calls.py) tests/test_ops.py
