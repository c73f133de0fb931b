"""A pytest plugin under which vLLM-Ascend's own unit tests run here, without this package and with it registered.

Their conftest replaces what needs an NPU by mocks. OUTCOMES names a file to which the outcome of each test is written,
by its id. With WITH_OUTCOMES, another such file, this process forks once their conftest is loaded: the fork registers
this package and runs all tests, and then this one, without, runs what has not passed there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

RANKS = ("passed", "skipped", "failed", "error")
"""The worst of a test's setup, call and teardown is its outcome."""

_outcomes: dict[str, str] = {}
_with: dict[str, str] | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """After their conftest, before their test modules: as early as an engine would load plugins."""
    global _with
    if (file := os.environ.pop("WITH_OUTCOMES", None)) is None:
        return
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what they hold would be held for ever in a fork"
    if (pid := os.fork()) == 0:
        os.environ["OUTCOMES"] = file
        _register()
        return
    os.waitpid(pid, 0)  # its exit status says that tests failed, as some of theirs do
    _with = json.loads(Path(file).read_text())


def _register() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from qwen3_fp8_ascend.vllm_plugin import register

    register()
    registered = get_quantization_config("ascend")
    if registered.__module__ != "qwen3_fp8_ascend.vllm_plugin.ascend":
        raise pytest.UsageError(f"`ascend` is {registered}: this package did not register")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _with is not None:
        passed = [item for item in items if _with.get(item.nodeid) == "passed"]
        items[:] = [item for item in items if _with.get(item.nodeid) != "passed"]
        config.hook.pytest_deselected(items=passed)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not report.passed:
        _note(report.nodeid, "error" if report.failed else "skipped")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report.nodeid, "error" if report.failed and report.when != "call" else report.outcome)


def _note(nodeid: str, outcome: str) -> None:
    _outcomes[nodeid] = max(_outcomes.get(nodeid, outcome), outcome, key=RANKS.index)


def pytest_sessionfinish() -> None:
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(_outcomes))
