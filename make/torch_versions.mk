# The kernels under the oldest torch of the range and a new one (qwen3_fp8_ascend/torch_range.py), each with the wheel
# that was built under the other one. A part of the long tests: the two environments take 13 GB and some minutes.
#
#   make test-torch-versions

TORCH_VERSIONS := $(shell sed -n 's/^TESTED = ("\(.*\)", "\(.*\)")/\1 \2/p' qwen3_fp8_ascend/torch_range.py)
TORCH_VERSION_STAMPS := $(TORCH_VERSIONS:%=.venv-torch-%/.ready)
TORCH_VERSION_PACKAGES := numpy safetensors typer rich packaging pytest pytest-timeout hypothesis ml-dtypes psutil \
	"setuptools>=77" wheel

.PHONY: test-torch-versions

# The CPU build where pip finds one; PyPI's own works on a CPU too, with the libraries for CUDA that it asks for.
$(TORCH_VERSION_STAMPS): .venv-torch-%/.ready:
	rm -rf .venv-torch-$*
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install -qq torch==$*+cpu --extra-index-url $(TORCH_CPU_INDEX) || \
	.venv-torch-$*/bin/python -m pip install -qq torch==$*
	.venv-torch-$*/bin/python -m pip install -qq $(TORCH_VERSION_PACKAGES)
	touch $@

test-torch-versions: $(TORCH_VERSION_STAMPS)  ## the kernels' tests under the oldest torch and a new one, each with the other's wheel
	$(PYTHON) scripts/test_torch_versions.py $(TORCH_VERSIONS:%=.venv-torch-%)
