"""The process of one step: ``python -m qwen3_fp8_ascend.evaluate.validate.child REQUEST``.

It writes a line of JSON to the pipe that the request names as a case begins and another as it ends, so that whoever
reads them knows how far it came if it is killed. It ends by itself soon after its time is over, also when nobody is
left to end it, and says on stderr where it was.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import sys
import time
from typing import Any, TextIO

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.validate.names import matches

GRACE = 20
"""Seconds after the limit at which the process ends itself; whoever started it ends it sooner."""
RESERVE = 512 << 20
"""Bytes that a case leaves free."""


def main() -> int:
    """Run what the request names; the exit code is 0 however its cases end."""
    request = json.loads(sys.argv[1])
    faulthandler.enable()
    faulthandler.dump_traceback_later(request["seconds"] + GRACE, exit=True)
    logging.disable(logging.WARNING)
    with os.fdopen(request["pipe"], "w", buffering=1, encoding="utf-8") as pipe:
        try:
            _machine(request, pipe) if request["step"] is None else _step(request, pipe)
        except BlockFp8Error as error:
            _say(pipe, refused=str(error))
        _say(pipe, ended=True)
    return 0


def _say(pipe: TextIO, **line: Any) -> None:
    pipe.write(json.dumps(line, ensure_ascii=False) + "\n")


def _machine(request: dict[str, Any], pipe: TextIO) -> None:
    """What the machine is, and the steps that there are on it."""
    from dataclasses import asdict

    from qwen3_fp8_ascend import doctor
    from qwen3_fp8_ascend.backends import ascendc, cpu
    from qwen3_fp8_ascend.evaluate.validate import plan
    from qwen3_fp8_ascend.provenance import built_with, provenance
    from qwen3_fp8_ascend.testing.devices import host_memory, open_device

    device = open_device(request["device"])
    for where, free in (("the host", host_memory()), (f"the device, {device.kind}", device.free_bytes())):
        if free < 2 * RESERVE:
            got, fix = f"{free / 2**30:.2f} GiB free", "end what else runs there, or take another device"
            raise BlockFp8Error("not enough memory", where=where, expected="1 GiB", got=got, fix=fix)
    report = asdict(doctor.examine(without_npu=device.kind != "npu"))
    libraries = {path.name: built_with(path) for path in (cpu.LIBRARY, ascendc.LIBRARY) if path.exists()}
    facts = {key: report[key] for key in ("machine", "packages", "backends", "ascend")} | {"free": device.free_bytes()}
    _say(
        pipe,
        kind=device.kind,
        name=device.name,
        facts=facts | {"native libraries": libraries},
        provenance=provenance(),
        steps=plan.outline(device),
    )


def _step(request: dict[str, Any], pipe: TextIO) -> None:
    from qwen3_fp8_ascend.evaluate.validate import plan
    from qwen3_fp8_ascend.testing.devices import host_memory, open_device

    device = open_device(request["device"])
    step = plan.find(device, request["step"])
    context = step.context(device, request["seed"])
    if context.backend is not None and context.backend.detail is not None:
        _say(pipe, uses=context.backend.detail())
    for case in step.check.cases(context):
        name = f"{request['step']}/{case.name}"
        if not matches(name, request["only"]):
            continue
        seed, start = context.seed_of(name), time.perf_counter()
        _say(pipe, begin=name)
        free = min(device.free_bytes(), host_memory()) - RESERVE
        line = _run(case, seed) if case.memory <= free else _skipped(_memory(case.memory, free))
        _say(pipe, case=name, took=round(time.perf_counter() - start, 3), **line)
        gc.collect() if case.memory else None


def _memory(needed: float, free: float) -> str:
    return f"not enough memory: {needed / 2**30:.1f} GiB are needed, {max(free, 0) / 2**30:.1f} GiB are free"


def _skipped(reason: str) -> dict[str, Any]:
    return {"faults": [], "measures": {}, "skipped": reason, "values": {}}


def _run(case: Any, seed: int) -> dict[str, Any]:
    """What the case found; an error is a fault, want of memory is none."""
    import torch

    try:
        with torch.inference_mode():
            found = case.run(seed)
    except MemoryError as error:
        return _skipped(f"not enough memory: {error}")
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            return _skipped(f"not enough memory: {text}")
        return {"faults": [text[:500]], "measures": {}, "skipped": None, "values": {}}
    return {
        "faults": found.faults,
        "measures": found.measures,
        "skipped": getattr(found, "skipped", None),
        "values": getattr(found, "values", {}),
    }


if __name__ == "__main__":
    sys.exit(main())
