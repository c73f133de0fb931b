"""Which lines of the readers an input reaches, told by Python itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import qwen3_fp8_ascend.checkpoints as package
from qwen3_fp8_ascend import containers
from qwen3_fp8_ascend import format as format_module
from qwen3_fp8_ascend.errors import BlockFp8Error

FOLDER = Path(package.__file__).parent
FILES = (*sorted(FOLDER.glob("*.py")), Path(format_module.__file__), Path(containers.__file__))


def lines_of(path: Path) -> set[int]:
    """Lines with code inside functions; what runs at import is not an input's."""
    return {
        line
        for function in _functions(compile(path.read_text(), str(path), "exec"))
        for _, _, line in function.co_lines()
        if line is not None and line != function.co_firstlineno
    }


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & 0x0002:  # a function's locals, not a class's
                yield constant
            yield from _functions(constant)


def lines_reached(read: Callable[[bytes], object], inputs: Iterable[bytes]) -> dict[Path, set[int]]:
    """The lines of each file that reading the inputs executes."""
    reached: dict[str, set[int]] = {str(path): set() for path in FILES}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines = reached.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return trace

    for data in inputs:
        sys.settrace(trace)
        try:
            with suppress(BlockFp8Error):
                read(data)
        finally:
            sys.settrace(None)
    return {path: reached[str(path)] & lines_of(path) for path in FILES}
