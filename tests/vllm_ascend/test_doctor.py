"""`doctor` beside the real torch-npu and vLLM-Ascend where CANN's libraries are not: what these packages raise then."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import once

pytestmark = once


def doctor(*options: str, **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a process that finds none of the stand-ins for CANN's libraries."""
    hidden = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "ASCEND_HOME_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "qwen3_fp8_ascend", "doctor", "--json", *options]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("cann", [True, False], ids=["CANN", "set_env.sh not sourced"])
def test_torch_that_loads_torch_npu_by_itself(tmp_path: Path, cann: bool) -> None:
    """On a host without the driver, or before set_env.sh, `import torch` alone fails."""
    code, report = doctor(**({"ASCEND_HOME_PATH": str(tmp_path)} if cann else {}))
    assert code == 2 and report["next"] is None
    ((what, fix),) = [p for p in report["problems"] if p[0].startswith("torch does not load")]
    assert "torch_npu" in what and ".so" in what
    assert not any("torchvision" in p[0] for p in report["problems"]), "it needs torch, and is not to blame"
    assert ("mount /usr/local/Ascend/driver/lib64" in fix) == cann and ("source CANN's set_env.sh" in fix) != cann


def test_while_an_image_is_built(tmp_path: Path) -> None:
    """There torch-npu does not load either, and that is no problem; what vLLM-Ascend was built for is known."""
    _, report = doctor("--without-npu", ASCEND_HOME_PATH=str(tmp_path))
    assert report["ascend"]["SoC"].startswith("none to use: torch_npu does not load: ")
    assert not any("NPU" in what or "torch" in what for what, _ in report["problems"]), report["problems"]
    assert {status["name"]: status["usable"] for status in report["backends"]}["cpu"]
    if report["ascend"]["Ascend C kernels"] != "built":
        assert [what.partition(" ")[0] for what, _ in report["notes"]] == ["A2"]


def test_a_cann_that_is_not_there(tmp_path: Path) -> None:
    """torch_npu raises a plain Exception then, and something else when it is imported again."""
    gone = str(tmp_path / "gone")
    _, report = doctor(ASCEND_HOME_PATH=gone, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (f"ASCEND_HOME_PATH is {gone}, which is no folder", "source the set_env.sh of a CANN that is here") in map(
        tuple, report["problems"]
    )
    reasons = {status["reason"] for status in report["backends"] if status["name"] in ("ascendc", "torch_npu")}
    assert len(reasons) == 1 and "torch_npu does not load" in reasons.pop()
