#!/usr/bin/env bash
# Serves Qwen3-8B-FP8 (or any block-FP8 checkpoint) with vLLM on this machine's NPUs or CPU. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/serve_qwen3-8b-fp8.sh [SETTINGS] [-- FURTHER ARGUMENTS OF `vllm serve`]

Fetches the checkpoint, looks at its headers, sets the environment that the NPU or the CPU needs, and becomes
`vllm serve`. Each setting is a flag or a variable; the flag wins.

  --model NAME|FOLDER          SERVE_MODEL                   Qwen/Qwen3-8B-FP8; a folder is served as it is
  --source HUB                 SERVE_SOURCE                  modelscope; or huggingface
  --download-dir FOLDER        SERVE_DOWNLOAD_DIR            the hub's own cache
  --device KIND                SERVE_DEVICE                  auto; or npu, cpu
  --devices LIST               ASCEND_RT_VISIBLE_DEVICES     NPUs to use, as in 0,1; the first ones by default
  --tensor-parallel-size N     SERVE_TENSOR_PARALLEL_SIZE    1; 2 for 2xA3
  --served-model-name NAME     SERVE_SERVED_MODEL_NAME       qwen3-8b-fp8
  --host ADDRESS               SERVE_HOST                    127.0.0.1; 0.0.0.0 lets other machines in
  --port N                     SERVE_PORT                    8000
  --quantization METHOD        SERVE_QUANTIZATION            ascend; none for a bf16 checkpoint to compare with
  --max-model-len N            SERVE_MAX_MODEL_LEN           4096
  --dtype TYPE                 SERVE_DTYPE                   auto
  --gpu-memory-utilization X   SERVE_GPU_MEMORY_UTILIZATION  0.9 (NPU only)
  --kv-cache-gib N             VLLM_CPU_KVCACHE_SPACE        4 (CPU only)
  --cores LISTS                VLLM_CPU_OMP_THREADS_BIND     all of this process; ranks apart by "|" (CPU only)
  --trust-remote-code 0|1      SERVE_TRUST_REMOTE_CODE       1 as in the verification report; Qwen3 needs none
  --backend NAME               QWEN3_FP8_ASCEND_BACKEND      the best that can run
  --activation dynamic|none    SERVE_ACTIVATION              dynamic (W8A8); none is W8A16
  --python PATH                PYTHON                        .venv/bin/python of this project, else python3
  --dry-run                                                  print the commands instead; needs neither NPU nor vLLM
  --help

On an NPU these are set unless they are set already: PYTORCH_NPU_ALLOC_CONF=expandable_segments:True,
TASK_QUEUE_ENABLE=1, HCCL_OP_EXPANSION_MODE=AIV; CANN's set_env.sh is sourced if ASCEND_HOME_PATH is unset
(CANN_SET_ENV names another one).

Examples:
  scripts/serve_qwen3-8b-fp8.sh                                             # this machine, whatever it has
  scripts/serve_qwen3-8b-fp8.sh --device npu --tensor-parallel-size 2 --devices 0,1 --dry-run    # 2xA3
  scripts/serve_qwen3-8b-fp8.sh --source huggingface --device cpu --port 8001 -- --enforce-eager
  SERVE_MODEL=./Qwen3-8B-FP8 scripts/serve_qwen3-8b-fp8.sh --activation none

Exit codes: that of `vllm serve`; 2 for bad input or set-up.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/common.sh
. "$root/scripts/common.sh"

model=${SERVE_MODEL:-Qwen/Qwen3-8B-FP8}
source=${SERVE_SOURCE:-modelscope}
download_dir=${SERVE_DOWNLOAD_DIR:-}
device=${SERVE_DEVICE:-auto}
devices=${ASCEND_RT_VISIBLE_DEVICES:-}
tensor_parallel_size=${SERVE_TENSOR_PARALLEL_SIZE:-1}
served_model_name=${SERVE_SERVED_MODEL_NAME:-qwen3-8b-fp8}
host=${SERVE_HOST:-127.0.0.1}
port=${SERVE_PORT:-8000}
quantization=${SERVE_QUANTIZATION:-ascend}
max_model_len=${SERVE_MAX_MODEL_LEN:-4096}
dtype=${SERVE_DTYPE:-auto}
gpu_memory_utilization=${SERVE_GPU_MEMORY_UTILIZATION:-0.9}
kv_cache_gib=${VLLM_CPU_KVCACHE_SPACE:-4}
cores=${VLLM_CPU_OMP_THREADS_BIND:-}
trust_remote_code=${SERVE_TRUST_REMOTE_CODE:-1}
backend=${QWEN3_FP8_ASCEND_BACKEND:-}
activation=${SERVE_ACTIVATION:-dynamic}
python=${PYTHON:-}
dry_run=

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=1; shift; continue ;;
    --) shift; break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
  esac
  case $1 in
    --model | --source | --download-dir | --device | --devices | --tensor-parallel-size | --served-model-name | --host | \
      --port | --quantization | --max-model-len | --dtype | --gpu-memory-utilization | --kv-cache-gib | --cores | \
      --trust-remote-code | --backend | --activation | --python)
      [ $# -ge 2 ] || fail "$1 needs a value" "see --help"
      setting=${1#--}
      printf -v "${setting//-/_}" %s "$2"
      shift 2
      ;;
    *) fail "unknown setting $1" "see --help; arguments for \`vllm serve\` itself go after --" ;;
  esac
done
further=("$@")

one_of source "$source" modelscope huggingface
one_of device "$device" auto npu cpu
one_of quantization "$quantization" ascend none
one_of trust-remote-code "$trust_remote_code" 0 1
one_of activation "$activation" dynamic none
whole_number tensor-parallel-size "$tensor_parallel_size"
whole_number port "$port"
whole_number max-model-len "$max_model_len"
whole_number kv-cache-gib "$kv_cache_gib"
[[ $gpu_memory_utilization =~ ^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?)$ ]] ||
  fail "--gpu-memory-utilization is ${gpu_memory_utilization:-empty}" "give a fraction above 0 and up to 1"

python=$(find_python "$python" "$root")
vllm=$(dirname "$(command -v "$python")")/vllm
[ -x "$vllm" ] || vllm=vllm

# --- the checkpoint -----------------------------------------------------------------------------------------------
download=()
folder=$model
if [ ! -d "$model" ]; then
  [[ $model == [!/.]*/* ]] ||
    fail "there is no folder $model" "give a folder that exists, or a hub's name such as Qwen/Qwen3-8B-FP8"
  module=$source
  [ "$source" != huggingface ] || module=huggingface_hub
  where=
  [ -z "$download_dir" ] || where=', cache_dir=sys.argv[2]'
  code="import sys; from $module import snapshot_download as fetch; print(fetch(sys.argv[1]$where))"
  download=("$python" -c "$code" "$model")
  [ -z "$download_dir" ] || download+=("$download_dir")
fi

# --- the device ---------------------------------------------------------------------------------------------------
set_env=${CANN_SET_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
source_cann=
if [ -z "${ASCEND_HOME_PATH:-}" ] && [ "$device" != cpu ] && { [ -f "$set_env" ] || [ "$device" = npu ]; }; then
  source_cann=1
  if [ -f "$set_env" ]; then
    set +u # CANN's script reads variables that may be unset
    # shellcheck source=/dev/null
    . "$set_env"
    set -u
  elif [ -z "$dry_run" ]; then
    fail "CANN's $set_env is not there" "install CANN, or set CANN_SET_ENV, or source it yourself"
  fi
fi
missing_npu() { "$python" -c 'from qwen3_fp8_ascend.backends.soc import missing_npu; print(missing_npu() or "")'; }
if [ "$device" = auto ] || { [ "$device" = npu ] && [ -z "$dry_run" ]; }; then
  reason=$(missing_npu) || fail "$python cannot load qwen3_fp8_ascend" "pip install this project there, or give --python"
  if [ -z "$reason" ]; then
    device=npu
  elif [ "$device" = npu ] || compgen -G '/dev/davinci[0-9]*' >/dev/null; then
    fail "the NPU cannot be used: $reason" "see \`qwen3-fp8-ascend doctor\`, or serve on the CPU with --device cpu"
  else
    device=cpu
  fi
fi

# --- the environment and the command ------------------------------------------------------------------------------
environment=()
arguments=(--served-model-name "$served_model_name" --host "$host" --port "$port")
[ "$trust_remote_code" = 0 ] || arguments+=(--trust-remote-code)
[ "$quantization" = none ] || arguments+=(--quantization "$quantization")
arguments+=(--max-model-len "$max_model_len")
if [ "$device" = npu ]; then
  if [ -z "$devices" ]; then
    devices=$(seq -s , 0 $((tensor_parallel_size - 1)))
  fi
  IFS=, read -ra chosen <<<"$devices"
  [ "${#chosen[@]}" -ge "$tensor_parallel_size" ] ||
    fail "--tensor-parallel-size $tensor_parallel_size needs as many NPUs, --devices is $devices" "name more NPUs"
  environment+=("ASCEND_RT_VISIBLE_DEVICES=$devices"
    "PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
    "TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}"
    "HCCL_OP_EXPANSION_MODE=${HCCL_OP_EXPANSION_MODE:-AIV}")
  arguments+=(--gpu-memory-utilization "$gpu_memory_utilization")
else
  if [ -z "$cores" ]; then
    cores=$("$python" -c '
import os, sys
ranks, cores = int(sys.argv[1]), sorted(os.sched_getaffinity(0))
share = len(cores) // ranks
print("|".join(",".join(map(str, cores[i * share : (i + 1) * share])) for i in range(ranks)) if share else "")
' "$tensor_parallel_size")
    [ -n "$cores" ] ||
      fail "--tensor-parallel-size $tensor_parallel_size needs a core a rank, this process has $(nproc)" "use fewer ranks"
  fi
  environment+=("VLLM_CPU_KVCACHE_SPACE=$kv_cache_gib" "VLLM_CPU_OMP_THREADS_BIND=$cores")
fi
arguments+=(--dtype "$dtype")
[ "$tensor_parallel_size" = 1 ] || arguments+=(--tensor-parallel-size "$tensor_parallel_size")
[ -z "$backend" ] || environment+=("QWEN3_FP8_ASCEND_BACKEND=$backend")
[ "$activation" = dynamic ] || arguments+=(--hf-overrides '{"qwen3_fp8_ascend": {"activation": "none"}}')
[ "${#further[@]}" = 0 ] || arguments+=("${further[@]}")

if [ -n "$dry_run" ]; then
  [ -z "$source_cann" ] || quoted source "$set_env"
  if [ "${#download[@]}" -gt 0 ]; then
    # shellcheck disable=SC2016 # the shell of whoever pastes it expands it
    printf 'model=$(%s | tail -n 1)\n' "$(quoted "${download[@]}")"
    # shellcheck disable=SC2016
    printf '%s serve "$model" %s\n' "$(quoted env "${environment[@]}" "$vllm")" "$(quoted "${arguments[@]}")"
  else
    quoted env "${environment[@]}" "$vllm" serve "$folder" "${arguments[@]}"
  fi
  exit 0
fi

command -v "$vllm" >/dev/null || fail "there is no vllm beside $python" "\`make venv\`, or give --python"
if [ "${#download[@]}" -gt 0 ]; then
  "$python" -c "import $module" 2>/dev/null ||
    fail "$python has no $module" "$python -m pip install $module, or give --source, or a folder as --model"
  echo "downloading $model from $source" >&2
  # Hub clients may print on stdout too; the folder is the last line.
  folder=$("${download[@]}" | tail -n 1) && [ -d "$folder" ] ||
    fail "$model could not be downloaded from $source" "check the name and the network, or give a folder as --model"
fi
# Nothing is loaded before the headers agree; the reasons are on stderr.
[ "$quantization" = none ] || "$python" -m qwen3_fp8_ascend inspect "$folder" >&2 ||
  fail "$folder cannot be served" "see the anomalies above; a half-written folder has to be made or fetched again"
quoted env "${environment[@]}" "$vllm" serve "$folder" "${arguments[@]}" >&2
exec env "${environment[@]}" "$vllm" serve "$folder" "${arguments[@]}"
