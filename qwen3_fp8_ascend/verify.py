"""The three questions of the verification report: completion, arithmetic, Chinese."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from rich.console import Console

from qwen3_fp8_ascend.errors import BlockFp8Error
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


@dataclass(frozen=True)
class Wording:
    """The words of the report's form in one language; `labels` are for the questions in turn."""

    title: str
    questions: tuple[str, ...]
    labels: tuple[str, ...]
    failed: str
    not_applicable: str
    complete: str
    incomplete: str


WORDINGS = {
    "en": Wording(
        title="{model}: functional verification",
        questions=("Basic text completion", "Arithmetic", "Chinese"),
        labels=("Generated", "Answer", "Chinese"),
        failed="failed",
        not_applicable="not applicable",
        complete="{model}: functional verification complete",
        incomplete="{model}: functional verification failed, {failed} of {asked}",
    ),
    "zh": Wording(
        title="{model} 功能验证",
        questions=("基本文本补全", "数学推理", "中文能力"),
        labels=("生成", "回答", "中文"),
        failed="未通过",
        not_applicable="不适用",
        complete="{model} 功能验证完成",
        incomplete="{model} 功能验证未通过: {failed}/{asked}",
    ),
}
RULE = "=" * 40
SHOWN = 100
"""Characters of an answer in the report's form."""


def report_lines(model: str, answers: Sequence[Answer], language: str = "en") -> list[str]:
    """All answers in the form of the verification report, in English ("en") or Chinese ("zh")."""
    words = WORDINGS[language]
    lines = [RULE, words.title.format(model=model), RULE]
    for number, (answer, question, label) in enumerate(zip(answers, words.questions, words.labels, strict=True), 1):
        text = " ".join(answer.text.split())
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        lines.append(f"[Test {number}] {question}...")
        if answer.verdict == "passed":
            lines.append(f"✅ {label}: {shown}")
        elif answer.verdict == "failed":
            lines.append(f"❌ {label}: {shown} ({words.failed}: {answer.reason})")
        else:
            lines.append(f"➖ {label}: {shown} ({words.not_applicable})")
    failed = sum(answer.verdict == "failed" for answer in answers)
    end = f"❌ {words.incomplete}" if failed else f"✅ {words.complete}"
    return [*lines, RULE, end.format(model=model, failed=failed, asked=len(answers)), RULE]


def document(server: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
    """What `--json` prints: the answers with the server that gave them and the machine that asked."""
    return {
        "kind": "verify",
        "version": 1,
        "provenance": provenance(),
        "server": server,
        "answers": [answer.to_dict() for answer in answers],
    }


def wait_until_up(base_url: str, seconds: float, tick: Callable[[float], None] | None = None) -> None:
    """Return once a server answers, at the latest after `seconds`; `tick(waited)` is called before each pause.

    Raises:
        BlockFp8Error: it does not.
    """
    start = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(f"{_root(base_url)}/health", timeout=10):
                return
        except urllib.error.HTTPError as answer:
            if answer.code == 404:  # a server that is not vLLM may have no /health
                return
            error: Exception = answer
        except (OSError, ValueError) as refused:
            error = refused
        waited = time.monotonic() - start
        if waited >= seconds or isinstance(error, ValueError):
            raise BlockFp8Error(
                "no server is up there" + (f" after {seconds:g} s" if seconds else ""),
                where=base_url,
                got=f"{type(error).__name__}: {error}",
                fix="start one (scripts/serve_qwen3-8b-fp8.sh), give its address, or wait longer (--wait)",
            )
        if tick is not None:
            tick(waited)
        time.sleep(min(1.0, seconds - waited))


def server_facts(base_url: str, model: str | None = None) -> dict[str, Any]:
    """What a server says of itself: `url`, `model` (as served), `root` (the checkpoint), `max_model_len`, `vllm`.

    Without `model` the first one that it lists. `root` is the name of the folder that is served; where it lies is the
    server's affair (`served_root` says it).
    Raises:
        BlockFp8Error: the server cannot be reached, lists no model, or not this one.
    """
    entry = _listed(base_url, model)
    return {
        "url": base_url,
        "model": entry.id,
        "root": PurePath(_root_of(entry)).name,
        "max_model_len": getattr(entry, "max_model_len", None),
        "vllm": _vllm_version(base_url),
    }


def served_root(base_url: str, model: str) -> str:
    """The folder or hub name that a server has a model from.

    Raises:
        BlockFp8Error: as `server_facts`.
    """
    return _root_of(_listed(base_url, model))


def _root_of(entry: Any) -> str:
    return str(getattr(entry, "root", None) or entry.id)


def _listed(base_url: str, model: str | None) -> Any:
    openai, client = client_of(base_url)
    try:
        models = {entry.id: entry for entry in client.models.list().data}
    except openai.OpenAIError as error:
        raise unanswered(base_url, error) from error
    if not models:
        raise BlockFp8Error("the server lists no model", where=base_url, fix="look into the server's log")
    name = next(iter(models)) if model is None else model
    if name not in models:
        raise BlockFp8Error(
            f"the server does not serve {name!r}",
            where=base_url,
            expected=f"one of {', '.join(models)}",
            fix="give the model's served name with --model, or leave it out",
        )
    return models[name]


def _vllm_version(base_url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{_root(base_url)}/version", timeout=10) as answer:
            return json.load(answer)["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _root(base_url: str) -> str:
    return base_url.rstrip("/").removesuffix("/v1")


def client_of(base_url: str) -> tuple[Any, Any]:
    try:
        import openai
    except ImportError as error:
        fix = "pip install 'qwen3-fp8-ascend[verify]'"
        raise BlockFp8Error("the openai client is not installed", fix=fix) from error
    return openai, openai.OpenAI(base_url=f"{_root(base_url)}/v1", api_key="none", max_retries=0, timeout=600)


def unanswered(base_url: str, error: Exception, model: str | None = None) -> BlockFp8Error:
    return BlockFp8Error(
        "the server did not answer",
        where=base_url if model is None else f"{base_url}, model {model!r}",
        got=f"{type(error).__name__}: {error}",
        fix="check that the server is up and that the model's name is the one it serves (/v1/models)",
    )


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
