"""The benchmark of a call's cost runs."""

import pytest

from benchmarks import call_cost


def test_every_call_gets_two_times(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cost, "ROUNDS", 2)
    monkeypatch.setattr(call_cost, "BYTES_BETWEEN", 4_000_000)
    call_cost.call_cost()
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "│" in line]
    calls = {row[0].strip(): [float(number) for number in row[1:]] for row in rows}
    assert {"ops.block_linear", "F.linear in bf16", "nothing"} <= set(calls)
    assert all(0 <= warm < 1e6 and 0 < cold < 1e6 for warm, cold in calls.values())
    assert calls["nothing"][0] < calls["ops.block_linear"][0]
