"""The three questions of the verification report: completion, arithmetic, Chinese."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from qwen3_fp8_ascend.evaluate.servers import client_of, unanswered
from qwen3_fp8_ascend.evaluate.templates import render as render_template
from qwen3_fp8_ascend.provenance import provenance

MIN_TOKENS = 4
"""Chat models may hold a prompt that ends in "Answer:" for finished and stop at once; they have to say something."""


@dataclass(frozen=True)
class Question:
    """`check` returns None for a good answer, else what is wrong with it."""

    title: str
    prompt: str
    check: Callable[[str], str | None]
    language: str = "en"
    max_tokens: int = 64


@dataclass(frozen=True)
class Answer:
    """`verdict` is "passed", "failed" or "not applicable"; times in seconds, `tpot` from the second token on."""

    title: str
    prompt: str
    text: str
    verdict: str
    reason: str | None
    tokens: int
    ttft: float
    tpot: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_english(text: str) -> str | None:
    words = re.findall(r"[A-Za-z]{2,}", text)
    if len(words) < 8:
        return f"only {len(words)} words of English"
    if len({w.lower() for w in words}) < len(words) * 0.3:
        return "it repeats itself"
    return None


def _check_sixty(text: str) -> str | None:
    sixty = r"(?<![\d.,])60(?:\.0+)?(?!\.?\d)"
    speed = rf"{sixty}\s*(?:km|kilomet|公里|千米)|=\s*{sixty}|^\W*{sixty}"
    return None if re.search(speed, text.strip()) else "60 (km/h) is not in it"


def _check_chinese(text: str) -> str | None:
    letters = [c for c in text if not c.isspace()]
    chinese = [c for c in letters if "\u4e00" <= c <= "\u9fff"]
    if len(letters) < 10 or len(chinese) < 0.5 * len(letters):
        return f"{len(chinese)} of {len(letters)} characters are Chinese"
    if len(set(chinese)) < 0.25 * len(chinese):
        return f"it repeats itself: {len(chinese)} Chinese characters, {len(set(chinese))} different ones"
    return None


QUESTIONS = (
    Question("completion", "The future of AI is", _check_english),
    Question("arithmetic", "If a train travels 120 km in 2 hours, what is its average speed? Answer:", _check_sixty),
    Question("Chinese", "请用中文介绍人工智能的基本概念:", _check_chinese, language="zh"),
)


MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]failed[/]", "not applicable": "[yellow]not applicable[/]"}


def render(number: int, answer: Answer, console: Console) -> None:
    """Print one answer in the form of the verification report."""
    reason = f": {answer.reason}" if answer.reason else ""
    console.print(f"\n[bold]\\[Test {number}] {answer.title}[/] {MARKS[answer.verdict]}{reason}", highlight=False)
    console.print(f"  {answer.prompt}", style="dim", highlight=False, markup=False)
    console.print(f"  {answer.text}", highlight=False, markup=False)


SHOWN = 100
"""Characters of an answer in the report's form."""


def form(model: str, answers: Sequence[Answer], language: str = "en") -> str:
    """All answers in the form of the verification report, in English ("en") or Chinese ("zh")."""
    texts = [" ".join(answer.text.split()) for answer in answers]
    return render_template(
        f"answers.{language}.txt",
        model=model,
        answers=answers,
        shown=[text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for text in texts],
        failed=sum(answer.verdict == "failed" for answer in answers),
    )


def document(server: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """What `--json` prints: the answers with the server that gave them and the machine that asked."""
    return {
        "kind": "verify",
        "version": 1,
        "provenance": provenance(),
        "server": server,
        "answers": [answer.to_dict() for answer in answers],
    }


def ask(base_url: str, model: str, question: Question, languages: tuple[str, ...] = ("en", "zh")) -> Answer:
    """Ask a running OpenAI-compatible server one question, greedily, and time its tokens.

    `languages` are those the model speaks; a question in another one is shown but not judged.
    Raises:
        BlockFp8Error: the server cannot be reached or refuses the request.
    """
    openai, client = client_of(base_url)
    text, stamps = "", []
    start = time.perf_counter()
    try:
        stream = client.completions.create(
            model=model,
            prompt=question.prompt,
            max_tokens=question.max_tokens,
            temperature=0,
            stream=True,
            extra_body={"min_tokens": MIN_TOKENS},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                stamps.append(time.perf_counter())
                text += chunk.choices[0].text
    except openai.OpenAIError as error:
        raise unanswered(base_url, error, model) from error
    end = time.perf_counter()
    if question.language in languages:
        reason = question.check(text)
        verdict = "passed" if reason is None else "failed"
    else:
        verdict, reason = "not applicable", f"the model does not speak {question.title}"
    ttft = (stamps[0] if stamps else end) - start
    tpot = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else None
    return Answer(question.title, question.prompt, text.strip(), verdict, reason, len(stamps), ttft, tpot)
