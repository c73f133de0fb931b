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

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_settings "$@"
find_python

command=("$PYTHON" -m qwen3_fp8_ascend verify "${VERIFY_URL:-http://127.0.0.1:8000}" --wait "${VERIFY_WAIT:-600}"
  --form "${VERIFY_FORM:-zh}")
IFS=, read -ra spoken <<<"${VERIFY_LANGUAGES:-en,zh}"
for language in "${spoken[@]}"; do command+=(--language "$language"); done
[ -z "${VERIFY_MODEL:-}" ] || command+=(--model "$VERIFY_MODEL")
[ -z "${VERIFY_OUTPUT:-}" ] || command+=(--output "$VERIFY_OUTPUT")
[ -z "$json" ] || command+=(--json)
if [ -n "$dry_run" ]; then
  quoted "${command[@]}"
  exit 0
fi
exec "${command[@]}"
