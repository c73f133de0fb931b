"""Builds the native libraries; everything else about the package is in pyproject.toml.

A native library holds torch operators and nothing of Python: it uses torch's stable ABI only, so that one file
serves every Python and every torch that `qwen3_fp8_ascend/torch_range.py` names. CXX, CXXFLAGS and LDFLAGS work as
usual (sanitizers, debugging). A CXX that compiles for another architecture makes a wheel for that one, from the headers
of the torch that is found (make/aarch64.mk does so). QWEN3_FP8_ASCEND_OBJECTS is a folder that keeps compiled files, by
the hash of all that goes into them: what a later build would compile again it takes from there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

if int(setuptools.__version__.partition(".")[0]) < 77:  # pip does not look at pyproject.toml's bound in this mode
    raise SetupError(
        f"setuptools {setuptools.__version__} is too old to build qwen3-fp8-ascend.\n"
        "  expected: setuptools 77 or newer\n  what to do: pip install 'setuptools>=77,<81' wheel"
    )
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).parent))  # build backends do not put the project's folder there
from build_ascend import build_ascend_library, put_into_package
from qwen3_fp8_ascend import torch_range

CPU = Path("csrc") / "cpu"

OLDEST_REQUIREMENT = f"torch>={torch_range.OLDEST[0]}.{torch_range.OLDEST[1]}"

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the kernels say where they want a fused multiply-add
    "-frecord-gcc-switches",  # into the library, for `validate` to report (`provenance.built_with`)
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION={torch_range.TARGET_VERSION}",
]

AVX512F_FLAGS = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
AVX512F_FLAGS += ["-mfma", "-mf16c", "-mprefer-vector-width=512"]
# g++ 12 warns of its own intrinsics (GCC bug 105593).
AVX512F_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512_FLAGS = [*AVX512F_FLAGS, *(f"-mavx512{part}" for part in ("vbmi", "vbmi2", "bf16"))]

# In the order of the source the codes of the next strip are asked for and decoded first: 3 to 11 % faster with 2 to 4
# rows on Intel's cores.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-fno-schedule-insns2"]

NEON_FLAGS = ["-fno-schedule-insns"]  # g++ 12 decodes ahead until registers run out, and spills the sums

ISA_FLAGS = {
    "x86_64": {
        "avx2.cpp": AVX2_FLAGS,
        "avx512f.cpp": AVX512F_FLAGS,
        "avx512.cpp": AVX512_FLAGS,
        "amx.cpp": [*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"neon.cpp": NEON_FLAGS, "neon_bf16.cpp": [*NEON_FLAGS, "-march=armv8.2-a+bf16"]},
}
"""Files of one architecture, and the instruction set that each needs; what they define is called only where the
processor has it."""

GCC_ONLY = {"-fno-schedule-insns", "-fno-schedule-insns2", "-Wno-maybe-uninitialized"}
"""Flags that clang does not know; it would warn of each."""

OLDEST_COMPILERS = "g++ 11 (g++ 10 on AArch64) or clang 14"
"""The oldest that have compiled the kernels. Clang 16, of Debian 12, crashes at avx512.cpp."""


def native_libraries() -> list[Extension]:
    """The libraries that setuptools builds; CANN's compiler builds the NPU's (`build_ascend`)."""
    return [cpu_library()]


def cpu_library() -> Extension:
    paths = (path for path in CPU.glob("*.cpp") if is_compiled(path.name))
    # Files of an instruction set take longest, and are begun first.
    sources = [str(path) for path in sorted(paths, key=lambda path: (path.name not in of_one_isa(), path.name))]
    return Extension("qwen3_fp8_ascend._cpu", sources, depends=sorted(str(path) for path in CPU.glob("*.h")))


def is_compiled(name: str) -> bool:
    """Whether a file of csrc/cpu is for every architecture or for the target's."""
    return all(name not in files for machine, files in ISA_FLAGS.items() if machine != target_architecture())


def of_one_isa() -> dict[str, list[str]]:
    """The files of the target's instruction sets, with the flags that each needs."""
    return ISA_FLAGS.get(target_architecture(), {})


def flags_of(source: str) -> list[str]:
    flags = [*COMMON_FLAGS, *of_one_isa().get(Path(source).name, [])]
    return [flag for flag in flags if flag not in GCC_ONLY or not is_clang()]


def architecture_of(machine: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


@functools.cache
def target_architecture() -> str:
    """What the C++ compiler compiles for; this machine's architecture if there is none or it does not say."""
    try:
        done = subprocess.run([*cxx(), "-dumpmachine"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return architecture_of(platform.machine())
    return architecture_of(done.stdout.partition("-")[0])


@functools.cache
def is_clang() -> bool:
    macros = subprocess.run([*cxx(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False)
    return "__clang__" in macros.stdout


def is_cross_compiling() -> bool:
    return target_architecture() != architecture_of(platform.machine())


def compile_jobs() -> int:
    """How many files are compiled at a time: MAX_JOBS, as for torch's and vLLM's own builds, or a file each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("MAX_JOBS") or cores)


def torch_folder() -> Path:
    """Where the installed torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "torch is not installed in the environment that builds qwen3-fp8-ascend, and its headers are needed.\n"
            "  what to do: install torch first, then build in the same environment:\n"
            f"    pip install '{OLDEST_REQUIREMENT}' 'setuptools>=77'\n"
            "    pip install --no-build-isolation ."
        )
    folder = Path(spec.origin).parent
    version = torch_version(folder)
    if torch_range.is_too_old(version):
        raise SetupError(
            f"the installed torch is too old: the kernels are built for torch {torch_range.DESCRIBED}.\n"
            f"  where: {folder}\n  expected: torch {torch_range.DESCRIBED}\n  got: torch {version}\n"
            f"  what to do: build in an environment with a newer one (pip install '{OLDEST_REQUIREMENT}'); a vLLM that "
            "pins an older torch cannot use these kernels"
        )
    if torch_range.is_untried(version):
        print(
            f"torch {version} is newer than what the kernels were tried with ({torch_range.DESCRIBED}); "
            "its stable C++ interface should serve them all the same",
            file=sys.stderr,
        )
    return folder


def torch_version(folder: Path) -> str:
    """The version in torch's folder, which is what will be compiled against, whatever its metadata says."""
    found = re.search(r"__version__ = ['\"](\d[^'\"]*)", (folder / "version.py").read_text())
    if found is None:
        raise SetupError(
            "the installed torch does not say which version it is.\n"
            f"  where: {folder / 'version.py'}\n  what to do: install it again: pip install --force-reinstall torch"
        )
    return found[1]


def require_compiler(command: list[str]) -> None:
    """A compiler that is there and knows the instructions of every file: an older one would say so of one flag."""
    if shutil.which(command[0]) is None:
        raise SetupError(
            f"no C++ compiler: {command[0]!r} was not found, and without the native kernels this package would be "
            "hundreds of times slower.\n"
            "  what to do: install one (Debian/Ubuntu: apt-get install g++; Fedora/openEuler: dnf install gcc-c++; "
            "conda: conda install gxx), or name yours in the environment variable CXX"
        )
    for source in of_one_isa():
        done = subprocess.run(
            [*cxx(), *flags_of(source), "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True, text=True
        )
        if done.returncode != 0:
            version = subprocess.run([*cxx(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
            raise SetupError(
                f"the C++ compiler cannot make the instructions of {CPU / source}.\n"
                f"  expected: {OLDEST_COMPILERS}, or newer\n  got: {version}\n"
                f"  it says: {done.stderr.strip().partition(chr(10))[0]}\n"
                "  what to do: install a newer one beside it (Debian/Ubuntu: a package such as g++-12; "
                "conda: conda install gxx), and name it in the environment variable CXX"
            )


class KeptObjects:
    """Compiled files by the hash of what goes into them: sources and headers, the command, the compiler, torch.

    One that no build has used for `DAYS` days goes.
    """

    DAYS = 14

    def __init__(self, folder: Path, command: list[str], torch: Path, headers: list[str]) -> None:
        self._folder = folder
        compiler = subprocess.run([*cxx(), "--version"], capture_output=True, text=True, check=True).stdout
        searched = [os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")]
        self._common = hashlib.sha256("\0".join((*command, compiler, *searched)).encode())
        for path in (torch / "version.py", *map(Path, headers)):
            self._common.update(path.read_bytes())
        folder.mkdir(parents=True, exist_ok=True)
        for kept in folder.glob("*.o"):
            if time.time() - kept.stat().st_mtime > self.DAYS * 86400:
                kept.unlink(missing_ok=True)

    def compiled(self, source: str, flags: list[str], compile_it: Callable[[], str]) -> str:
        """The object of a source, which `compile_it` makes where it is not kept yet."""
        digest = self._common.copy()
        digest.update("\0".join((source, *flags, "")).encode() + Path(source).read_bytes())
        kept = self._folder / f"{Path(source).stem}-{digest.hexdigest()[:32]}.o"
        if not kept.exists():
            part = kept.with_name(f"{kept.name}.{os.getpid()}")
            shutil.copy2(compile_it(), part)
            os.replace(part, kept)
        os.utime(kept)
        return str(kept)


class BuildLibraries(build_ext):
    """Compiles each file with the flags of its instruction set, and links one library without a Python in it."""

    def run(self) -> None:
        try:
            npu_library = build_ascend_library(Path(self.build_temp) / "ascend")
        except RuntimeError as error:
            raise SetupError(str(error)) from error
        super().run()
        if npu_library is not None:
            put_into_package(npu_library, Path(self.get_ext_fullpath("qwen3_fp8_ascend._cpu")).parent)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        compiler = self.compiler
        require_compiler(compiler.compiler_so_cxx)
        if is_clang():
            print("clang's kernels take up to twice the time of g++'s (docs/cpu.md, Compilers)", file=sys.stderr)
        if is_cross_compiling():  # the flags that this Python was built with are those of its own architecture
            compiler.set_executables(
                compiler_so_cxx=[*cxx(), "-fPIC", *shlex.split(os.environ.get("CXXFLAGS", ""))],
                linker_so_cxx=[*cxx(), "-shared", *shlex.split(os.environ.get("LDFLAGS", ""))],
            )

        def compile_it(source: str, flags: list[str]) -> str:
            (made,) = compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[],
                debug=self.debug,
                extra_postargs=flags,
                depends=ext.depends,
            )
            return made

        folder = os.environ.get("QWEN3_FP8_ASCEND_OBJECTS")
        kept = KeptObjects(Path(folder), compiler.compiler_so_cxx, torch, ext.depends) if folder else None

        def compiled(source: str) -> str:
            flags = ["-isystem", str(torch / "include"), *flags_of(source)]
            make = functools.partial(compile_it, source, flags)
            return kept.compiled(source, [*flags, str(self.debug)], make) if kept else make()

        os.makedirs(os.path.join(self.build_temp, CPU), exist_ok=True)  # older setuptools: two threads may not
        with ThreadPoolExecutor(self.parallel or compile_jobs()) as pool:  # after an error no further file is begun
            objects = list(pool.map(compiled, ext.sources))
        library = self.get_ext_fullpath(ext.name)
        linked = os.path.join(self.build_temp, os.path.basename(library))
        compiler.link_shared_object(
            objects,
            linked,
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            debug=self.debug,
            target_lang="c++",
        )
        self.mkpath(os.path.dirname(library))
        shutil.copy2(linked, library + ".new")
        os.replace(library + ".new", library)  # a linker that fails leaves an earlier library as it was


class PlatformWheel(bdist_wheel):
    """The wheel depends on the processor and the operating system, but on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2]
        if is_cross_compiling() and not self.plat_name_supplied:
            tag = tag.replace(platform.machine().lower(), target_architecture())
        return "py3", "none", tag

    def run(self) -> None:
        # setuptools packs whatever lies there, also what an earlier version of the sources had and this one has not.
        if not self.distribution.have_run.get("build"):
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":  # tests/support/sanitizers imports the flags
    setup(ext_modules=native_libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
