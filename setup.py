"""Builds the native libraries; everything else about the package is in pyproject.toml.

A native library holds torch operators and nothing of Python: it uses torch's stable ABI only, so that one file
serves every Python and every torch since 2.10. CXX, CXXFLAGS and LDFLAGS work as usual (sanitizers, debugging).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
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
from build_ascend import build_ascend_library

CPU = Path("csrc") / "cpu"

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the kernels say where they want a fused multiply-add
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10
]

AVX512_FLAGS = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "bf16")]
AVX512_FLAGS += ["-mfma", "-mf16c", "-mprefer-vector-width=512"]
AVX512_FLAGS += ["-Wno-maybe-uninitialized"]  # g++ 12 warns of its own intrinsics (GCC bug 105593)

ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": AVX512_FLAGS,
    "amx.cpp": [*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16"],
}
"""Files that need an instruction set of their own; what they define is called only where the processor has it."""


def native_libraries() -> list[Extension]:
    """The libraries that setuptools builds; CANN's compiler builds the NPU's (`build_ascend`)."""
    return [cpu_library()]


def cpu_library() -> Extension:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = sorted(str(path) for path in CPU.glob("*.cpp") if x86 or path.name not in ISA_FLAGS)
    return Extension("qwen3_fp8_ascend._cpu", sources, depends=sorted(str(path) for path in CPU.glob("*.h")))


def flags_of(source: str) -> list[str]:
    return [*COMMON_FLAGS, *ISA_FLAGS.get(Path(source).name, [])]


def torch_folder() -> Path:
    """Where the installed torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "torch is not installed in the environment that builds qwen3-fp8-ascend, and its headers are needed.\n"
            "  what to do: install torch first, then build in the same environment:\n"
            "    pip install 'torch>=2.10' 'setuptools>=77'\n"
            "    pip install --no-build-isolation ."
        )
    folder = Path(spec.origin).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise SetupError(
            "the installed torch is too old: it has no stable C++ interface.\n"
            f"  where: {folder}\n  expected: torch 2.10 or newer\n  what to do: pip install 'torch>=2.10'"
        )
    return folder


def require_compiler(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise SetupError(
            f"no C++ compiler: {command[0]!r} was not found, and without the native kernels this package would be "
            "hundreds of times slower.\n"
            "  what to do: install one (Debian/Ubuntu: apt-get install g++; Fedora/openEuler: dnf install gcc-c++; "
            "conda: conda install gxx), or name yours in the environment variable CXX"
        )


class BuildLibraries(build_ext):
    """Compiles each file with the flags of its instruction set, and links one library without a Python in it."""

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("qwen3_fp8_ascend._cpu")).parent
        try:
            build_ascend_library(Path(self.build_temp) / "ascend", package)
        except RuntimeError as error:
            raise SetupError(str(error)) from error

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        compiler = self.compiler
        require_compiler(compiler.compiler_so_cxx)
        objects = []
        for source in ext.sources:
            objects += compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[],
                debug=self.debug,
                extra_postargs=["-isystem", str(torch / "include"), *flags_of(source)],
                depends=ext.depends,
            )
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
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        # setuptools packs whatever lies there, also what an earlier version of the sources had and this one has not.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


if __name__ == "__main__":  # tests/support/sanitizers imports the flags
    setup(ext_modules=native_libraries(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
