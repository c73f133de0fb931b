"""What is written for people stands in `templates/`: one template for each document and language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A document from its template, such as "verification_report.zh.md".

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return environment().get_template(f"{template}.j2").render(values)


@cache
def environment() -> Environment:
    """The templates of this package. HTML is escaped, Markdown and text are not."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("qwen3_fp8_ascend.evaluate"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals.update(row=row, head=head, table=table)
    return made


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without the last line's end."""
    return "\n".join([head(header), *(row(cells) for cells in rows)])


def head(header: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{row(header)}\n{row(['---'] * len(header))}"


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
