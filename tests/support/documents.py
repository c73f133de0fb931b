"""Markdown as the tests need it: headings, code blocks with the label above them, tables, links."""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- (?P<label>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Code:
    """A fenced block; `label` is the comment on the line above it, `section` what stands between it and its heading."""

    label: str | None
    language: str
    text: str
    section: str


@dataclass(frozen=True)
class Document:
    """A file in Markdown."""

    path: Path
    text: str

    @property
    def prose(self) -> str:
        """Everything but code blocks."""
        return FENCE.sub("", self.text)

    def headings(self) -> list[tuple[int, str]]:
        """Levels and texts."""
        return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#+) (.*)$", self.prose, re.MULTILINE)]

    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in self.headings()}

    def code(self) -> list[Code]:
        """Fenced blocks in order."""
        return [
            Code(
                m["label"],
                m["language"],
                m["text"],
                re.split(r"^#+ .*$", self.text[: m.start()], flags=re.MULTILINE)[-1],
            )
            for m in FENCE.finditer(self.text)
        ]

    def tables(self) -> list[tuple[int, int]]:
        """Rows and columns of each table."""
        found = re.findall(r"(?:^\|.*\|$\n?)+", self.prose, re.MULTILINE)
        shapes = []
        for table in found:
            widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in table.splitlines()}
            assert len(widths) == 1, f"{self.path}: rows of different widths:\n{table}"
            shapes.append((len(table.splitlines()), widths.pop()))
        return shapes

    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)


def read(path: Path) -> Document:
    """A document from its file."""
    return Document(path, path.read_text(encoding="utf-8"))
