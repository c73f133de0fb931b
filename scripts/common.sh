# What the scripts share; they source it.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # WHAT FIX
  printf 'error: %s; what to do: %s\n' "$1" "$2" >&2
  exit 2
}

quoted() { # WORDS...: one line that a shell takes back as the same words
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# A script's `usage` lists its settings: "  --flag VALUE  VARIABLE  what it is". A flag sets the variable beside it, so
# that the script reads variables alone. A switch, which has neither value nor variable, becomes 1 under its own name
# ($dry_run). What follows -- is left in `further`.
read_settings() { # ARGUMENTS...
  local listed name
  listed=$'\n'$(usage)
  # shellcheck disable=SC2034 # the scripts read them
  further=() dry_run='' json='' install=''
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage; exit 0 ;;
      --) further=("${@:2}"); break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    if [[ $1 == --* && $listed =~ $'\n'"  $1 "[^\ ]+\ +([A-Z][A-Z0-9_]+)\  ]]; then
      [ $# -ge 2 ] || fail "$1 needs a value" "see --help"
      export "${BASH_REMATCH[1]}=$2"
      shift 2
    elif [[ $1 == --* && $listed == *$'\n'"  $1  "* ]]; then
      name=${1#--}
      printf -v "${name//-/_}" 1
      shift
    else
      fail "unknown setting $1" "see --help; further arguments, where there are any, go after --"
    fi
  done
  [ "${#further[@]}" = 0 ] || [[ $listed == *"-- FURTHER"* ]] || fail "unknown setting ${further[0]}" "see --help"
}

find_python() { # sets $PYTHON, if nobody has, to this project's environment if there is one, else to python3
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
  fi
  export PYTHON
  command -v "$PYTHON" >/dev/null || fail "no $PYTHON" "install Python 3.10 to 3.13, or give --python"
}

one_of() { # SETTING VALUE CHOICES...
  local setting=$1 value=$2 choice
  shift 2
  for choice in "$@"; do [ "$value" != "$choice" ] || return 0; done
  fail "--$setting is ${value:-empty}" "choose one of: $*"
}

whole_number() { # SETTING VALUE
  [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$1 is ${2:-empty}" "give a whole number from 1"
}
