# The two commands most people need: `make demo` and `make test`. Both set up a fresh machine.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
MODEL ?=
# Environments are made without bytecode: without this, every process would compile all that it imports once more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo demo-moe test test-fast test-long lint bench validate record report wheel wheel-aarch64 clean

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

$(VENV)/.dependencies: pyproject.toml constraints.txt scripts/create_venv.sh $(wildcard tools/*/*.py)
	PYTHON=$(PYTHON) scripts/create_venv.sh $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies setup.py build_ascend.py qwen3_fp8_ascend/torch_range.py $(wildcard csrc/*/* csrc/*/*/*)
	@echo "building the CPU kernels"
	QWEN3_FP8_ASCEND_OBJECTS=$(CURDIR)/.cache/objects $(PY) -m pip --disable-pip-version-check install -qq --no-build-isolation --no-deps --editable .
	@touch $@

venv: $(VENV)/.built  ## create .venv and build the package into it

demo: venv  ## serve a block-FP8 model with vLLM and ask it three questions (MODEL=... for another one)
	$(PY) scripts/demo.py $(if $(MODEL),--model '$(MODEL)')

demo-moe: venv  ## the same with a mixture of experts: the demo's model, turned into experts that compute the same
	$(PY) scripts/demo.py --experts

# All parts run at a time, whatever fails. Those that need environments of their own begin while .venv is made; the main
# tests, on several workers, say how far they are, the others what they said when they are done. One worker more than
# there are cores, since a server that starts or is idle leaves one free; but none for which there is no memory, of which
# a server of two ranks takes 3 GB.
TEST_PARTS := test-triton-ascend test-triton test-main test-vllm-ascend test-aarch64 lint
WORKERS ?= $(shell awk -v most=$$(($$(nproc) < 4 ? $$(nproc) + 1 : 4)) '/^MemAvailable/ { fit = int($$2 / 3e6) } \
	END { print fit < 1 ? 1 : fit < most ? fit : most }' /proc/meminfo)
PYTEST_WORKERS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PARTS := .cache/parts

test:  ## everything that needs no accelerator: lint, types, tests
	@rm -rf $(PARTS); mkdir -p $(PARTS); status=0; \
	$(MAKE) --no-print-directory --keep-going --jobs=3 $(TEST_PARTS:%=part-%) || status=1; \
	echo 'what each part took, beside the others:'; sort -rn $(PARTS)/*.cost; exit $$status

test-main: venv
	$(PY) -m pytest $(PYTEST_WORKERS)

test-fast: venv  ## the tests that start no server
	$(PY) -m pytest $(PYTEST_WORKERS) -m 'not server'

# A part of `make test`; the sub-make that it runs would make .venv too, and only one may.
.PHONY: test-main
part-test-main part-test-vllm-ascend part-test-aarch64 part-lint: | venv
part-%:
	@MAKE='$(MAKE)' MISSING='$(MISSING_$*)' scripts/run_test_part.sh $* $(PARTS)

# MISSING_PART, next to each part, says what the part needs and this machine lacks: `make test` skips the part and says
# so (and fails in CI), the part's own target is an error.
require = @test -z '$(MISSING_$(1))' || { echo 'error: $(1): $(MISSING_$(1))' >&2; exit 2; }

test-long: venv  ## the long forms of the reliability tests: load, faults, fuzzing, sanitizers (more than an hour)
	$(PY) -m pytest --long -m long
	$(MAKE) --no-print-directory test-triton-long test-vllm-ascend-long test-torch-versions

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h)

bench: venv  ## CPU micro-benchmark: correctness, then interleaved medians against the peers
	$(PY) -m benchmarks.bench_linear

DEVICE ?= auto
# $(VENV) has CPU torch. An NPU or a GPU is judged by the Python whose torch sees it, in which pip installed the package.
ON_DEVICE := $(filter npu cuda,$(DEVICE))
JUDGE = $(if $(ON_DEVICE),$(PYTHON),$(PY))
validate: $(if $(ON_DEVICE),,venv)  ## judge and time this machine's device against the specification (DEVICE=npu, cuda or cpu)
	$(JUDGE) -m qwen3_fp8_ascend validate --device $(DEVICE) $(VALIDATE)

NAME ?= $(DEVICE)
record: $(if $(ON_DEVICE),,venv)  ## the same, recorded: into docs/results/validation-NAME.json and every document that says what has run
	$(JUDGE) -m qwen3_fp8_ascend validate --device $(DEVICE) --no-pages --overwrite \
		--output docs/results/validation-$(NAME).json $(VALIDATE); test $$? -le 1
	$(JUDGE) -m qwen3_fp8_ascend report docs/results --output docs

report: venv  ## the verification report in docs/, from docs/results/
	$(PY) -m qwen3_fp8_ascend report docs/results --output docs

wheel: venv  ## a wheel for this machine's architecture in dist/, with the manylinux tag that it holds
	$(PY) scripts/build_wheel.py

wheel-aarch64: venv  ## the same for AArch64 hosts (needs g++-aarch64-linux-gnu)
	CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ $(PY) scripts/build_wheel.py

clean:
	rm -rf build dist *.egg-info qwen3_fp8_ascend/*.so

include $(wildcard make/*.mk)
