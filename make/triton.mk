# Triton without a device. Two environments, since triton-ascend and upstream Triton are both called `triton`
# and neither may sit beside vLLM's CPU build.
#
#   make test-triton-ascend   compiles every kernel for every chip through BiShengIR and executes it on x86
#   make test-triton          upstream Triton's interpreter, and compiles for sm_80, sm_89, sm_90 and sm_100
#   make test-triton-long     what these two leave out: the whole products of what they try one of each of
#   make triton-tables        the tables in docs/triton.md and benchmarks/results/triton_hivm.csv

TRITON_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TRITON_ASCEND_VERSION := 3.2.0
TRITON_VERSION := 3.9.0
# The Pythons that these have wheels for.
TRITON_ASCEND_PYTHONS := 3.10 3.11
TRITON_PYTHONS := 3.11 3.13
ASCENDNPU_IR_VERSIONS := 1.1.0 1.2.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TRITON_TEST_PACKAGES := "pytest>=8.3" "pytest-timeout>=2.3"
TRITON_PYTEST = -m pytest -q -p no:cacheprovider --durations=5
# Products here are small: numpy's and torch's threads would only spin beside the one that works.
TRITON_THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# CPU torch from wherever pip already looks, else from PyTorch's public CPU index.
define install_cpu_torch
	$(1)/bin/python -m pip install -qq --no-compile "torch==$(TRITON_TORCH)+cpu" || \
	$(1)/bin/python -m pip install -qq --no-compile "torch==$(TRITON_TORCH)+cpu" --extra-index-url $(TORCH_CPU_INDEX)
endef

# $(call no_python,NAME,OLDEST NEWEST): why the part is skipped that needs it; empty where there is such a Python.
find_python = $(shell PYTHON='$(PYTHON)' scripts/find_python.sh $(1))
no_python = $(if $(call find_python,$(2)),,$(1) has wheels for Python $(subst $() , to ,$(2)) only, and here is $(shell $(PYTHON) --version 2>&1))
MISSING_test-triton-ascend = $(call no_python,triton-ascend $(TRITON_ASCEND_VERSION),$(TRITON_ASCEND_PYTHONS))
MISSING_test-triton = $(call no_python,Triton $(TRITON_VERSION),$(TRITON_PYTHONS))

# The stamp's name holds the versions, so that changing one makes the environment anew.
TRITON_ASCEND_STAMP := .venv-triton-ascend/.ready-$(TRITON_ASCEND_VERSION)-torch$(TRITON_TORCH)
TRITON_STAMP := .venv-triton/.ready-$(TRITON_VERSION)-torch$(TRITON_TORCH)

$(TRITON_ASCEND_STAMP):
	$(call require,test-triton-ascend)
	rm -rf .venv-triton-ascend
	$(call find_python,$(TRITON_ASCEND_PYTHONS)) -m venv .venv-triton-ascend
	.venv-triton-ascend/bin/python -m pip install -qq --no-compile triton-ascend==$(TRITON_ASCEND_VERSION) pybind11 llvmlite \
		"numpy<2.4" $(TRITON_TEST_PACKAGES)
	$(call install_cpu_torch,.venv-triton-ascend)
	for version in $(ASCENDNPU_IR_VERSIONS); do \
		.venv-triton-ascend/bin/python -m pip install -qq --no-compile --no-deps \
			--target .venv-triton-ascend/ascendnpu-ir/$$version ascendnpu-ir==$$version || exit 1; \
	done
	touch $@

$(TRITON_STAMP):
	$(call require,test-triton)
	rm -rf .venv-triton
	$(call find_python,$(TRITON_PYTHONS)) -m venv .venv-triton
	$(call install_cpu_torch,.venv-triton)
	.venv-triton/bin/python -m pip install -qq --no-compile triton==$(TRITON_VERSION) numpy $(TRITON_TEST_PACKAGES)
	touch $@

.PHONY: test-triton-ascend test-triton test-triton-long triton-tables

# Those that need no Triton (test_configuration.py, test_nvidia_shapes.py) are among the main tests.
TRITON_INTERPRETED := $(patsubst %,tests/triton_kernels/test_%.py,interpreter grouped_interpreter \
	nvidia_interpreter nvidia_grouped_interpreter nvidia_scaled_mm)
TRITON_COMPILED := $(patsubst %,tests/triton_kernels/test_%.py,sm90 nvidia_compiled)

# The tests that a mark chooses.
define test_triton_ascend
	$(TRITON_THREADS) .venv-triton-ascend/bin/python $(TRITON_PYTEST) -m '$(1)' --confcutdir=tests/triton_ascend tests/triton_ascend
endef
define test_triton_interpreted
	$(TRITON_THREADS) TRITON_INTERPRET=1 .venv-triton/bin/python $(TRITON_PYTEST) -m '$(1)' --confcutdir=tests/triton_kernels $(TRITON_INTERPRETED)
endef
define test_triton_compiled
	$(TRITON_THREADS) .venv-triton/bin/python $(TRITON_PYTEST) -m '$(1)' --confcutdir=tests/triton_kernels $(TRITON_COMPILED)
endef

test-triton-ascend: $(TRITON_ASCEND_STAMP)  ## compile the Triton kernels for every Ascend chip and execute them on x86
	$(call test_triton_ascend,not long)

test-triton: $(TRITON_STAMP)  ## the Triton kernels in the interpreter, and for NVIDIA GPUs
	$(call test_triton_interpreted,not long)
	$(call test_triton_compiled,not long)

test-triton-long: $(TRITON_ASCEND_STAMP) $(TRITON_STAMP)  ## the rest of these two
	$(call test_triton_ascend,long)
	$(call test_triton_interpreted,long)
	$(call test_triton_compiled,long)

triton-tables: $(TRITON_ASCEND_STAMP)
	.venv-triton-ascend/bin/python -m benchmarks.triton_hivm
