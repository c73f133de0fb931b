"""`serve` and CANN's set_env.sh; tests/test_scripts.py has the command line."""

from pathlib import Path

import pytest

from qwen3_fp8_ascend import launch
from qwen3_fp8_ascend.errors import BlockFp8Error


def test_the_environment_is_that_after_canns_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read variables that are not set, and print; values may have several lines."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/old")
    script = tmp_path / "set env.sh"
    script.write_text(
        'echo "setting up $NOT_SET_ANYWHERE"\nexport LD_LIBRARY_PATH=/cann/lib64:$LD_LIBRARY_PATH\n'
        "export TWO_LINES='a=b\nc'\nNOT_EXPORTED=1\n"
    )
    found = launch._sourced(script)
    assert found["LD_LIBRARY_PATH"] == "/cann/lib64:/old" and found["TWO_LINES"] == "a=b\nc"
    assert "NOT_EXPORTED" not in found


def test_a_script_of_cann_that_fails_is_told(tmp_path: Path) -> None:
    script = tmp_path / "set_env.sh"
    script.write_text("return 3\n")
    with pytest.raises(BlockFp8Error, match=r"set_env\.sh fails\n  got: exit code 3\n  what to do: "):
        launch._sourced(script)


@pytest.mark.parametrize(
    ("device", "there", "home", "sourced"),
    [
        ("auto", True, "", True),
        ("auto", False, "", False),
        ("npu", False, "", True),
        ("npu", True, "/opt/cann", False),
        ("cpu", True, "", False),
    ],
)
def test_when_canns_script_is_sourced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, there: bool, home: str, sourced: bool
) -> None:
    """Where an NPU may serve and its variables are not set; a dry run names it even where it is not."""
    script = tmp_path / "set_env.sh"
    if there:
        script.touch()
    monkeypatch.setenv("CANN_SET_ENV", str(script))
    monkeypatch.setenv("ASCEND_HOME_PATH", home)
    assert launch._cann_script(device, dry_run=True) == (script if sourced else None)
