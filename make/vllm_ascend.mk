# vLLM-Ascend without an NPU: its real sources and the real torch-npu over CPU torch, with stub CANN libraries.
#
#   make test-vllm-ascend   registration, linear methods and memory beside each release of vLLM-Ascend; its own tests
#
# .venv-vllm-ascend sees the packages of .venv (torch, vLLM's requirements) behind its own. What differs between the
# releases lies in one folder each: vLLM-Ascend, and vLLM where .venv has another one.

TORCH_NPU_VERSION := 2.13.0
VLLM_ASCEND_RELEASES := 0.30.0rc2 0.23.0
VLLM_OF_0.30.0rc2 := 0.30.0
VLLM_OF_0.23.0 := 0.23.0
VLLM_ASCEND_VENV := .venv-vllm-ascend
VLLM_ASCEND_STAMP := $(VLLM_ASCEND_VENV)/.ready-$(TORCH_NPU_VERSION)-$(subst $() ,-,$(VLLM_ASCEND_RELEASES))

$(VLLM_ASCEND_STAMP): scripts/create_venv_vllm_ascend.sh tests/support/vllm_ascend_environment.py | $(VENV)/.built
	rm -rf $(VLLM_ASCEND_VENV)
	scripts/create_venv_vllm_ascend.sh $(VENV) $(VLLM_ASCEND_VENV) $(TORCH_NPU_VERSION) \
		$(foreach release,$(VLLM_ASCEND_RELEASES),$(release)=$(VLLM_OF_$(release)))
	touch $@

.PHONY: test-vllm-ascend test-vllm-ascend-long
.PHONY: $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-%) $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%)

test-vllm-ascend: $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-%)  ## the plugin beside vLLM-Ascend, on FakeTensors

$(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-%): test-vllm-ascend-%: $(VLLM_ASCEND_STAMP)
	$(VLLM_ASCEND_VENV)/bin/python-$* -m pytest -q -p no:cacheprovider tests/vllm_ascend

test-vllm-ascend-long: $(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%)  ## what it leaves out: a server of four interpreters, Qwen3-235B with all experts packed, the first pull request alone

$(VLLM_ASCEND_RELEASES:%=test-vllm-ascend-long-%): test-vllm-ascend-long-%: $(VLLM_ASCEND_STAMP)
	$(VLLM_ASCEND_VENV)/bin/python-$* -m pytest -q -p no:cacheprovider --long -m long tests/vllm_ascend
