"""Builds csrc/cpu with sanitizers and runs tests of the CPU backend against that library, in a process of its own.

A variant compiles a copy of the sources, in which single lines are replaced: what is wrong on purpose (a planted
defect), and what lets a sanitizer see more than in production. The package itself is not changed and has no switch
for this.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from qwen3_fp8_ascend.backends import cpu
from tests.support.preloaded import Preloaded

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc" / "cpu"
CACHE = ROOT / ".cache" / "sanitizers"
DAYS_KEPT = 14
COMPILER = os.environ.get("CXX", "g++")

QUICK = "-Og"
"""The level of optimization with which the compiler is done first: it inlines nothing unless it has to.

With the address sanitizer, AMX's kernels take half the time, and the tests no longer.
"""

X86 = platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Edit:
    """One place of the sources, given by its text, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """A way to build the library: sanitizers, the run-time library that has to be loaded first, edits.

    `includes` are headers of this folder that come before a file's first line; `unwatched` are files that are compiled
    without sanitizers.
    """

    name: str
    flags: tuple[str, ...]
    runtime: str
    options: tuple[tuple[str, str], ...]
    edits: tuple[Edit, ...] = ()
    includes: tuple[tuple[str, str], ...] = ()
    unwatched: tuple[str, ...] = ()

    def with_edits(self, *edits: Edit) -> Variant:
        return replace(self, edits=(*self.edits, *edits))

    def without(self, *files: str) -> Variant:
        """With these files compiled without sanitizers, which takes a tenth of the time for AMX's kernels."""
        return replace(self, unwatched=files)

    def optimized(self) -> Variant:
        """At the optimization level of the library that is shipped."""
        flags = tuple("-O3" if flag in (QUICK, "-O1") else flag for flag in self.flags)
        return replace(self, name=f"{self.name}-O3", flags=flags)


EMULATED_AMX = (
    # Every processor that has AVX-512 is taken to have AMX.
    Edit("isa.cpp", "if (amx) return Isa::amx;", "(void)amx;\n  return Isa::amx;"),
    Edit("isa.cpp", "&& request_tiles()", "|| request_tiles()"),
)
CUT_FINELY = (
    # Problems small enough for a property test are cut into parts for several threads.
    Edit("linear.cpp", "kLeastBytesPerThread = 1 << 17", "kLeastBytesPerThread = 1 << 9"),
    Edit("linear.cpp", "kLeastNumbersPerThread = 1 << 15", "kLeastNumbersPerThread = 1 << 6"),
    Edit("expert_shares.h", "kLeastTaskBytesPerThread = 1 << 17", "kLeastTaskBytesPerThread = 1 << 9"),
    Edit("expert_shares.h", "kLeastRowNumbersPerThread = 1 << 15", "kLeastRowNumbersPerThread = 1 << 6"),
    Edit("expert_shares.cpp", "kTaskBytes = 1 << 18", "kTaskBytes = 1 << 10"),
    # A few tokens are several passes.
    Edit("expert_shares.h", "kMostBytes = 256 << 20", "kMostBytes = 1 << 16"),
    Edit("pack.cpp", "kLeastPanelsPerThread = 4", "kLeastPanelsPerThread = 1"),
    Edit("read.cpp", "parallel(chunks, 64,", "parallel(chunks, 1,"),
)
EXACT_SCRATCH = (
    # Memory kept between calls is never larger than asked for, and never holds what an earlier call left there: numbers
    # that are used without having been written are NaN.
    Edit("scratch.h", "if (bytes > size_)", "if (true)"),
    Edit("scratch.h", "size_ = bytes;", "size_ = bytes;\n      std::memset(memory_.get(), 0xff, bytes);"),
    Edit("scratch.h", "#include <cstddef>", "#include <cstddef>\n#include <cstring>"),
)

ADDRESS = Variant(
    "address-undefined",
    (QUICK, "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "libasan.so",
    (
        # The interpreter leaks by design. Looking for use after return, g++ 13's default, misaligns variables of 64
        # bytes (GCC bug 110027).
        ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:exitcode=66"),
        ("UBSAN_OPTIONS", "print_stacktrace=1"),
        ("OMP_NUM_THREADS", "2"),
    ),
    (*EMULATED_AMX, *CUT_FINELY, *EXACT_SCRATCH),
    (("amx.cpp", "amx_emulation.h"),),
)
THREAD = Variant(
    "thread",
    ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"),  # with QUICK the tests take a fifth longer
    "libtsan.so",
    # Only accesses by this library are judged; torch and the interpreter are not built for it.
    (
        ("TSAN_OPTIONS", "ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1:exitcode=66"),
        ("OMP_NUM_THREADS", "4"),
    ),
    (
        *EMULATED_AMX,
        *CUT_FINELY,
        Edit("parallel.cpp", "torch::stable::parallel_for(0,", "parallel_in_plain_threads("),
    ),
    (("amx.cpp", "amx_emulation.h"), ("parallel.cpp", "plain_threads.h")),
)


def missing() -> str | None:
    """The reason why nothing can be built or run here, or None."""
    if not X86 or sys.platform != "linux":
        return "the sanitizer builds are made for x86-64 Linux only"
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler {COMPILER}"
    for runtime in (ADDRESS.runtime, THREAD.runtime):
        if not runtime_library(runtime).is_file():
            return f"{COMPILER} has no {runtime}"
    return None


def runtime_library(name: str) -> Path:
    out = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return Path(out.strip()).resolve()


def _setup() -> ModuleType:
    """The project's setup.py: flags and torch's folder are those of the library that is shipped."""
    spec = importlib.util.spec_from_file_location("qwen3_fp8_ascend_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _edited_sources(variant: Variant) -> dict[str, str]:
    texts = {path.name: path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")}
    for edit in variant.edits:
        found = texts[edit.file].count(edit.old)
        assert found == 1, f"{edit.file} holds {edit.old!r} {found} times: renew the edit"
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    return texts


INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def included_by(name: str, texts: dict[str, str]) -> set[str]:
    """The headers among `texts` that a source includes, those that its headers include among them."""
    found: set[str] = set()
    to_read = [name]
    while to_read:
        for header in INCLUDE.findall(texts[to_read.pop()]):
            if header in texts and header not in found:
                found.add(header)
                to_read.append(header)
    return found


def _flags_of(name: str, text: str, variant: Variant, setup: ModuleType) -> list[str]:
    """The shipped library's, then the variant's, which set the level of optimization.

    Kernels that nothing can run here are only compiled and linked, alike for all variants. Checks of operators, which
    are those that include torch, take most of a build and no time when they run.
    """
    from tests.support.cpu_levels import lacking  # loads the package's library: not where another one is tested

    stem = Path(name).stem
    level = "avx512" if stem == "amx" else stem  # AMX is emulated
    flags = [*setup.flags_of(name), "-fPIC"]
    if name in variant.unwatched or (level in cpu.ISAS and lacking(level)):
        return [*flags, QUICK]
    of_operators = "<torch/" in text and "-O3" not in variant.flags
    return [*flags, *variant.flags, *((QUICK,) if of_operators else ())]


def _run(command: Sequence[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"


def objects(variant: Variant) -> list[Path]:
    """The object files of a variant, kept by the hash of all that goes into them."""
    setup = _setup()
    torch = setup.torch_folder()
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    texts = _edited_sources(variant)
    common = hashlib.sha256("\0".join((version, (torch / "version.py").read_text())).encode())
    CACHE.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, list[str], Path]] = []
    found = []
    for name in (name for name in texts if name.endswith(".cpp") and setup.is_compiled(name)):
        included = [HERE / header for file, header in variant.includes if file == name]
        flags = _flags_of(name, texts[name], variant, setup)
        digest = common.copy()
        headers = (texts[header] for header in sorted(included_by(name, texts)))
        digest.update("\0".join((texts[name], *headers, *flags, *(path.read_text() for path in included))).encode())
        target = CACHE / f"{digest.hexdigest()[:20]}-{Path(name).stem}.o"
        found.append(target)
        if not target.is_file():
            before = [part for header in included for part in ("-include", str(header))]
            jobs.append((name, [*flags, "-isystem", str(torch / "include"), *before], target))
    if jobs:
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            folder = Path(temporary)
            for name, text in texts.items():
                (folder / name).write_text(text)

            def compile_one(job: tuple[str, list[str], Path]) -> None:
                name, flags, target = job
                _run([COMPILER, *flags, "-c", name, "-o", target.name], folder)
                (folder / target.name).replace(target)

            slowest_first = sorted(jobs, key=lambda job: job[0] not in ("amx.cpp", "avx512.cpp", "avx512f.cpp"))
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, slowest_first))
    return found


def _drop_the_unused() -> None:
    for path in CACHE.glob("*.*o"):
        if time.time() - path.stat().st_mtime > DAYS_KEPT * 86400:
            path.unlink(missing_ok=True)


def build(variant: Variant) -> Path:
    """The library of a variant; one process at a time builds."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "build.lock"):
        return _build(variant)


def _build(variant: Variant) -> Path:
    parts = objects(variant)
    for part in parts:
        part.touch()
    _drop_the_unused()
    digest = hashlib.sha256("\0".join(path.name for path in parts).encode()).hexdigest()[:20]
    library = CACHE / f"{digest}-{variant.name}.so"
    if not library.is_file():
        sanitizers = [flag for flag in variant.flags if flag.startswith("-fsanitize=")]
        torch = _setup().torch_folder() / "lib"
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unfinished = Path(folder) / library.name
            _run(
                [
                    COMPILER,
                    "-shared",
                    *sanitizers,
                    *map(str, parts),
                    "-o",
                    str(unfinished),
                    f"-L{torch}",
                    "-ltorch_cpu",
                ],
                CACHE,
            )
            unfinished.replace(library)
    library.touch()
    return library


def shared_symbols(path: Path) -> list[str]:
    """What an object file defines of the package that the linker may take from another one instead (weak symbols)."""
    out = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if line.split()[1] in "WVu" and "qwen3_fp8_ascend" in line]


@dataclass(frozen=True)
class Outcome:
    """What came of a pytest process: its exit status, output, seconds, and the plugin's report (None if it died)."""

    status: int
    output: str
    seconds: float
    report: dict[str, Any] | None


def _process_environment(variant: Variant) -> dict[str, str]:
    """Of a process that the sanitizer's run-time library is loaded into."""
    preload = f"{runtime_library(variant.runtime)} {runtime_library('libstdc++.so')}"
    # More threads than cores must not spin.
    return os.environ | dict(variant.options) | {"LD_PRELOAD": preload, "OMP_WAIT_POLICY": "passive"}


def _plugin_environment(library: Path, folder: Path, examples: int, capped: bool) -> dict[str, str]:
    return {
        "SANITIZED_LIBRARY": str(library),
        "SANITIZED_REPORT": str(folder / REPORT),
        "SANITIZED_EXAMPLES": str(examples),
        "SANITIZED_CAPPED": "1" if capped else "",
    }


REPORT = "report.json"
PYTEST = (
    "-p",
    "tests.support.sanitizers.plugin",
    "-p",
    "no:cacheprovider",
    "-q",
    "-x",
    "--capture=sys",
    "--durations=5",
)


def _outcome(status: int, output: str, seconds: float, folder: Path) -> Outcome:
    report = folder / REPORT
    return Outcome(status, output, seconds, json.loads(report.read_text()) if report.is_file() else None)


def run_tests(
    variant: Variant,
    library: Path,
    arguments: Sequence[str],
    folder: Path,
    *,
    examples: int,
    capped: bool,
    timeout: float,
) -> Outcome:
    """Run pytest on some tests with that library in the place of the package's own.

    A property test draws `examples` inputs; if `capped`, also one that asks for more.
    """
    (folder / REPORT).unlink(missing_ok=True)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *PYTEST, *arguments],
        cwd=ROOT,
        env=_process_environment(variant) | _plugin_environment(library, folder, examples, capped),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    return _outcome(done.returncode, done.stdout, time.monotonic() - start, folder)


class Waiting:
    """A process under the sanitizer of a variant that has imported torch: short tests run in forks of it.

    Importing torch under a sanitizer takes longer than most tests that find a planted defect. A library is loaded in
    the fork alone, so each sees one. Variants that differ in their edits alone can share the process.
    """

    MODULES = ("hypothesis.extra.numpy", "pytest", "torch", "qwen3_fp8_ascend.ops")

    def __init__(self, variant: Variant) -> None:
        self._environment = _process_environment(variant)
        self._process = Preloaded(self.MODULES, self._environment)

    def run_tests(
        self, library: Path, arguments: Sequence[str], folder: Path, *, examples: int, capped: bool, timeout: float
    ) -> Outcome:
        """As the function of this name.

        Raises:
            subprocess.TimeoutExpired: the tests took longer than `timeout` seconds, and were ended.
        """
        (folder / REPORT).unlink(missing_ok=True)
        output, start = folder / "output.txt", time.monotonic()
        environment = self._environment | _plugin_environment(library, folder, examples, capped)
        status = self._process.run("pytest", *PYTEST, *arguments, environment=environment, log=output, timeout=timeout)
        return _outcome(status, output.read_text(errors="replace"), time.monotonic() - start, folder)

    def close(self) -> None:
        self._process.close()
