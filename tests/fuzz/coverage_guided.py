"""Let atheris (libFuzzer) choose the choices by what they cover: `python -m tests.fuzz.coverage_guided --help`.

Inputs that reach new code are kept in the corpus; one that the judge condemns ends the run and is kept as an artefact,
which `python -m tests.fuzz.campaign READER --replay FILE` reads again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["qwen3_fp8_ascend.checkpoints", "qwen3_fp8_ascend.format", "tests.fuzz.planted"]
):
    import qwen3_fp8_ascend.checkpoints.dequantize
    import qwen3_fp8_ascend.checkpoints.quantize  # noqa: F401
    import tests.fuzz.planted  # noqa: F401


from tests.fuzz.campaign import KNOWN, Figures, report, warm_up
from tests.fuzz.choices import Choices, random_choices
from tests.fuzz.judge import Judge

MAX_INPUT = 256
GUIDED = {name: KNOWN[name] for name in ("header", "config", "inspect", "quantize", "dequantize", "planted")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=GUIDED)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="inputs to begin with, and where those that cover more are kept")
    parser.add_argument("--artefacts", type=Path, help="where a condemned input goes (default: a new folder)")
    parser.add_argument("--figures", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    reader = GUIDED[options.reader]
    artefacts = options.artefacts or Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    for folder in (artefacts, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number in range(64):
            (corpus / f"seed-{number}").write_bytes(random_choices(options.seed, number, MAX_INPUT))
    warm_up(reader)
    figures = Figures(reader.name)
    started = time.perf_counter()
    with Judge(reader.read, reads_data=reader.reads_data) as judge:

        def read_one(data: bytes) -> None:
            folder = reader.make(Choices(data))
            verdict = judge.judge(folder)
            figures.add(verdict)
            if verdict.violation:
                report(figures, data, folder.damages, verdict, artefacts)
            if verdict.violation or figures.inputs == options.runs:
                figures.seconds = time.perf_counter() - started
                print(figures, flush=True)
                if options.figures:
                    options.figures.write_text(json.dumps(vars(figures)))
            if verdict.violation:
                raise RuntimeError(verdict.violation)

        atheris.Setup(
            [
                sys.argv[0],
                f"-runs={options.runs}",
                f"-seed={options.seed}",
                f"-max_len={MAX_INPUT}",
                f"-artifact_prefix={artefacts}/",
                "-timeout=0",  # the judge has its own
                "-rss_limit_mb=0",
                "-print_final_stats=1",
                str(corpus),
            ],
            read_one,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
