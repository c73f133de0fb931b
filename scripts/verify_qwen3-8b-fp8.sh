#!/usr/bin/env bash
# Waits for a server and asks it the three questions of the verification report. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/verify_qwen3-8b-fp8.sh [SETTINGS]

Waits until a server answers, asks it to complete a text, to do a sum (the answer is 60 km/h) and to speak Chinese,
judges the answers and prints them in the form of the verification report. Each setting is a flag or a variable; the
flag wins.

  --url ADDRESS       VERIFY_URL        http://127.0.0.1:8000
  --model NAME        VERIFY_MODEL      the first one that the server lists
  --languages LIST    VERIFY_LANGUAGES  en,zh: what the model speaks; other questions are asked but not judged
  --form LANGUAGE     VERIFY_FORM       zh; or en
  --wait SECONDS      VERIFY_WAIT       600
  --output FILE       VERIFY_OUTPUT     none; JSON, also when the report is printed
  --python PATH       PYTHON            .venv/bin/python of this project, else python3
  --json                                print JSON instead of the report
  --dry-run                             print the command instead
  --help

Examples:
  scripts/verify_qwen3-8b-fp8.sh
  scripts/verify_qwen3-8b-fp8.sh --url http://127.0.0.1:8001 --form en --output verify.json
  scripts/verify_qwen3-8b-fp8.sh --json --wait 0 | jq '.answers[].verdict'

Exit codes: 0 all answers are good, 1 one is not, 2 no server, no such model, or bad input.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/common.sh
. "$root/scripts/common.sh"

url=${VERIFY_URL:-http://127.0.0.1:8000}
model=${VERIFY_MODEL:-}
languages=${VERIFY_LANGUAGES:-en,zh}
form=${VERIFY_FORM:-zh}
wait=${VERIFY_WAIT:-600}
output=${VERIFY_OUTPUT:-}
python=${PYTHON:-}
json=
dry_run=

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --json) json=1; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
  esac
  case $1 in
    --url | --model | --languages | --form | --wait | --output | --python)
      [ $# -ge 2 ] || fail "$1 needs a value" "see --help"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) fail "unknown setting $1" "see --help" ;;
  esac
done
python=$(find_python "$python" "$root")

command=("$python" -m qwen3_fp8_ascend verify "$url" --wait "$wait" --form "$form")
IFS=, read -ra spoken <<<"$languages"
for language in "${spoken[@]}"; do command+=(--language "$language"); done
[ -z "$model" ] || command+=(--model "$model")
[ -z "$output" ] || command+=(--output "$output")
[ -z "$json" ] || command+=(--json)
if [ -n "$dry_run" ]; then
  quoted "${command[@]}"
  exit 0
fi
exec "${command[@]}"
