#!/usr/bin/env bash
# Prints the first Python of a range of versions that can make environments: PYTHON, or else one on PATH; nothing if
# there is none.
# Usage: scripts/find_python.sh OLDEST NEWEST, as in `3.10 3.11`        Environment: PYTHON (default python3)
set -euo pipefail
oldest=${1#3.} newest=${2#3.}
fits() { "$1" -c "import ensurepip, sys, venv; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; }
candidates=("${PYTHON:-python3}")
for ((minor = newest; minor >= oldest; minor--)); do candidates+=("python3.$minor"); done
for python in "${candidates[@]}"; do
  if fits "$python"; then
    command -v "$python"
    exit
  fi
done
