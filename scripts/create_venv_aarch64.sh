#!/usr/bin/env bash
# Creates the environment of `make test-aarch64`, see make/aarch64.mk: an AArch64 Python with torch, to run under qemu.
# Usage: scripts/create_venv_aarch64.sh VENV TORCH_VERSION        Environment: PYTHON (default python3), to make it with
#        scripts/create_venv_aarch64.sh --missing                 prints what this machine lacks for it, if anything
#
# Nothing of it is installed into this machine, but for the cross-compiler and qemu where root may use apt-get:
#   VENV/root           Debian's (or Ubuntu's) arm64 packages of Python and of what it needs, unpacked
#   VENV/site-packages  AArch64 wheels: torch, and what the tests need
#   VENV/bin/python-*   that Python under qemu, as a processor of this name; the project comes from the current folder
set -euo pipefail
compiler=aarch64-linux-gnu-g++ qemu=qemu-aarch64-static
has() { command -v "$1" >/dev/null; }
fail() { printf 'error: %s\n  what to do: %s\n' "$1" "$2" >&2; exit 2; }

missing() {
  for program in apt-get dpkg-deb; do
    has "$program" || { echo "no $program, and the AArch64 Python comes from packages of Debian or Ubuntu"; return; }
  done
  for program in "$compiler" "$qemu"; do  # root installs them
    has "$program" || [ "$(id -u)" = 0 ] || { echo "no $program (apt-get install g++-aarch64-linux-gnu qemu-user-static)"; return; }
  done
}
lacks=$(missing)
if [ "$1" = --missing ]; then
  echo "$lacks"
  exit
fi
[ -z "$lacks" ] ||
  fail "$lacks" "install it, or run this in a container: docker run -v \"\$PWD\":/src -w /src debian:12"

mkdir -p "$1"
venv=$(cd "$1" && pwd) torch=$2
python=${PYTHON:-python3}
processors=(max neoverse-n1)
if ! has "$compiler" || ! has "$qemu"; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user-static
fi

# apt with lists, cache and an empty status of its own: it resolves for arm64 and never looks at what is installed here.
apt=$venv/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/parts"
: >"$apt/status"
sources=()
# Debian's mirrors have every architecture. Ubuntu's have those of PCs, and arm64 elsewhere.
if grep -qx ID=ubuntu /etc/os-release && [ "$(dpkg --print-architecture)" != arm64 ]; then
  codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  echo "deb http://ports.ubuntu.com/ubuntu-ports $codename main universe" >"$apt/sources.list"
  sources=(-o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/parts")
fi
arm64_apt() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root \
    -o Dir::State::Lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
    "${sources[@]}" -o Debug::NoLocking=1 -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}
echo "downloading an arm64 Python (16 MB)"
# A source without arm64 packages fails, and others have them: what matters is whether Python can be had.
arm64_apt update || true
arm64_apt install -y --no-install-recommends --download-only python3 libstdc++6 >/dev/null ||
  fail "apt-get finds no arm64 packages in its sources" \
    "see the errors above; a mirror of arm64 packages has to be reachable. Or run this in a container of debian:12"
rm -rf "${venv:?}"/{root,site-packages,bin}
mkdir -p "$venv/root" "$venv/bin"
for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$venv/root"; done
version=$(find "$venv/root/usr/bin" -name 'python3.*' -printf '%f\n' | sed -n 's/^python\(3\.[0-9]*\)$/\1/p' | head -1)
[ -n "$version" ] || fail "the arm64 packages hold no Python" "rm -r $venv, and run this again"

echo "downloading AArch64 wheels: torch $torch (146 MB) and the test tools"
# Hypothesis reads the sources of all that is imported from a folder of another name, for numbers that occur in them.
# For a Python beside which nothing is installed: pip would compare these wheels with what is there.
"$python" -m venv --clear --without-pip "$venv/host"
pip_install() {
  "$python" -m pip --python "$venv/host/bin/python" --disable-pip-version-check --no-input install -qq \
    --no-warn-script-location --no-compile \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    --python-version "$version" --implementation cp --only-binary=:all: --target "$venv/site-packages" "$@"
}
# Without dependencies, since pip judges their markers by the machine that it runs on: it would fetch CUDA.
pip_install --no-deps "torch==$torch"
pip_install --upgrade numpy filelock 'typing-extensions>=4.10' 'sympy>=1.13.3' networkx jinja2 fsspec \
  'pytest>=8.3' 'pytest-timeout>=2.3' 'hypothesis>=6.120' 'safetensors>=0.5' 'typer>=0.15' 'rich>=13.7' 'packaging>=23'

for processor in "${processors[@]}"; do
  launcher=$venv/bin/python-$processor
  # Pointer authentication, which qemu computes at every call and return, would take a third of the time. The kernels use
  # no SVE; without it, torch's own paths are for NEON here too.
  model=$processor
  [ "$processor" != max ] || model=max,pauth=off,sve=off
  # argv[0] is the launcher itself: that is what sys.executable then names, and what tests start other Pythons with.
  cat >"$launcher" <<LAUNCHER
#!/bin/sh
export QEMU_LD_PREFIX="$venv/root" PYTHONHOME="$venv/root/usr" PYTHONPATH="\$PWD:$venv/site-packages"
unset PYTHONDONTWRITEBYTECODE
exec $qemu -cpu $model -0 "$launcher" "$venv/root/usr/bin/python$version" "\$@"
LAUNCHER
  chmod +x "$launcher"
done
echo "compiling the Python files that tests import (once)"
# By this machine's Python where it writes the same bytecode, since that takes a tenth of the time that it takes under
# qemu: what is imported here of the same packages. qemu compiles the rest, or all of it, when the long form imports it.
"$python" - "$version" "$venv" <<'NATIVELY'
import compileall
import importlib
import sys
from pathlib import Path

version, venv = sys.argv[1], Path(sys.argv[2])
folders = [venv / "site-packages", venv.joinpath("root", "usr", "lib", f"python{version}")]
if version != f"{sys.version_info.major}.{sys.version_info.minor}":
    sys.exit()
for name in ("torch", "hypothesis.extra.numpy", "pytest", "safetensors", "typer", "rich"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
files = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
here = [Path(path) for path in sorted(filter(None, sys.path), key=len, reverse=True)]
for file in files:
    place = next((path for path in here if path in file.parents), None)
    for twin in (folder / file.relative_to(place) for folder in folders if place and file.suffix == ".py"):
        if twin.is_file():
            compileall.compile_file(twin, quiet=2)
NATIVELY
