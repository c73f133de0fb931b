"""A process of a step that acts as told by the step's name, without torch: for the orchestration alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = ("good", "wrong", "talks")
"""What the machine has unless STEPS in the environment says otherwise."""

ENDLESS = ("hangs", "has_a_child")

FACTS: dict[str, Any] = {
    "machine": {"system": "Linux x86_64", "cpu": "Some CPU"},
    "packages": {"torch": "2.13.0"},
    "backends": [{"name": "cpu", "detail": "avx2", "reason": None}],
    "ascend": {"SoC": "none", "CANN": "9.1.0 in /usr/local/Ascend/cann"},
    "native libraries": {},
}
PROVENANCE = {"cpu": "Some CPU", "cores": "2", "date": "2026-01-02", "commit": "abc1234", "command": "x"}


def beside(step: str) -> list[str]:
    """Faults of steps that must run at the same time, "meets...", or beside no other, "times..."."""
    here = Path(os.environ["ACTED"]).with_name("here")
    here.mkdir(exist_ok=True)
    (here / step).touch()
    deadline = time.monotonic() + (float(os.environ.get("MEETING", "60")) if step.startswith("meets") else 0.5)
    seen = {step}
    while time.monotonic() < deadline and len(seen) == 1:
        seen |= {path.name for path in here.iterdir()}
        time.sleep(0.02)
    if step.startswith("meets"):
        time.sleep(0.5)  # so that the other sees this one
    (here / step).unlink()
    if step.startswith("meets") != (len(seen) > 1):
        return [f"beside {sorted(seen - {step})}"]
    return []


def main() -> None:
    request = json.loads(sys.argv[1])
    pipe = os.fdopen(request["pipe"], "w", buffering=1)

    def say(**line: Any) -> None:
        pipe.write(json.dumps(line) + "\n")

    step = request["step"]
    with Path(os.environ["ACTED"]).open("a") as acted:
        acted.write(f"{step}\n")
    if step is None:
        if request["device"] == "npu":
            say(refused="there is no such device\n  what to do: choose another --device")
        else:
            steps = [
                {"step": s, "seconds": 4.0 if s in ENDLESS else 60.0, "alone": s.startswith("times")}
                for s in os.environ.get("STEPS", " ".join(STEPS)).split()
            ]
            device = {"kind": os.environ.get("DEVICE_KIND", "cpu"), "name": os.environ.get("DEVICE_NAME", "Some CPU")}
            say(**device, facts=FACTS, provenance=PROVENANCE, steps=steps)
        say(ended=True)
        return
    for number in range(3):
        case = f"{step}/case{number}"
        say(begin=case)
        faults = []
        if number == 1:
            if step == "wrong":
                faults = ["it is wrong"]
            if step == "hangs":
                time.sleep(3600)
            if step == "has_a_child":
                child = subprocess.Popen(["sleep", "3600"])
                Path(os.environ["ACTED"]).with_name("child").write_text(str(child.pid))
                time.sleep(3600)
            if step == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            if step == "eats":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == "exits":
                sys.exit("the driver said no")
            if step == "talks":
                faults = [f"in /home/somebody/kernel.cpp on {socket.gethostname()} at 10.1.2.3: see ~/notes/x"]
            if step == "waits":
                time.sleep(0.5)
            if step.startswith(("meets", "times")):
                faults = beside(step)
        measures = {"element": ((number + 1) / 10, 1.0)}
        if step == "nan" and number == 1:
            measures, faults = {"element": (float("nan"), 1.0)}, ["it is no number"]
        say(case=case, took=0.1, faults=faults, measures=measures, skipped=None, values={"figure": 1.5})
    say(ended=True)


if __name__ == "__main__":
    main()
