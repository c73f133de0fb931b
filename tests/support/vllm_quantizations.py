"""Imports all quantizations of vLLM for processes that are to be forked: it looks at each, whatever a model has."""

from vllm.model_executor.layers.quantization import get_quantization_config

get_quantization_config("fp8")
