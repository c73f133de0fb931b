"""What pip cannot install of vLLM-Ascend on a machine without CANN.

`python -m tests.support.vllm_ascend_environment VENV RELEASE VLLM` downloads vLLM-Ascend's sources into
VENV/releases/RELEASE, writes the metadata and build information that its build would, makes stubs of the CANN
libraries in VENV/cann-stubs, and writes VENV/bin/python-RELEASE.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

from tests.support import device_guard

GUARD_LIBRARY = "npu_device_guard.so"

CHIP = "A2"
"""What the build would have found; tests that are about another chip say so themselves."""


def main(venv: Path, release: str, vllm: str) -> None:
    folder = venv / "releases" / release
    source = download_sources("vllm-ascend", release, folder)
    link = folder / "vllm_ascend"
    if not link.exists():
        link.symlink_to((source / "vllm_ascend").resolve(), target_is_directory=True)
    (source / "vllm_ascend" / "_build_info.py").write_text(f"__device_type__ = {CHIP!r}\n")
    entry_points = (source / "vllm_ascend.egg-info" / "entry_points.txt").read_text()
    write_metadata(folder, "vllm_ascend", release, entry_points)
    # On an Ascend machine vLLM is built without kernels, and its version says so.
    write_metadata(folder, "vllm", f"{vllm}+empty")
    stubs = venv / "cann-stubs"
    if not stubs.exists():
        make_cann_stubs(stubs)
        device_guard.build(stubs / GUARD_LIBRARY, "PrivateUse1")
    write_launcher(venv, release, source)


def download_sources(name: str, version: str, folder: Path) -> Path:
    """Unpack a source distribution from the package index that pip uses; its build is not run."""
    index = index_url().rstrip("/")
    page = urllib.request.urlopen(f"{index}/{name}/").read().decode()
    file = f"{name.replace('-', '_')}-{version}.tar.gz"
    match = re.search(rf'href="([^"]*/{re.escape(file)}[^"]*)"', page)
    if match is None:
        sys.exit(f"{file} is not on the package index")
    url, _, digest = urllib.parse.urljoin(f"{index}/{name}/", match.group(1)).partition("#sha256=")
    data = urllib.request.urlopen(url).read()
    if digest and hashlib.sha256(data).hexdigest() != digest:
        sys.exit(f"{file} was damaged on its way: run this again")
    archive = folder / file
    archive.write_bytes(data)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return folder / file.removesuffix(".tar.gz")


def index_url() -> str:
    """pip's package index: from the environment, its configuration, or PyPI."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "https://pypi.org/simple"


def write_metadata(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """A distribution's metadata as an installation leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def make_cann_stubs(folder: Path) -> None:
    """Libraries under CANN's names in which every symbol that torch_npu leaves open is a function that returns 0.

    With them `import torch_npu` works, and so do operator schemas, meta and FakeTensor kernels; nothing can run.
    """
    folder.mkdir(parents=True)
    ours = sorted(_package_folder("torch_npu").rglob("*.so"))
    torch = _package_folder("torch")
    present = {file.name for file in [*_package_folder("torch_npu").rglob("*.so*"), *torch.rglob("*.so*")]}
    known = _run("ldconfig", "-p")
    needed = {name for file in ours for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", _run("readelf", "-d", str(file)))}
    missing = sorted(
        name for name in needed - present if f"{name} " not in known and not name.startswith(("libpython", "ld-linux"))
    )
    defined = {name for file in [*ours, *sorted(torch.rglob("*.so"))] for name in _symbols(file, "--defined-only")}
    open_symbols = {name for file in ours for name in _symbols(file, "--undefined-only", kind="U")}
    symbols = sorted(name for name in open_symbols - defined if not name.startswith(("Py", "_Py")))
    # In C, so that it is right for any processor; a C++ symbol's mangled name is a C identifier.
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"long {s}(void) {{ return 0; }}\n" for s in symbols))
    for number, name in enumerate(missing):
        source = [str(stubs)] if number == 0 else ["-x", "c", os.devnull]
        options = ["-shared", "-fPIC", "-nostdlib", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", str(folder / name), *source], check=True)
    print(f"stubs of {', '.join(missing)} with {len(symbols)} symbols")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"{name} is not installed in this environment")
    return Path(spec.origin).parent


def _run(*command: str) -> str:
    search = os.environ["PATH"] + ":/sbin:/usr/sbin"
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": search}).stdout


def _symbols(file: Path, choice: str, kind: str | None = None) -> set[str]:
    """Dynamic symbols without a version, of one kind (weak ones are another) or of all."""
    rows = [line.split() for line in _run("nm", "-D", choice, str(file)).splitlines() if line.strip()]
    if kind is None:
        return {row[-1].partition("@")[0] for row in rows}
    return {row[-1] for row in rows if row[-2] == kind and "@" not in row[-1]}


def write_launcher(venv: Path, release: str, source: Path) -> None:
    """A Python with one release on its path; the project's package comes from the current folder."""
    launcher = venv / "bin" / f"python-{release}"
    variables = {
        "LD_LIBRARY_PATH": (venv / "cann-stubs").resolve(),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": 0,
        "NPU_DEVICE_GUARD": (venv / "cann-stubs" / GUARD_LIBRARY).resolve(),
        "ASCEND_SOURCE": source.resolve(),
        # What vLLM finds out about a model's class is kept under its name alone, whichever release has looked.
        "VLLM_CACHE_ROOT": (venv / "releases" / release / "cache").resolve(),
    }
    lines = [f"export {name}={value}" for name, value in variables.items()]
    lines.append(f'export PYTHONPATH="$PWD:{(venv / "releases" / release).resolve()}"')
    lines.append(f'exec "{(venv / "bin" / "python").absolute()}" "$@"')
    launcher.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    launcher.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
