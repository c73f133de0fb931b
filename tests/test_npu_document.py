"""docs/npu.md and its Chinese twin: what they quote is printed, and what they tell to type works as far as here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_fp8_ascend import doctor
from qwen3_fp8_ascend.backends import soc
from qwen3_fp8_ascend.backends.registry import load_backend
from tests.support.ascend_machine import page
from tests.support.documents import Document, read

ROOT = Path(__file__).parent.parent
PAGES = {name: read(ROOT / "docs" / name) for name in ("npu.md", "npu.zh.md")}
ENGLISH = PAGES["npu.md"]

each_page = pytest.mark.parametrize("document", PAGES.values(), ids=list(PAGES))


@each_page
def test_every_block_says_what_was_done_with_it(document: Document) -> None:
    for block in document.code():
        assert block.label in {"run", "dry run", "not run", "doctor"}, block.text
        if block.label == "not run":
            assert re.search(r"not run|未运行|未在 NPU 上运行", block.section, re.IGNORECASE), block.text


def test_the_quoted_page_of_doctor_is_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = page(tmp_path, monkeypatch)
    for document in PAGES.values():
        (quoted,) = [block.text for block in document.code() if block.label == "doctor"]
        assert quoted == printed, f"put this into {document.path.name}:\n{printed}"


def shell(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": tools} | variables
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_sign_of_life_on_a_cpu() -> None:
    (block,) = [block for block in ENGLISH.code() if block.label == "run" and "validate" in block.text]
    done = shell(block.text, DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(": passed"), done.stdout


def quoted_in_tables(document: Document) -> list[str]:
    """What the tables of messages quote: the first cell of a row, wholly in code."""
    return re.findall(r"^\| `([^`]+)` \| [^|]*\|", document.text, re.MULTILINE)


@each_page
def test_the_messages_that_are_quoted_exist(document: Document) -> None:
    files = [ROOT / "setup.py", ROOT / "build_ascend.py", *(ROOT / "qwen3_fp8_ascend").rglob("*.py")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    sources = re.sub(r"\{soc\.missing_npu\(\)\}|\{missing\}", "torch_npu sees no NPU", sources)
    sources = sources.replace("{oldest}", ".".join(map(str, doctor.OLDEST_CANN)))
    quoted = quoted_in_tables(document)
    assert len(quoted) == 21
    for message in quoted:
        parts = message.removeprefix("no NPU can be used: ")
        assert parts in sources, message


def test_the_table_of_chips_is_the_package_s() -> None:
    rows = re.findall(r"^\| (Atlas A2|Atlas A3|Ascend 950)[^|]*\| ([^|]+) \| ([^|]+) \|", ENGLISH.text, re.MULTILINE)
    assert len(rows) == len(soc.GENERATIONS)
    for machine, names, serves in rows:
        (generation,) = [g for g in soc.GENERATIONS if g.machines.startswith(machine)]
        assert set(re.findall(r"`(\w+)\*`", names)) == set(generation.names)
        first, *others = re.findall(r"`(\w+)`", serves)
        assert first == ("torch_npu" if generation.fp8_matmul else "ascendc")
        assert all("npu" in load_backend(name).device_types for name in (first, *others))


def test_the_readmes_link_here() -> None:
    assert "(docs/npu.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/npu.zh.md)" in (ROOT / "README.zh.md").read_text(encoding="utf-8")
