# The Ascend C kernels in the emulator; a part of what `make test` runs.
.PHONY: test-ascendc
test-ascendc: venv  ## compile the Ascend C kernels for the host and run them in the emulator (sanitizers on)
	$(PY) -m pytest tests/ascendc
