"""Tables in documents: what stands between two markers is written by a command."""

from __future__ import annotations

import re
from pathlib import Path


def insert_table(document: Path, name: str, table: str) -> None:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end of table -->`.

    Raises:
        SystemExit: the document has no such markers.
    """
    text = document.read_text()
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{document} has no markers for the table {name!r}")
    document.write_text(pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text))
