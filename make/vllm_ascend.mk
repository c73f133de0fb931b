# vLLM-Ascend without an NPU: its real sources and the real torch-npu over CPU torch, with stub CANN libraries.
#
#   make test-vllm-ascend   registration, linear methods and memory beside releases of vLLM-Ascend; their own tests
#
# .venv-vllm-ascend sees the packages of .venv (torch, vLLM's requirements) behind its own. What differs between the
# releases lies in one folder each: vLLM-Ascend, and vLLM where .venv has another one.

TORCH_NPU_VERSION := 2.13.0
VLLM_ASCEND_RELEASES := 0.30.0rc2 0.23.0.post1 0.23.0
VLLM_OF_0.30.0rc2 := 0.30.0
VLLM_OF_0.23.0.post1 := 0.23.0
VLLM_OF_0.23.0 := 0.23.0
# Only in the long tests: its .post1 differs in four modules (the model runner, a patch for Mamba, MXFP8, the 310P).
VLLM_ASCEND_SELDOM := 0.23.0
VLLM_ASCEND_OFTEN := $(filter-out $(VLLM_ASCEND_SELDOM),$(VLLM_ASCEND_RELEASES))
VLLM_ASCEND_VENV := .venv-vllm-ascend
VLLM_ASCEND_STAMP := $(VLLM_ASCEND_VENV)/.ready-$(TORCH_NPU_VERSION)-$(subst $() ,-,$(VLLM_ASCEND_OFTEN))
VLLM_ASCEND_SELDOM_STAMP := $(VLLM_ASCEND_VENV)/.ready-$(TORCH_NPU_VERSION)-$(subst $() ,-,$(VLLM_ASCEND_SELDOM))
create_vllm_ascend = scripts/create_venv_vllm_ascend.sh $(VENV) $(VLLM_ASCEND_VENV) $(TORCH_NPU_VERSION) \
	$(foreach release,$(1),$(release)=$(VLLM_OF_$(release)))

$(VLLM_ASCEND_STAMP): scripts/create_venv_vllm_ascend.sh tests/support/vllm_ascend_environment.py $(wildcard tests/support/device_guard.*) | $(VENV)/.built
	rm -rf $(VLLM_ASCEND_VENV)
	$(call create_vllm_ascend,$(VLLM_ASCEND_OFTEN))
	touch $@

$(VLLM_ASCEND_SELDOM_STAMP): $(VLLM_ASCEND_STAMP)
	$(call create_vllm_ascend,$(VLLM_ASCEND_SELDOM))
	touch $@

.PHONY: test-vllm-ascend test-vllm-ascend-long
.PHONY: $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-%) $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%)

test-vllm-ascend: $(VLLM_ASCEND_OFTEN:%=test-vllm-ascend-%)  ## the plugin beside vLLM-Ascend, on FakeTensors

$(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-%): test-vllm-ascend-%: $(VLLM_ASCEND_STAMP)
	$(VLLM_ASCEND_VENV)/bin/python-$* -m pytest -q -p no:cacheprovider tests/vllm_ascend

$(VLLM_ASCEND_SELDOM:%=test-vllm-ascend-%) $(VLLM_ASCEND_SELDOM:%=test-vllm-ascend-long-%): $(VLLM_ASCEND_SELDOM_STAMP)

test-vllm-ascend-long: $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%) $(VLLM_ASCEND_SELDOM:%=test-vllm-ascend-%)  ## what it leaves out: vLLM-Ascend 0.23.0, a server of four interpreters, Qwen3-235B with all experts packed, the first pull request alone

$(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%): test-vllm-ascend-long-%: $(VLLM_ASCEND_STAMP)
	$(VLLM_ASCEND_VENV)/bin/python-$* -m pytest -q -p no:cacheprovider --long -m long tests/vllm_ascend
