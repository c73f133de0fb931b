"""An Ascend machine as its packages and files tell of it, for what `doctor` says there."""

from __future__ import annotations

import dataclasses
import io
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from qwen3_fp8_ascend import doctor
from qwen3_fp8_ascend.backends import ascendc, cpu, registry, soc
from qwen3_fp8_ascend.backends.triton import backend as triton
from qwen3_fp8_ascend.vllm_plugin import versions

VERSIONS = {
    "torch": "2.10.0+cpu",
    "vllm": "0.30.0+empty",
    "vllm-ascend": "0.30.0rc2",
    "torch-npu": "2.10.0.post4",
    "triton-ascend": "3.2.2",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """`examine()` is what `doctor` finds there.

    chip: torch_npu's name of the NPU, None where it sees none.
    usable: the NPU backends that can run; the Ascend C kernels are built if theirs is one of them.
    devices: how many /dev/davinci* there are.
    cann: its version, None where set_env.sh was not sourced.
    image: the chip that vLLM-Ascend was built for.
    versions: packages that differ from `VERSIONS`.
    """

    chip: str | None
    usable: tuple[str, ...] = ()
    devices: int = 1
    cann: str | None = "9.1.0"
    image: str | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def examine(self, folder: Path, monkeypatch: pytest.MonkeyPatch, without_npu: bool = False) -> doctor.Report:
        """`folder` stands for /dev, CANN's and the driver's folders and the package's. Undone with `monkeypatch`."""
        self._write(folder)
        monkeypatch.setattr(ascendc, "LIBRARY", folder / ascendc.LIBRARY.name)
        monkeypatch.setattr(doctor, "DEVICES", folder)
        monkeypatch.setattr(doctor, "DRIVER", folder / "version.info")
        monkeypatch.setattr(doctor, "_vllm_ascend_chip", lambda: self.image)
        monkeypatch.setattr(triton, "current_device_type", lambda: "npu")
        npu = SimpleNamespace(is_available=lambda: self.chip is not None, get_device_name=lambda: self.chip)
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu, __spec__=SimpleNamespace()))  # type: ignore[arg-type]
        for module in (doctor, versions):
            monkeypatch.setattr(module, "installed_version", (VERSIONS | self.versions).get)
        if self.cann is None:
            monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
        else:
            monkeypatch.setenv("ASCEND_HOME_PATH", str(folder))
        forget()
        for name in ("ascendc", "triton", "torch_npu"):
            reason = soc.missing_npu() or (None if name in self.usable else "not on this machine")
            backend = dataclasses.replace(registry.load_backend(name), unusable=lambda reason=reason: reason)
            monkeypatch.setitem(registry.LOADED, name, backend)
        try:
            return doctor.examine(without_npu)
        finally:
            forget()

    def _write(self, folder: Path) -> None:
        for old in [*folder.glob("davinci*"), folder / ascendc.LIBRARY.name]:
            old.unlink(missing_ok=True)
        for number in range(self.devices):
            (folder / f"davinci{number}").touch()
        if "ascendc" in self.usable:
            (folder / ascendc.LIBRARY.name).touch()
        toolkit = folder / f"{platform.machine()}-linux"
        toolkit.mkdir(exist_ok=True)
        (toolkit / "ascend_toolkit_install.info").write_text(f"version={self.cann}\n")
        (folder / "version.info").write_text("Version=25.5.0\n")


def forget() -> None:
    """What was found out about the machine before."""
    soc.device_name.cache_clear()
    registry.select_backend.cache_clear()


def rendered(report: doctor.Report, width: int = 250) -> str:
    """What people are told."""
    text = io.StringIO()
    doctor.render(report, Console(file=text, width=width))
    return text.getvalue()


def page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page that docs/npu.md shows: Atlas A2 with an AArch64 host where all is well, without the tables of backends.

    Everything that differs from machine to machine is that of the machine that is pretended.
    """
    assert cpu.ISAS  # imported while the architecture was this machine's
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "python_version", lambda: "3.12.13")
    monkeypatch.setattr(doctor, "cpu_name", lambda: "Kunpeng-920")
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: set(range(192)))
    monkeypatch.setattr(doctor, "_vllm_problems", lambda packages: [])
    report = Machine("Ascend910B3", ("ascendc", "triton"), devices=8, cann="9.2.0", image="A2").examine(
        folder, monkeypatch
    )
    serving = {device: chosen for device, chosen in report.serving.items() if device.startswith("npu")}
    text = rendered(dataclasses.replace(report, backends=[], serving=serving), 200)
    kept = [line.rstrip() for line in text.replace(str(folder), "/usr/local/Ascend/cann-9.2.0").splitlines()]
    return "\n".join(line for line in kept if not line.startswith((" backend ", "backends"))) + "\n"
