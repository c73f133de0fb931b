#!/usr/bin/env bash
# Serves Qwen3-8B-FP8 (or any block-FP8 checkpoint) with vLLM on this machine's NPUs, GPUs or CPU. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/serve_qwen3-8b-fp8.sh [SETTINGS] [-- FURTHER ARGUMENTS OF `vllm serve`]

Fetches the checkpoint, looks at its headers, sets the environment that the NPU, GPU or CPU needs, and becomes
`vllm serve`. Each setting is a flag or a variable; the flag wins.

  --model NAME|FOLDER          SERVE_MODEL                   Qwen/Qwen3-8B-FP8; a folder is served as it is
  --source HUB                 SERVE_SOURCE                  modelscope; or huggingface
  --download-dir FOLDER        SERVE_DOWNLOAD_DIR            the hub's own cache
  --device KIND                SERVE_DEVICE                  auto; or npu, cuda, cpu
  --devices LIST               ASCEND_RT_VISIBLE_DEVICES     NPUs or GPUs to use, as in 0,1; the first ones by default
  --tensor-parallel-size N     SERVE_TENSOR_PARALLEL_SIZE    1; 2 for 2xA3
  --served-model-name NAME     SERVE_SERVED_MODEL_NAME       qwen3-8b-fp8
  --host ADDRESS               SERVE_HOST                    127.0.0.1; 0.0.0.0 lets other machines in
  --port N                     SERVE_PORT                    8000
  --quantization METHOD        SERVE_QUANTIZATION            ascend; none for a bf16 checkpoint to compare with
  --max-model-len N            SERVE_MAX_MODEL_LEN           4096
  --dtype TYPE                 SERVE_DTYPE                   auto
  --gpu-memory-utilization X   SERVE_GPU_MEMORY_UTILIZATION  0.9 (NPU, GPU)
  --kv-cache-gib N             VLLM_CPU_KVCACHE_SPACE        4 (CPU only)
  --cores LISTS                VLLM_CPU_OMP_THREADS_BIND     all of this process; ranks apart by "|" (CPU only)
  --trust-remote-code 0|1      SERVE_TRUST_REMOTE_CODE       1 as in the verification report; Qwen3 needs none
  --backend NAME               QWEN3_FP8_ASCEND_BACKEND      the best that can run
  --activation w8a8|w8a16      SERVE_ACTIVATION              w8a8; w8a16 leaves activations as they are
  --python PATH                PYTHON                        .venv/bin/python of this project, else python3
  --dry-run                                                  print the commands instead; needs no NPU, GPU or vLLM
  --help

On an NPU these are set unless they are set already: PYTORCH_NPU_ALLOC_CONF=expandable_segments:True,
TASK_QUEUE_ENABLE=1, HCCL_OP_EXPANSION_MODE=AIV; CANN's set_env.sh is sourced if ASCEND_HOME_PATH is unset
(CANN_SET_ENV names another one).

Examples:
  scripts/serve_qwen3-8b-fp8.sh                                             # this machine, whatever it has
  scripts/serve_qwen3-8b-fp8.sh --device npu --tensor-parallel-size 2 --devices 0,1 --dry-run    # 2xA3
  scripts/serve_qwen3-8b-fp8.sh --source huggingface --device cpu --port 8001 -- --enforce-eager
  SERVE_MODEL=./Qwen3-8B-FP8 scripts/serve_qwen3-8b-fp8.sh --activation w8a16

Exit codes: that of `vllm serve`; 2 for bad input or set-up.
TEXT
}

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_settings "$@"
find_python

# The command line that has `serve`: a dry run asks nothing of the Python that it prints.
own=$root/.venv/bin/python
for python in "$PYTHON" ${dry_run:+"$own" python3}; do
  [ "$python" = "$own" ] || [ -n "$("$python" -m qwen3_fp8_ascend --version 2>/dev/null)" ] || continue
  exec "$python" -m qwen3_fp8_ascend serve ${dry_run:+--dry-run} -- ${further[@]+"${further[@]}"}
done
fail "$PYTHON cannot load qwen3_fp8_ascend" "pip install this project there, or give --python"
