"""``qwen3-fp8-ascend report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen3_fp8_ascend.terminal import err, write_bytes


def add_commands(main: typer.Typer) -> None:
    """Make `report` a command of the command line."""
    main.command(epilog="Example: qwen3-fp8-ascend report docs/results npu-results --output docs")(report)


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files (JSON), or folders of them.")],
    output: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("verification"),
) -> None:
    """Write the verification report in English and Chinese from result files; what has none is marked "not run"."""
    from qwen3_fp8_ascend.report.pages import write_pages
    from qwen3_fp8_ascend.report.results import read_results

    for name, content in write_pages(read_results(results)).items():
        write_bytes(output / name, content.encode() if isinstance(content, str) else content)
        err.print(f"wrote {output / name}", highlight=False)
