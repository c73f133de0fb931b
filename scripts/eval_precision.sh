#!/usr/bin/env bash
# Compares block FP8 with its reference and with the original model. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/eval_precision.sh --fp8 FOLDER [SETTINGS] [-- FURTHER OPTIONS OF `eval-precision run`]

Makes the runs that the report's precision table needs, compares them, judges every linear and every decoder layer by
itself, and writes the table (Markdown), a page with plots (HTML) and the results for `qwen3-fp8-ascend report` (JSON).
The reference and the original are computed on the CPU. What exists is kept: to compare machines, copy their *.run
files into one folder and start this again. Each setting is a flag or a variable; the flag wins.

  --fp8 FOLDER         PRECISION_FP8          the block-FP8 checkpoint
  --bf16 FOLDER        PRECISION_BF16         none: the original checkpoint, to show what quantization itself costs
  --backend NAME       PRECISION_BACKEND      cpu; the backend to be judged
  --device NAME        PRECISION_DEVICE       cpu; or npu, cuda: what that backend computes on
  --activation KIND    PRECISION_ACTIVATION   w8a8; or w8a16
  --dtype TYPE         PRECISION_DTYPE        float32; of everything but the FP8 weights
  --server ADDRESS     PRECISION_SERVER       none: also a run through a server, for example http://127.0.0.1:8000
  --server-name NAME   PRECISION_SERVER_NAME  server; what tables call that run, for example 'server, bfloat16'
  --limit N            PRECISION_LIMIT        all prompts
  --output FOLDER      PRECISION_OUTPUT       precision
  --python PATH        PYTHON                 .venv/bin/python of this project, else python3
  --dry-run                                   print the commands instead
  --help

Examples:
  scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --bf16 ./Qwen3-8B
  scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --backend ascendc --device npu --activation w8a16 --output npu
  scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --server http://127.0.0.1:8000 -- --greedy-tokens 32

Exit codes: 0 fine, 2 bad input or set-up.
TEXT
}

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_settings "$@"

fp8=${PRECISION_FP8:-}
bf16=${PRECISION_BF16:-}
backend=${PRECISION_BACKEND:-cpu}
device=${PRECISION_DEVICE:-cpu}
activation=${PRECISION_ACTIVATION:-w8a8}
dtype=${PRECISION_DTYPE:-float32}
server=${PRECISION_SERVER:-}
server_name=${PRECISION_SERVER_NAME:-server}
limit=${PRECISION_LIMIT:-}
output=${PRECISION_OUTPUT:-precision}

[ -n "$fp8" ] || fail "no checkpoint" "give --fp8 FOLDER"
one_of device "$device" cpu npu cuda
one_of activation "$activation" w8a8 w8a16
one_of dtype "$dtype" float32 bfloat16 float16
[ -z "$limit" ] || whole_number limit "$limit"
find_python
if [ -z "$dry_run" ]; then
  # Before anything takes minutes.
  for folder in "$fp8" ${bf16:+"$bf16"}; do
    [ -f "$folder/config.json" ] || fail "there is no checkpoint in $folder" "give a folder with a config.json"
  done
  code='import importlib.util as u; print(*(m for m in ("transformers", "matplotlib", "openai") if u.find_spec(m) is None))'
  missing=$("$PYTHON" -c "$code")
  [ -z "$missing" ] || fail "$PYTHON has no $missing" "$PYTHON -m pip install $missing"
fi

evaluate=("$PYTHON" -m qwen3_fp8_ascend eval-precision)
some=()
[ -z "$limit" ] || some=(--limit "$limit")
suffix=w8a8
[ "$activation" = w8a8 ] || suffix=w8a16
[ "$dtype" = float32 ] || suffix+=-$dtype

do_it() {
  if [ -n "$dry_run" ]; then quoted "$@"; else quoted "$@" >&2 && "$@"; fi
}

keep_or() { # FILE COMMAND...
  if [ -z "$dry_run" ] && [ -e "$1" ]; then echo "keeping $1" >&2; else do_it "${@:2}"; fi
}

make_run() { # NAME SOURCE OPTIONS...
  local file=$output/$1.run source=$2
  shift 2
  keep_or "$file" "${evaluate[@]}" run "$source" "$file" "$@" ${some[@]+"${some[@]}"} ${further[@]+"${further[@]}"}
}

same=(--activation "$activation" --dtype "$dtype")
compared=("$output/$backend-$suffix.run")
make_run "reference-$suffix" "$fp8" --backend reference "${same[@]}"
make_run "reference-fp64-$suffix" "$fp8" --backend reference-fp64 "${same[@]}"
make_run "$backend-$suffix" "$fp8" --backend "$backend" --device "$device" "${same[@]}"
if [ -n "$bf16" ]; then
  original=original
  [ "$dtype" = float32 ] || original+=-$dtype
  make_run "$original" "$bf16" --name original --dtype "$dtype"
  compared+=("$output/$original.run")
fi
if [ -n "$server" ]; then
  make_run "server-$suffix" "$server" --name "$server_name"
  compared+=("$output/server-$suffix.run")
fi
linears=$output/linears-$backend-$suffix.json
keep_or "$linears" "${evaluate[@]}" linears "$fp8" --backend "$backend" --device "$device" "${same[@]}" \
  ${some[@]+"${some[@]}"} --output "$linears"
result=$output/precision-$backend-$suffix
do_it "${evaluate[@]}" compare "$output/reference-$suffix.run" "${compared[@]}" \
  --floor "$output/reference-fp64-$suffix.run" --output "$result.json" --markdown "$result.md" --html "$result.html"
