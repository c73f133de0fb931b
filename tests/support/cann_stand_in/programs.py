#!/usr/bin/env python3
"""Stands in for bisheng and for the C++ compiler: records what it is asked to do, and does what CMake needs of it.

CANN_STAND_IN_RECORD names the file of records, one JSON object a line. The kernels are preprocessed, so that a record
tells how each is declared; nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

LIBRARY = "libqwen3_fp8_ascendc.so"
REAL_COMPILER = os.environ.get("CANN_STAND_IN_CXX", "c++")
DECLARATION = re.compile(
    r'extern "C" (?P<qualifiers>[^;{}]*?)void (?P<name>qwen3_fp8_\w+)\([^;{]*\)\s*\{(?P<body>[^}]*)'
)
KIND = re.compile(r"KERNEL_TASK_TYPE_DEFAULT\((\w+)\)")


def run(*command: str) -> str:
    done = subprocess.run([REAL_COMPILER, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def kernels_of(source: str, flags: list[str]) -> dict[str, dict[str, str]]:
    headers = str(Path(__file__).resolve().parent / "include")
    keyword = "-D__aicore__=__aicore__"  # known to the real compiler, so that the host's fallback is not taken
    text = run("-E", "-P", "-x", "c++", keyword, f"-I{headers}", *flags, source)
    kernels = {}
    for found in DECLARATION.finditer(text):
        kind = KIND.search(found["body"])
        kernels[found["name"]] = {"qualifiers": " ".join(found["qualifiers"].split()), "kind": kind[1] if kind else ""}
    return kernels


def main() -> None:
    program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    output = arguments[arguments.index("-o") + 1] if "-o" in arguments else ""
    sources = [word for word in arguments if word.endswith((".asc", ".cpp")) and "csrc" in Path(word).parts]
    record: dict[str, object] = {"program": program, "arguments": arguments}
    if "-c" in arguments and sources:
        (source,) = sources
        record |= {"step": "compile", "source": Path(source).name}
        if program == "bisheng":
            record["kernels"] = kernels_of(source, [word for word in arguments if word.startswith(("-I", "-D"))])
        run("-x", "c++", "-fPIC", "-c", os.devnull, "-o", output)
        if "-MF" in arguments:
            Path(arguments[arguments.index("-MF") + 1]).write_text(f"{output}: {source}\n")
    elif Path(output).name == LIBRARY:
        record |= {"step": "link", "source": ""}
        run("-shared", *(word for word in arguments if word.endswith(".o") and word != output), "-o", output)
    elif program == "bisheng":
        sys.exit(f"bisheng is asked for something that the stand-in does not know: {arguments}")
    else:
        os.execvp(REAL_COMPILER, [REAL_COMPILER, *arguments])
    with open(os.environ["CANN_STAND_IN_RECORD"], "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
