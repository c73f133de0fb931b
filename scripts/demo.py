"""`make demo`: serve a real block-FP8 model with vLLM, ask the three verification questions, stop.

Without --model the demo's own model is prepared: SmolLM2-135M-Instruct, quantized by this project. `make demo-moe` is
the same with --experts: that model as a mixture of four experts, two for each token, which computes what it did.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.answers import QUESTIONS, ask, render
from qwen3_fp8_ascend.serving import Server, exit_on_sigterm, serve
from qwen3_fp8_ascend.terminal import fail, out, progress

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"


def demo(
    model: Annotated[
        str | None, typer.Option(help="A block-FP8 checkpoint: a folder, or a name on Hugging Face or ModelScope.")
    ] = None,
    experts: Annotated[bool, typer.Option(help="The demo's own model as a mixture of experts.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the server.")] = 1800,
    serve_args: Annotated[list[str] | None, typer.Argument(help="Further arguments for `vllm serve`.")] = None,
) -> None:
    """Serve a block-FP8 model with `vllm serve ... --quantization ascend` and ask it three questions."""
    start = time.monotonic()
    languages: tuple[str, ...] = ("en", "zh")
    arguments = ["--quantization", "ascend", "--max-model-len", "2048", *(serve_args or [])]
    if model is not None and experts:
        raise BlockFp8Error("--experts is about the demo's own model", fix="leave out --experts or --model")
    if model is None:
        from prepare_demo_model import prepare, prepare_experts

        folder = prepare_experts(CACHE / "models") if experts else prepare(CACHE / "models")
        model, languages = str(folder), ("en",)
        arguments.append("--enforce-eager")  # a model this small is up sooner than it is compiled
    name = Path(model).name
    log = CACHE / "demo-server.log"
    out.print(f"[bold]vllm serve {model} {' '.join(arguments)}[/]  (log: {log})", highlight=False, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        with progress(out, "starting vLLM") as say:

            def show(waited: float, line: str) -> None:
                say(f"starting vLLM, {waited:.0f} s: {line[-(max(out.width - 30, 20)) :]}")

            served = serve(model, *arguments, log=log, name=name, timeout=timeout, on_wait=show)
            server = stack.enter_context(served)
        out.print(f"ready after {time.monotonic() - start:.0f} s; {backend_line(server)}", highlight=False)
        answers = [ask(server.url, name, question, languages) for question in QUESTIONS]
        for number, answer in enumerate(answers, 1):
            render(number, answer, out)
    tpots = [a.tpot for a in answers if a.tpot is not None]
    out.print(
        f"time to first token {1e3 * median(a.ttft for a in answers):.0f} ms, "
        + (f"time per output token {1e3 * median(tpots):.1f} ms (medians); " if tpots else "")
        + f"all in {time.monotonic() - start:.0f} s",
        highlight=False,
    )
    if any(a.verdict == "failed" for a in answers):
        raise typer.Exit(1)


def backend_line(server: Server) -> str:
    """Which backend serves, as the server's own log says it."""
    found = re.search(r"block FP8 on .*", server.log.read_text(errors="replace"))
    if found is None:
        raise BlockFp8Error("the server's log does not say which backend it uses", where=server.log)
    return found.group()


if __name__ == "__main__":
    exit_on_sigterm()
    try:
        typer.run(demo)
    except BlockFp8Error as error:
        fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
