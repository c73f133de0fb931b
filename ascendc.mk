# Ascend C kernels on the emulator: included by the main Makefile, which sets PYTHON.
PYTHON ?= python3

.PHONY: test-ascendc
test-ascendc: ## compile the Ascend C kernels for the host and run them in the emulator (sanitizers on)
	$(PYTHON) -m pytest tests/ascendc
