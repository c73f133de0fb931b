"""Both languages say the same, links lead somewhere, commands exist, and quoted results are those of the files."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks import tutorial
from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.terminal import UsageError
from tests.support.documents import Code, Document, read

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CHINESE = [path for path in DOCUMENTS if path.name.endswith(".zh.md")]
TUTORIALS = [ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.zh.md"]
LABELS = {"run", "server", "dry run", "not run"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def english(path: Path) -> Document:
    return read(path.with_name(path.name.replace(".zh.md", ".md")))


def commands(document: Document) -> list[Code]:
    return [block for block in document.code() if block.language == "bash"]


def test_there_is_a_chinese_readme_and_tutorial() -> None:
    assert {"README.zh.md", "tutorial.zh.md"} <= {path.name for path in CHINESE}


@pytest.mark.parametrize("path", CHINESE, ids=named)
def test_both_languages_have_the_same_shape(path: Path) -> None:
    ours, theirs = read(path), english(path)
    assert [level for level, _ in ours.headings()] == [level for level, _ in theirs.headings()]
    assert [(c.label, c.language, c.text) for c in ours.code()] == [
        (c.label, c.language, c.text) for c in theirs.code()
    ]
    assert ours.tables() == theirs.tables()

    def targets(document: Document) -> list[str]:
        links = (link.partition("#")[0].replace(".zh.md", ".md") for link in document.links())
        return sorted(link for link in links if link != theirs.path.name)  # but for the links to each other

    assert targets(ours) == targets(theirs)


@pytest.mark.parametrize("path", CHINESE, ids=named)
def test_the_chinese_is_chinese_and_the_english_is_not(path: Path) -> None:
    def share(document: Document) -> float:
        # Tables are full of names; those of results hold hardly anything else.
        prose = re.sub(r"^\|.*$", "", document.prose, flags=re.MULTILINE)
        letters = re.findall(r"[A-Za-z\u4e00-\u9fff]", prose)
        return sum(letter >= "\u4e00" for letter in letters) / len(letters)

    assert share(read(path)) > 0.25
    assert share(english(path)) < 0.02


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    document = read(path)
    for link in document.links():
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        assert target.is_relative_to(ROOT), f"{path.name}: {link} leaves the project"
        if anchor:
            assert anchor in read(target).anchors(), f"{path.name}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:tests|scripts|benchmarks|docs|csrc|qwen3_fp8_ascend)/[\w./-]+\.\w+)`", read(path).prose
    ):
        # Some documents name files within a folder that they have introduced.
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), f"{path.name}: {name}"


@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_every_command_of_the_tutorial_is_run_or_said_not_to_be(path: Path) -> None:
    blocks = commands(read(path))
    assert {block.label for block in blocks} == LABELS
    for block in blocks:
        if block.label == "not run":
            assert re.search(r"not run|未运行", block.section, re.IGNORECASE), block.text
        if block.label == "dry run":
            assert all(line.endswith("--dry-run") for line in block.text.splitlines()), block.text


def lines(code: Code) -> list[list[str]]:
    """The commands of a block as words."""
    return [shlex.split(line, comments=True) for line in code.text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_our_commands_have_these_options(path: Path) -> None:
    """Whatever a document tells to type is taken by the command line's own parser."""
    for words in (words for code in read(path).code() for words in _shell(code)):
        if words and words[0].endswith("qwen3-fp8-ascend"):
            try:
                _parse(words[1 : words.index(">") if ">" in words else None])
            except UsageError as error:
                pytest.fail(f"{path.name}: {shlex.join(words)}: {error}")


def _shell(code: Code) -> list[list[str]]:
    return (
        lines(code)
        if code.language in ("", "bash") and "qwen3-fp8-ascend" in code.text and "│" not in code.text
        else []
    )


def _parse(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = None
    while True:
        context = command.make_context(command.name or "main", list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        words = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, words)


def test_the_parser_refuses_what_does_not_exist() -> None:
    _parse(["verify", "http://127.0.0.1:8000", "--wait", "5"])
    for wrong in (["verify", "http://127.0.0.1:8000", "--bogus"], ["nonsense"], ["bench", "serving", "--rate", "1"]):
        with pytest.raises(UsageError):
            _parse(wrong)


SCRIPTS = {
    shlex.join(w): w for path in DOCUMENTS for c in commands(read(path)) for w in lines(c) if w[0].endswith(".sh")
}


@pytest.mark.parametrize("line", sorted(SCRIPTS))
def test_scripts_take_what_the_documents_give_them(line: str, tmp_path: Path) -> None:
    """With `--dry-run`, which checks everything but the machine."""
    words = SCRIPTS[line]
    if "--help" not in words and "--dry-run" not in words:
        words = [words[0], "--dry-run", *words[1:]]
    (tmp_path / "model").mkdir()
    words = [str(tmp_path / "model") if word.startswith(".cache/models/") else word for word in words]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout


RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("language", tutorial.TUTORIALS)
def test_the_tutorial_quotes_its_results(language: str) -> None:
    text = tutorial.TUTORIALS[language].read_text(encoding="utf-8")
    for name, quoted in (
        ("verify-smollm2", tutorial.verification(tutorial.load("verify-smollm2"))),
        ("throughput-smollm2", tutorial.throughput(tutorial.load("throughput-smollm2"), language)),
    ):
        assert f"<!-- table: {name} -->\n{quoted}\n<!-- end of table -->" in text, "python -m benchmarks.tutorial"


def test_the_errors_of_the_faq_exist() -> None:
    """Each quoted beginning of an error stands in the sources that print it."""
    sources = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("qwen3_fp8_ascend/**/*.py")]
    code = re.sub(r"\{[^}]*\}|\$\w+", "X", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    faq = tutorial.TUTORIALS["en"].read_text(encoding="utf-8").split("## FAQ")[1]
    quoted = re.findall(r"^\| `([^`]+)` \|", faq, re.MULTILINE)
    assert len(quoted) >= 5
    for line in quoted:
        assert line.replace("'X'", "X") in code, line


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_name_what_made_them_and_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text()
    facts = json.loads(text)["provenance"]
    assert facts["cpu"] and facts["date"] and facts["command"]
    assert not facts["commit"].endswith("-dirty")
    assert not re.search(r'"[^"]*(?:/tmp/|/home/|/root/|/work/)', text)
