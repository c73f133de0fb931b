"""Throughput as in the verification report, through ``vllm bench serve``; and the micro-benchmark of the sources."""
