import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.answers import QUESTIONS, ask
from qwen3_fp8_ascend.evaluate.servers import server_facts, wait_until_up
from qwen3_fp8_ascend.serving import failure_in, free_port
from tests.support.answering_server import answering

ROOT = Path(__file__).parents[2]
COMPLETION, ARITHMETIC, CHINESE = QUESTIONS


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (COMPLETION, " increasingly intertwined with advances in machine learning, language processing, and robotics."),
        (ARITHMETIC, " 120 / 2 = 60 km/h"),
        (ARITHMETIC, "The average speed of the train is 60 km/h. This is calculated by dividing 120 by 2."),
        (ARITHMETIC, " 60"),
        (ARITHMETIC, "60.0 kilometers per hour"),
        (CHINESE, "人工智能（AI）是计算机科学的一个重要分支，旨在创造能够模拟人类智能的系统。"),
        (
            CHINESE,
            "人工智能的基本概念包括：机器学习，即让计算机从数据中学习；深度学习，即使用多层神经网络处理复杂模式；自然语言处理，"
            "即理解和生成人类语言；以及计算机视觉，即识别和理解图像。机器学习和深度学习是人工智能的基础。",
        ),
    ],
)
def test_good_answers_pass(question, text: str) -> None:
    assert question.check(text) is None


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (COMPLETION, ""),
        (COMPLETION, " the the the the the the the the the the the the"),
        (COMPLETION, "#$%^ 1 2 3"),
        (ARITHMETIC, "The time taken is 2 hours * 60 minutes = 12 hours, so it is 18 km/h."),
        (ARITHMETIC, "160 km/h"),
        (ARITHMETIC, "60.5 km/h"),
        (ARITHMETIC, "240"),
        (CHINESE, "Artificial intelligence is a branch of computer science."),
        (CHINESE, "人工"),
        (CHINESE, "- 1. 用户工公公公公公公公公公公公公公公公公公公公公公公公公公公"),
    ],
)
def test_bad_answers_fail_with_a_reason(question, text: str) -> None:
    assert question.check(text)


def test_a_server_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for call in (lambda: server_facts(url), lambda: ask(url, "model", COMPLETION)):
        with pytest.raises(BlockFp8Error, match=f"did not answer\n  where: {url}"):
            call()
    with pytest.raises(BlockFp8Error, match=r"no server is up there after 0\.2 s"):
        wait_until_up(url, 0.2)


def test_a_server_that_comes_up_late_is_waited_for() -> None:
    port, waits = free_port(), []
    with ExitStack() as stack:

        def tick(waited: float) -> None:
            if not waits:
                stack.enter_context(answering({}, port=port))
            waits.append(waited)

        wait_until_up(f"http://127.0.0.1:{port}", 60, tick)
    assert len(waits) == 1


GOOD = {
    "future of AI": "increasingly intertwined with advances in machine learning, language processing and robotics, "
    "and will shape how people work.",
    "train": "The average speed of the train is 60 km/h.",
    "人工智能": "人工智能是计算机科学的一个重要分支，旨在创造能够模拟人类智能的系统。",
}


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `verify` or its script."""
    start = [sys.executable, "-m", "qwen3_fp8_ascend", "verify"]
    if program == "script":
        start = ["bash", str(ROOT / "scripts" / "verify_qwen3-8b-fp8.sh"), "--python", sys.executable]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, check=False, timeout=600)


def test_the_script_prints_the_form_of_the_report() -> None:
    with answering(GOOD) as url:
        done = run("script", "--url", url)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    rule = "=" * 40
    assert done.stdout.splitlines() == [
        rule,
        "Qwen3-8B-FP8 功能验证",
        rule,
        "[Test 1] 基本文本补全...",
        f"✅ 生成: {GOOD['future of AI'][:100]}...",
        "[Test 2] 数学推理...",
        f"✅ 回答: {GOOD['train']}",
        "[Test 3] 中文能力...",
        f"✅ 中文: {GOOD['人工智能']}",
        rule,
        "✅ Qwen3-8B-FP8 功能验证完成",
        rule,
    ]


def test_json_names_who_answered_and_who_asked(tmp_path: Path) -> None:
    with answering(GOOD) as url:
        done = run("script", "--url", url, "--json", "--output", str(tmp_path / "new" / "verify.json"))
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "new" / "verify.json").read_text())
    assert (done.returncode, found["kind"], found["version"]) == (0, "verify", 1)
    expected = {"url": url, "model": "qwen3-8b-fp8", "root": "Qwen3-8B-FP8", "max_model_len": 4096, "vllm": "0.30.0"}
    assert found["server"] == expected
    assert found["provenance"]["date"] and "verify" in found["provenance"]["command"]
    assert [answer["verdict"] for answer in found["answers"]] == ["passed"] * 3
    assert found["answers"][1]["text"] == GOOD["train"] and found["answers"][1]["tokens"] == 9


@pytest.mark.parametrize("form", ["en", "zh"])
@pytest.mark.parametrize("part", GOOD)
def test_one_bad_answer_is_exit_code_1(part: str, form: str) -> None:
    with answering(GOOD | {part: "I do not know"}) as url:
        done = run("verify", url, "--form", form)
    assert done.returncode == 1
    assert done.stdout.count("❌") == 2 and done.stdout.count("✅") == 2
    assert {"en": "failed, 1 of 3", "zh": "功能验证未通过: 1/3"}[form] in done.stdout


def test_a_language_that_the_model_does_not_speak_is_not_judged() -> None:
    with answering(GOOD | {"人工智能": "I do not know"}) as url:
        done = run("script", "--url", url, "--languages", "en", "--form", "en")
    assert done.returncode == 0
    assert "➖ Chinese: I do not know (not applicable)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen3"], "the server does not serve 'qwen3'; where: http"),
        (["--form", "fr"], "choose one of: en, zh"),
        (["--language", "fr"], "choose one of: en, zh"),
        (["--output", "/proc/verify.json"], "the result cannot be written"),
    ],
)
def test_mistakes_are_exit_code_2_and_one_line(arguments: list[str], said: str) -> None:
    with answering(GOOD) as url:
        done = run("verify", url, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr and "what to do" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_script_without_a_server_is_exit_code_2() -> None:
    done = run("script", "--url", f"http://127.0.0.1:{free_port()}", "--wait", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no server is up there") and "serve_qwen3-8b-fp8.sh" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_reason_is_found_in_a_server_log(tmp_path) -> None:
    log = tmp_path / "server.log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-22 15:06:56 [system.py:299] errors like `OSError: [Errno 24]`.\n"
        '(Worker pid=2) ERROR 11-22 15:07:19 [executor.py:944]   File "x.py", line 1, in make\n'
        "(Worker pid=2) ERROR 11-22 15:07:19 [executor.py:944]     raise BlockFp8Error(\n"
        "(Worker pid=2) ERROR 11-22 15:07:19 [executor.py:944] a.errors.BlockFp8Error: unknown backend 'x'\n"
        "(Worker pid=2) ERROR 11-22 15:07:19 [executor.py:944]   got: x\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed.\n"
    )
    assert failure_in(log) == "a.errors.BlockFp8Error: unknown backend 'x'\n  got: x"
