"""What `doctor` reads from an Ascend machine's files, and what it says would serve."""

from pathlib import Path

import pytest

from qwen3_fp8_ascend import doctor
from qwen3_fp8_ascend.backends import registry, soc


@pytest.mark.parametrize("folder", ["", "{arch}-linux"])
def test_cann_version_is_read_where_the_toolkit_writes_it(tmp_path: Path, folder: str) -> None:
    import platform

    where = tmp_path / folder.format(arch=platform.machine())
    where.mkdir(exist_ok=True)
    (where / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    assert doctor._cann(str(tmp_path)) == f"8.5.0 in {tmp_path}"


def test_cann_that_says_nothing(tmp_path: Path) -> None:
    assert "unknown version" in doctor._cann(str(tmp_path))
    assert "set_env.sh" in doctor._cann(None)


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version.info"
    monkeypatch.setattr(doctor, "DRIVER", file)
    packages = dict.fromkeys(doctor.PACKAGES)
    assert "not found" in doctor._ascend(packages)["driver"]
    file.write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    assert doctor._ascend(packages)["driver"] == "25.2.0"


def test_what_serves_on_this_machine() -> None:
    report = doctor.examine()
    assert report.serving["cpu, w8a8"]["backend"] == "cpu"
    assert report.serving["cpu, w8a8"]["rows"]
    assert not any(key.startswith("npu") for key in report.serving)


def test_an_npu_that_nothing_serves_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Atlas A2 with neither Triton nor the Ascend C kernels."""
    monkeypatch.setattr(soc, "missing_npu", lambda: None)
    monkeypatch.setattr(soc, "device_name", lambda: "Ascend910B3")
    registry.select_backend.cache_clear()
    try:
        report = doctor.examine()
    finally:
        registry.select_backend.cache_clear()
    assert report.ascend["SoC"] == "Ascend910B3: Atlas A2 (910B)"
    assert report.serving["npu, w8a8"]["backend"] is None
    assert any("NPU" in what for what, _ in report.problems)
