# What the scripts share; they source it.
# shellcheck shell=bash

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

one_of() { # SETTING VALUE CHOICES...
  local setting=$1 value=$2 choice
  shift 2
  for choice in "$@"; do [ "$value" != "$choice" ] || return 0; done
  fail "--$setting is ${value:-empty}" "choose one of: $*"
}

whole_number() { # SETTING VALUE
  [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$1 is ${2:-empty}" "give a whole number from 1"
}

find_python() { # PATH OR EMPTY, ROOT: this project's environment if there is one, else python3
  local python=$1
  if [ -z "$python" ]; then
    python=python3
    [ ! -x "$2/.venv/bin/python" ] || python=$2/.venv/bin/python
  fi
  command -v "$python" >/dev/null || fail "no $python" "install Python 3.10 to 3.13, or give --python"
  printf '%s\n' "$python"
}
