"""Starts a process for each step, ends it when its time is over, and makes one result of what they found.

No torch here: a driver that brings down what loads it costs a step and not the run.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import itertools
import json
import math
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.validate.journal import Journal
from qwen3_fp8_ascend.evaluate.validate.names import may_match

VERSION = 1
CHILD = [sys.executable, "-m", "qwen3_fp8_ascend.evaluate.validate.child"]
START_SECONDS = 120
"""For loading torch and looking at the machine; an NPU's first operation takes half a minute."""
PATIENCE = 25
"""Seconds from SIGTERM to SIGKILL: a server that a step has started is stopped in them."""
SHOWN = 20
"""Failures of one step that the result lists; it counts all."""

BEYOND = 1e9
"""The share of its limit that a value has which is no number."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to validate: `only` is a step, a case or a pattern of either; `minutes` for the whole run; `jobs` how many
    steps may run beside each other, where nothing is timed."""

    device: str = "auto"
    seed: int = 0
    only: str = "*"
    minutes: float = 10
    jobs: int = 1


def validate(request: Request, journal: Path | None, say: Say) -> tuple[dict[str, Any], Journal | None]:
    """Run all steps, but those that the journal has; the result, ready to be written.

    Raises:
        BlockFp8Error: no such device, not enough memory, another run's journal, a full disk, or `only` names nothing.
    """
    end = time.monotonic() + request.minutes * 60
    say("looking at the machine")
    machine = _machine(request)
    header = {"kind": "validate", "version": VERSION, "device": machine["name"], "seed": request.seed}
    header |= {"commit": machine["provenance"]["commit"]}
    notes = Journal(journal, header) if journal else None
    steps = [step for step in machine["steps"] if may_match(step["step"], request.only)]
    stop = threading.Event()

    def run(number: int, step: dict[str, Any]) -> dict[str, Any]:
        left = end - time.monotonic()
        if left < 1:
            return _record(step, "out of time", f"the {request.minutes:g} minutes were over", [], 0)
        watch = _Watch(say, f"{number} of {len(steps)}: {step['step']}")
        record = scrub(_run(request, machine["kind"], step, min(step["seconds"], left), watch, stop))
        if record["outcome"] == "timed out" and left < step["seconds"]:
            record |= {"outcome": "out of time", "detail": f"the {request.minutes:g} minutes were over", "repeat": None}
        return record

    done = dict(notes.finished) if notes else {}
    with ThreadPoolExecutor(request.jobs) as pool:
        try:
            for together in _batches(steps):
                todo = [(number, step) for number, step in together if step["step"] not in done]
                for job in as_completed([pool.submit(run, number, step) for number, step in todo]):
                    record = job.result()
                    done[record["step"]] = record
                    if notes and record["outcome"] != "out of time":
                        notes.note(record)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    records = [done[step["step"]] for step in steps]
    if request.only != "*":
        records = [record for record in records if record["outcome"] != "finished" or record["cases"]]
        if not records:
            names = ", ".join(step["step"] for step in machine["steps"])
            fix = "name a step, a case of one, or a pattern with *"
            raise BlockFp8Error("there is no such case", where="--only", expected=names, got=request.only, fix=fix)
    return scrub(_result(request, machine, records)), notes


def _batches(steps: list[dict[str, Any]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Steps and their numbers: those that may run beside each other, or one that must be alone."""
    for alone, some in itertools.groupby(enumerate(steps, 1), lambda numbered: bool(numbered[1]["alone"])):
        batch = list(some)
        yield from ([each] for each in batch) if alone else [batch]


def _machine(request: Request) -> dict[str, Any]:
    step = {"step": None, "seconds": START_SECONDS}
    record = _run(request, request.device, step, START_SECONDS, _Watch(lambda text: None, ""), threading.Event())
    said: dict[str, Any] = next((line for line in record["lines"] if "steps" in line), {})
    if not said:
        got = f"{record['outcome']}: {record['detail']}" if record["detail"] else record["outcome"]
        fix = "see `qwen3-fp8-ascend doctor`"
        raise BlockFp8Error("the device cannot be looked at", where=f"--device {request.device}", got=got, fix=fix)
    return said


def _result(request: Request, machine: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes = [record["outcome"] for record in records]
    failed = sum(record["failed"] for record in records) + sum(o not in ("finished", "out of time") for o in outcomes)
    verdict = "failed" if failed else "incomplete" if "out of time" in outcomes else "passed"
    provenance = machine["provenance"] | {"command": repeat(machine["kind"], request)}
    provenance |= {"device": machine["name"]} if machine["kind"] != "cpu" else {}
    return {
        "kind": "validate",
        "version": VERSION,
        "provenance": provenance,
        "command": provenance["command"],
        "device": {"kind": machine["kind"], "name": machine["name"]},
        "seed": request.seed,
        "verdict": verdict,
        "facts": machine["facts"],
        "steps": records,
    }


def repeat(kind: str, request: Request, case: str | None = None) -> str:
    """The command that runs all of it again, or one case alone."""
    words = ["qwen3-fp8-ascend", "validate", "--device", kind]
    only = case or request.only
    words += ["--only", only] if only != "*" else []
    words += ["--jobs", str(request.jobs)] if request.jobs != 1 and case is None else []
    return shlex.join(words + (["--seed", str(request.seed)] if request.seed else []))


class _Watch:
    """Says which case runs, and remembers it."""

    def __init__(self, say: Say, title: str) -> None:
        self.say, self.title, self.case = say, title, None
        say(title)

    def __call__(self, line: dict[str, Any]) -> None:
        if "begin" in line:
            self.case = line["begin"]
            self.say(f"{self.title}: {line['begin']}")
        elif "case" in line:
            self.case = None


def _run(
    request: Request, kind: str, step: dict[str, Any], seconds: float, watch: _Watch, stop: threading.Event
) -> dict[str, Any]:
    """One step in a process of its own, which is ended when `stop` is set; its record, whatever becomes of it."""
    reading, writing = os.pipe()
    asked = {"step": step["step"], "device": kind, "seed": request.seed, "only": request.only}
    line = [*CHILD, json.dumps(asked | {"seconds": seconds, "pipe": writing})]
    start, lines, timed_out = time.monotonic(), [], False
    with tempfile.TemporaryFile() as errors, os.fdopen(reading, "rb", buffering=0) as pipe:
        process = subprocess.Popen(
            line,
            env=_threads(request.jobs) | os.environ | _environment(kind) | step.get("environment", {}),
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(writing)
        try:
            for said in _lines(pipe, start + seconds, stop):
                lines.append(said)
                watch(said)
            timed_out = process.poll() is None and not any("ended" in said for said in lines)
            # At the pipe's end it dies at this moment.
            if timed_out and not stop.is_set() and time.monotonic() < start + seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                    timed_out = False
        finally:
            _end(process)
        errors.seek(0)
        words = errors.read().decode("utf-8", "replace")
    took = time.monotonic() - start
    refused = next((said["refused"] for said in lines if "refused" in said), None)
    if refused and step["step"] is None:
        raise BlockFp8Error(refused)
    if any("ended" in said for said in lines) and not refused:
        record = _record(step, "finished", None, lines, took)
    elif timed_out:
        record = _record(step, "timed out", f"after {seconds:.0f} s", lines, took)
    elif refused:
        record = _record(step, "failed", refused, lines, took)
    elif process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        memory = " (the system ends processes so when memory runs out)" if name == "SIGKILL" else ""
        record = _record(step, "killed", f"by signal {-process.returncode}, {name}{memory}", lines, took)
    else:
        record = _record(step, "failed", f"exit code {process.returncode}: {_last_words(words)}", lines, took)
    record["at"] = watch.case if record["outcome"] != "finished" else None
    for failure in record["failures"]:
        failure["repeat"] = repeat(kind, request, failure["case"])
    if record["at"]:
        record["repeat"] = repeat(kind, request, record["at"])
    return record


def _environment(kind: str) -> dict[str, str]:
    """torch loads torch_npu by itself, which may not be whole where nobody asks for it."""
    unwanted = kind in ("cpu", "cuda") and importlib.util.find_spec("torch_npu") is not None
    return {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if unwanted else {}


def _threads(jobs: int) -> dict[str, str]:
    """Steps that run beside each other share the cores."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}


def _lines(pipe: Any, end: float, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """What the process says, until it closes the pipe, its time is over, or it is to be stopped."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0 and not stop.is_set():
            if not selector.select(min(left, 0.2)):
                continue
            data = pipe.read(1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from map(json.loads, whole)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children: orderly, then not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in its driver is left to the system
        process.wait(10)


def _record(
    step: dict[str, Any], outcome: str, detail: str | None, lines: list[dict[str, Any]], took: float
) -> dict[str, Any]:
    cases = [line for line in lines if "case" in line]
    failures = [{"case": case["case"], "faults": case["faults"]} for case in cases if case["faults"]]
    skipped = Counter(case["skipped"] for case in cases if case["skipped"])
    worst: dict[str, dict[str, Any]] = {}
    for case in cases:
        for measure, (value, limit) in case["measures"].items():
            share = min(value / limit if limit else float(value > 0), BEYOND) if math.isfinite(value) else BEYOND
            if measure not in worst or share > worst[measure]["share"]:
                value = value if math.isfinite(value) else None  # JSON has neither NaN nor infinity
                worst[measure] = {"value": value, "limit": limit, "share": share, "case": case["case"]}
    record = {
        "step": step["step"],
        "uses": next((line["uses"] for line in lines if "uses" in line), None),
        "outcome": outcome,
        "detail": detail,
        "at": None,
        "repeat": None,
        "seconds": round(took, 1),
        "limit_seconds": step["seconds"],
        "cases": len(cases),
        "failed": len(failures),
        "skipped": dict(skipped),
        "failures": failures[:SHOWN],
        "worst": worst,
        "values": {case["case"].removeprefix(f"{step['step']}/"): case["values"] for case in cases if case["values"]},
    }
    return record | ({"lines": lines} if step["step"] is None else {})


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:] or "it said nothing"


PATH = re.compile(r"(?<![\w.:/])~?(?:/[\w.+@%~-]+)+/?")
ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b)(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\d)")


def scrub(value: Any) -> Any:
    """Without folders, names of the host and the user, and addresses: a result is published."""
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    text = PATH.sub(lambda found: Path(found[0]).name or "FOLDER", value)
    for name, instead in _names():
        text = re.sub(rf"(?<![\w-]){name}(?![\w-])", instead, text)
    return ADDRESS.sub("ADDRESS", text)


def _names() -> list[tuple[str, str]]:
    """Names of this machine and its user that are no words of ours, as patterns; with the host's goes any domain.

    Its full name is not asked for: where DNS does not answer, that takes seconds each time.
    """
    names = [(socket.gethostname().partition(".")[0], r"(?:\.[\w-]+)*", "HOST")]
    with contextlib.suppress(OSError, KeyError, ImportError):
        names.append((getpass.getuser(), "", "USER"))
    common = {"localhost", "root", "cpu", "npu", "cuda", "user", "linear", "model", "python"}
    return [(re.escape(name) + more, instead) for name, more, instead in names if len(name) > 1 and name not in common]
