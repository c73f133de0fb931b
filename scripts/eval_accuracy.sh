#!/usr/bin/env bash
# Runs lm-evaluation-harness or evalscope against a running server. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/eval_accuracy.sh [SETTINGS] [-- FURTHER ARGUMENTS OF THE TOOL]

Scores a running server on public benchmarks. The tool lives in an environment of its own, so that its packages
replace none of vLLM's; --install makes that environment. Each setting is a flag or a variable; the flag wins.

  --tool NAME          EVAL_TOOL         lm_eval; or evalscope
  --tasks LIST         EVAL_TASKS        gsm8k; as the tool names them, commas between
  --url ADDRESS        EVAL_URL          http://127.0.0.1:8000
  --model NAME         EVAL_MODEL        qwen3-8b-fp8: the served name
  --tokenizer NAME     EVAL_TOKENIZER    Qwen/Qwen3-8B-FP8, or a folder (lm_eval only)
  --api KIND           EVAL_API          completions; or chat, with the model's chat template (lm_eval only)
  --max-length N       EVAL_MAX_LENGTH   4096: that of the server; answers take up to half of it
  --limit N            EVAL_LIMIT        none: all questions of each task
  --concurrency N      EVAL_CONCURRENCY  8
  --output FOLDER      EVAL_OUTPUT       eval-results
  --venv FOLDER        EVAL_VENV         .venv-eval-<tool> of this project
  --install                              make the environment first, if it is not there
  --dry-run                              print the commands instead
  --help

Examples:
  scripts/eval_accuracy.sh --install                                      # gsm8k with lm-evaluation-harness
  scripts/eval_accuracy.sh --tasks gsm8k,ceval-valid --api chat --limit 100
  scripts/eval_accuracy.sh --tool evalscope --tasks gsm8k,ceval --install
  scripts/eval_accuracy.sh --tokenizer ./Qwen3-8B-FP8 --output bf16 --model qwen3-8b    # the baseline

Exit codes: that of the tool; 2 for bad input or set-up.
TEXT
}

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_settings "$@"

tool=${EVAL_TOOL:-lm_eval}
tasks=${EVAL_TASKS:-gsm8k}
url=${EVAL_URL:-http://127.0.0.1:8000}
model=${EVAL_MODEL:-qwen3-8b-fp8}
tokenizer=${EVAL_TOKENIZER:-Qwen/Qwen3-8B-FP8}
api=${EVAL_API:-completions}
max_length=${EVAL_MAX_LENGTH:-4096}
limit=${EVAL_LIMIT:-}
concurrency=${EVAL_CONCURRENCY:-8}
output=${EVAL_OUTPUT:-eval-results}
venv=${EVAL_VENV:-}

one_of tool "$tool" lm_eval evalscope
one_of api "$api" completions chat
whole_number max-length "$max_length"
whole_number concurrency "$concurrency"
[ -z "$limit" ] || whole_number limit "$limit"
venv=${venv:-$root/.venv-eval-$tool}
url=${url%/}
url=${url%/v1}

if [ "$tool" = lm_eval ]; then
  requirements=('lm_eval[api]>=0.4.9,<0.5' 'transformers>=4.56')
  arguments="model=$model,tokenizer=$tokenizer,num_concurrent=$concurrency,max_length=$max_length,max_gen_toks=$((max_length / 2)),tokenized_requests=False"
  if [ "$api" = chat ]; then
    command=("$venv/bin/lm_eval" --model local-chat-completions
      --model_args "$arguments,base_url=$url/v1/chat/completions" --apply_chat_template --fewshot_as_multiturn)
  else
    command=("$venv/bin/lm_eval" --model local-completions --model_args "$arguments,base_url=$url/v1/completions")
  fi
  command+=(--tasks "$tasks" --output_path "$output" --log_samples)
  [ -z "$limit" ] || command+=(--limit "$limit")
else
  requirements=('evalscope>=1,<2')
  IFS=, read -ra datasets <<<"$tasks"
  command=("$venv/bin/evalscope" eval --model "$model" --eval-type openai_api --api-url "$url/v1" --api-key EMPTY
    --datasets "${datasets[@]}" --eval-batch-size "$concurrency" --work-dir "$output"
    --generation-config "{\"temperature\": 0, \"max_tokens\": $((max_length / 2))}")
  [ -z "$limit" ] || command+=(--limit "$limit")
fi
command+=(${further[@]+"${further[@]}"})
making=("${PYTHON:-python3}" -m venv "$venv")
installing=("$venv/bin/python" -m pip install -q "${requirements[@]}")

if [ -n "$dry_run" ]; then
  [ -z "$install" ] || { quoted "${making[@]}" && quoted "${installing[@]}"; }
  quoted "${command[@]}"
  exit 0
fi
if [ ! -x "${command[0]}" ]; then
  [ -n "$install" ] || fail "$tool is not installed in $venv" "run the same command with --install, or give --venv"
  quoted "${making[@]}" >&2
  "${making[@]}" || fail "no environment could be made" "apt-get install python3-venv, or give --venv"
  quoted "${installing[@]}" >&2
  "${installing[@]}" || fail "$tool could not be installed" "check the network and the package index"
fi
client=${command[0]%/*}/python
"$client" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/v1/models", timeout=10)' "$url" 2>/dev/null ||
  fail "no server is up at $url" "start one (scripts/serve_qwen3-8b-fp8.sh) or give its address with --url"
quoted "${command[@]}" >&2
exec "${command[@]}"
