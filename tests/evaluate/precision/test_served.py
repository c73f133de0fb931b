"""Runs through a server, by one that answers as vLLM's completions do; the real one is in tests/server."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate.precision import runs, served
from qwen3_fp8_ascend.evaluate.precision.compare import compare
from qwen3_fp8_ascend.terminal import run as run_command

Change = Callable[[dict[str, Any]], object]


@contextlib.contextmanager
def vllm(model: str = "qwen3-8b-fp8", change: Change = lambda choice: None, status: int = 200) -> Iterator[str]:
    """A server whose tokens are bytes; at each position the token itself comes first with 0.5, `~` second with 0.25.

    `change` may spoil an answer.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, body: object, code: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            entry = {"id": model, "object": "model", "created": 0, "owned_by": "vllm", "root": "/models/m"}
            answers = {"/health": {}, "/version": {"version": "0.30.0"}, "/v1/models": {"data": [entry]}}
            self.reply(answers[self.path])

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["temperature"] == 0 and asked["prompt_logprobs"] == runs.TOP and asked["ignore_eos"]
            ids = list(asked["prompt"].encode())
            entries = [
                {str(token): {"logprob": np.log(0.5), "rank": 1}, "126": {"logprob": np.log(0.25), "rank": 2}}
                for token in ids
            ]
            choice = {
                "index": 0,
                "text": "aaa",
                "finish_reason": "length",
                "prompt_token_ids": ids,
                "prompt_logprobs": [None, *entries[1:]],
                "token_ids": [97] * asked["max_tokens"],
            }
            change(choice)
            self.reply(
                {"id": "1", "object": "text_completion", "created": 0, "model": model, "choices": [choice]}, status
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_server_says_is_kept() -> None:
    with vllm() as url:
        run = served.run_server(url, None, ["ab", "abc"], "mine", greedy_tokens=3)
    assert (run.name, run.model, run.tokens, run.lengths.tolist()) == ("mine", "m", 3, [2, 3])
    assert run.ids.tolist() == list(b"ababc") and run.greedy.tolist() == [[97] * 3] * 2
    np.testing.assert_allclose(np.exp(run.logprobs), 0.5, rtol=1e-6)
    assert run.top_ids.shape == (3, runs.TOP) and run.top_ids[:, :3].tolist() == [[t, 126, -1] for t in b"bbc"]
    np.testing.assert_allclose(np.exp(run.top_logprobs[0, :3]), [0.5, 0.25, 0], rtol=1e-6)
    assert run.facts["device"] == "cpu" and run.facts["vLLM of the server"] == "0.30.0"


def test_it_is_compared_by_what_both_know() -> None:
    def surer(choice: dict[str, Any]) -> None:
        for entry, token in zip(choice["prompt_logprobs"][1:], choice["prompt_token_ids"][1:], strict=True):
            entry[str(token)]["logprob"] = np.log(0.6)

    with vllm() as url, vllm(change=surer) as other:
        reference, run = (served.run_server(u, None, ["abcd"], "", greedy_tokens=1) for u in (url, other))
    row = compare(run, reference)
    expected = 0.5 * np.log(0.5 / 0.6) + 0.25 * np.log(1) + 0.25 * np.log(0.25 / 0.15)
    assert row.kl_mean == pytest.approx(expected, rel=1e-5) and row.kl_from == f"top {runs.TOP}"
    assert row.logprob_distance == pytest.approx(np.log(0.6 / 0.5), rel=1e-5)
    assert (row.cosine, row.layers, row.within, row.top1_agreement) == (None, None, None, 1.0)


@pytest.mark.parametrize(
    ("options", "server", "said"),
    [
        (["--model", "Qwen3"], {}, "does not serve 'Qwen3'"),
        ([], {"change": lambda choice: choice.pop("prompt_logprobs")}, "gives no log-probabilities"),
        ([], {"change": lambda choice: choice["token_ids"].pop()}, "other tokens than were asked for"),
        ([], {"change": lambda choice: choice["prompt_logprobs"].pop()}, "other tokens than were asked for"),
        ([], {"status": 500}, "the server did not answer"),
    ],
)
def test_servers_that_cannot_be_used(
    options: list[str], server: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with vllm(**server) as url:
        line = ["eval-precision", "run", url, str(tmp_path / "x.run"), "--limit", "1", *options]
        assert run_command(app, line) == 2
    error = capsys.readouterr().err
    assert said in error and "what to do:" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_server_elsewhere_does_not_say_what_it_computes_on() -> None:
    assert served._device_of("http://npu.example:8000", {"npu": "Ascend910B3"}) == "not said"
    assert served._device_of("http://localhost:8000/v1", {}) == "cpu"
    assert served._device_of("http://127.0.0.1:8000/v1", {"gpu": "NVIDIA H100"}) == "NVIDIA H100"
    assert served._device_of("http://localhost:8000/v1", {"npu": "Ascend910B3"}) == "Ascend910B3"
