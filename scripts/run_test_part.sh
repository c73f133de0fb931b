#!/usr/bin/env bash
# Runs a part of `make test` and notes what it cost: seconds on the clock, beside other parts, and seconds of processors.
# Usage: scripts/run_test_part.sh PART FOLDER        PART is a target of make
# Environment: MAKE; MISSING, why the part cannot run here: it is skipped then, but in CI, where it fails
#
# `test-main` is heard while it runs. The others are silent until they are done, so that lines of two never mix.
set -uo pipefail
part=$1 folder=$2

# One thing after the other within a part, and no jobserver for what its tests build.
MAKEFLAGS=$(sed -E 's/ *(-j[0-9]*|--jobserver-[a-z]+=[^ ]*)//g' <<<"${MAKEFLAGS-}")
export MAKEFLAGS

if [ -n "${MISSING-}" ]; then
  printf '%s\n' "skipped: $part: $MISSING"
  printf '%5d s, of processors %5d s  %s (%s)\n' 0 0 "$part" "skipped: $MISSING" >"$folder/$part.cost"
  [ -z "${CI-}" ] || { echo "error: CI runs every part, and $part cannot run" >&2; exit 2; }
  exit
fi

SECONDS=0 status=0
if [ "$part" = test-main ]; then
  ${MAKE:-make} --no-print-directory "$part" || status=$?
else
  ${MAKE:-make} --no-print-directory "$part" >"$folder/$part.log" 2>&1 || status=$?
  cat "$folder/$part.log"
fi
times >"$folder/$part.times"
awk -v clock="$SECONDS" -v part="$part" -v status="$status" '
  FNR == 2 { split($0, t, /[ms ]+/); used = 60 * (t[1] + t[3]) + t[2] + t[4] }
  END { printf "%5d s, of processors %5.0f s  %s%s\n", clock, used, part, status == 0 ? "" : " (failed)" }
' "$folder/$part.times" >"$folder/$part.cost"
exit "$status"
