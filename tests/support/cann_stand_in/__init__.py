"""Installs the stand-in for a CANN toolkit and reads what its programs recorded; README.md says what it stands for."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
VERSIONS = ("8.5", "9.0", "9.1")


@dataclass(frozen=True)
class Step:
    """One command of a build: `step` is compile or link."""

    program: str
    step: str
    source: str
    arguments: tuple[str, ...]
    kernels: dict[str, dict[str, str]]

    @property
    def line(self) -> str:
        return " ".join((self.program, *self.arguments))


@dataclass(frozen=True)
class StandIn:
    home: Path
    python_path: Path
    """Has a `torch_npu`, as far as a build looks at it."""
    cxx: Path
    record: Path

    def environment(self) -> dict[str, str]:
        """What set_env.sh and pip would leave, with ASCEND_HOME_PATH as the only trace of CANN."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("ASC", "CMAKE_", "LD_PRELOAD"))
        }
        paths = [str(self.python_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return kept | {
            "ASCEND_HOME_PATH": str(self.home),
            "CANN_STAND_IN_RECORD": str(self.record),
            "CXX": str(self.cxx),
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def steps(self) -> list[Step]:
        if not self.record.exists():
            return []
        records = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [
            Step(r["program"], r["step"], r["source"], tuple(r["arguments"]), r.get("kernels", {})) for r in records
        ]


def install(folder: Path, version: str) -> StandIn:
    """A toolkit of that version in `folder`."""
    major, minor = version.split(".")
    home = folder / "cann"
    old = int(major) < 9
    modules = home / "compiler" / "tikcpp" / "ascendc_kernel_cmake" / ("ASC_CMake" if old else "asc_modules")
    shutil.copytree(HERE / "cmake", modules, ignore=shutil.ignore_patterns("package.cmake"))
    (modules / "version.cmake").write_text(f"set(STAND_IN_VERSION {version})\n")
    package = home / "lib64" / "cmake" / ("ASCConfig.cmake" if old else "asc-config.cmake")
    package.parent.mkdir(parents=True)
    package.write_text((HERE / "cmake" / "package.cmake").read_text().replace("@MODULES@", modules.name))
    header = home / "include" / ("ascendc" if old else "version") / "asc_devkit_version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define ASC_DEVKIT_MAJOR {major}\n#define ASC_DEVKIT_MINOR {minor}\n#define ASC_DEVKIT_PATCH 0\n"
    )
    compiler = home / f"{platform.machine()}-linux" / "ccec_compiler" / "bin"
    cxx = folder / "host" / "host-c++"
    for program in (compiler / "bisheng", cxx):
        program.parent.mkdir(parents=True)
        program.write_text((HERE / "programs.py").read_text().replace("/usr/bin/env python3", sys.executable, 1))
        program.chmod(0o755)
    (compiler / "include").mkdir()
    (compiler / "include" / "kernel_operator.h").write_text("// the real one comes with CANN\n")
    python_path = folder / "python"
    (python_path / "torch_npu" / "include").mkdir(parents=True)
    (python_path / "torch_npu" / "__init__.py").write_text("")
    return StandIn(home, python_path, cxx, folder / "record.jsonl")
