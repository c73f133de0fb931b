import pytest

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.server import failure_in, free_port
from qwen3_fp8_ascend.verify import QUESTIONS, ask, served_model

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
    ],
)
def test_bad_answers_fail_with_a_reason(question, text: str) -> None:
    assert question.check(text)


def test_a_server_that_is_not_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for call in (lambda: served_model(url), lambda: ask(url, "model", COMPLETION)):
        with pytest.raises(BlockFp8Error, match=f"did not answer\n  where: {url}"):
            call()


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
