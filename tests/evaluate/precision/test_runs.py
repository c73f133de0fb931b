"""Saved runs, comparisons and the command, on a small random model."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="transformers is not installed")

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision import runs
from qwen3_fp8_ascend.evaluate.precision.compare import compare
from qwen3_fp8_ascend.evaluate.precision.direct import BlockFp8Linear, encode, load_model
from qwen3_fp8_ascend.evaluate.precision.metrics import kl_divergence
from qwen3_fp8_ascend.evaluate.precision.prompts import PROMPTS, all_prompts
from qwen3_fp8_ascend.evaluate.precision.tables import METRICS
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.terminal import run as run_command
from qwen3_fp8_ascend.testing.judges import FP32_REL_L2
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.noise import FALSE_ALARMS, rank_sum_probability

LIMIT = "2"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    return write_block_fp8_qwen3(folder, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run made by the command once for each set of options."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(*options: str, source: Path = model) -> Path:
        path = folder / f"{abs(hash((options, source)))}.run"
        if path not in made:
            line = ["eval-precision", "run", str(source), str(path), "--limit", LIMIT, "--greedy-tokens", "4"]
            made[path] = run_command(app, [*line, *options])
            assert made[path] == 0
        return path

    return make


def test_a_run_is_what_transformers_computes(model: Path, saved: Callable[..., Path]) -> None:
    """The original checkpoint, loaded by us and by transformers itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model.with_name("qwen3-bf16")
    run = runs.load_run(saved(source=folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(all_prompts()[:1], return_tensors="pt").input_ids
    with torch.inference_mode():
        out = theirs(ids, output_hidden_states=True)
        continued = theirs.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    count = ids.shape[1] - 1
    assert run.logits is not None and run.layers is not None
    np.testing.assert_allclose(run.logits[:count], out.logits[0, :-1].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run.layers[-1, :count], out.hidden_states[-1][0, :-1].numpy(), rtol=1e-4, atol=1e-5)
    assert run.greedy[0].tolist() == continued[0, -4:].tolist()


def test_every_linear_of_a_block_fp8_model_is_ours(model: Path) -> None:
    loaded = load_model(model, "cpu", Activation.W8A8, torch.float32, "cpu")
    ours = [name for name, module in loaded.named_modules() if isinstance(module, BlockFp8Linear)]
    assert len(ours) == 2 * 7
    assert not [name for name, tensor in loaded.named_parameters() if tensor.is_meta]


def test_w8a16_of_a_backend_is_that_of_the_reference(saved: Callable[..., Path]) -> None:
    options = ("--activation", "w8a16")
    reference, run = (runs.load_run(saved("--backend", name, *options)) for name in ("reference", "cpu"))
    row = compare(run, reference)
    assert row.cosine is not None and row.cosine > 1 - 1e-9
    assert row.layers is not None and row.layers["max_rel"] < 1e-4
    assert row.top1_agreement == 1.0


DRAWS = 7


def divergence(model: torch.nn.Module, tokenizer: Any, reference: list[np.ndarray]) -> np.ndarray:
    """KL from the reference's logits of each prompt, in nats a token. Shapes: -> (prompts,)."""
    with torch.inference_mode():
        logits = [model(encode(tokenizer, text, model)).logits[0].numpy() for text in all_prompts()]
    return np.array([kl_divergence(*pair).mean() for pair in zip(logits, reference, strict=True)])


def disturb(model: torch.nn.Module, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """Have all our linears' results changed by a function; the returned one ends it."""
    linears = [module for module in model.modules() if isinstance(module, BlockFp8Linear)]
    hooks = [module.register_forward_hook(lambda module, arguments, out: by(out)) for module in linears]
    return lambda: [hook.remove() for hook in hooks] and None


def test_w8a8_of_a_backend_moves_no_more_than_rounding_moves_it(model: Path) -> None:
    """Two exact implementations differ in the last bits of a sum, which flips a few codes, which flips more of them.

    How far they end up from each other is chance. The draws are the specification itself with every linear's result
    off by random FP32_REL_L2, the most that an exact backend may be off; `rank_sum_probability` says how often that
    looks as far off as the backend does. The negative controls are found by the same judge.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    specified, ours, expanded = (
        load_model(model, name, Activation.W8A8, torch.float32, "cpu") for name in ("reference", "cpu", "dequantized")
    )
    with torch.inference_mode():
        reference = [specified(encode(tokenizer, text, specified)).logits[0].numpy() for text in all_prompts()]
    generator = torch.Generator().manual_seed(0)
    restore = disturb(specified, lambda y: y * (1 + FP32_REL_L2 * torch.randn(y.shape, generator=generator)))
    noise = np.stack([divergence(specified, tokenizer, reference) for _ in range(DRAWS)], axis=1)
    restore()
    assert (divergence(specified, tokenizer, reference) == 0).all()
    off = divergence(ours, tokenizer, reference)
    print(f"\nnats a token: {DRAWS} draws of rounding {noise.mean():.2e}, the backend {off.mean():.2e}")
    assert rank_sum_probability(off, noise) > FALSE_ALARMS

    wrong = divergence(expanded, tokenizer, reference)
    assert rank_sum_probability(wrong, noise) < FALSE_ALARMS
    disturb(ours, lambda y: y * 1.001)
    assert rank_sum_probability(divergence(ours, tokenizer, reference), noise) < FALSE_ALARMS


@pytest.mark.parametrize("activation", list(Activation))
def test_the_specification_is_the_reference_backend_to_the_bit(model: Path, activation: Activation) -> None:
    """Codes that were converted beforehand give what the backend gives, which converts them at every call."""
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
    x = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    packed = ops.pack_weight(weight, scale, backend="reference")
    for dtype in (torch.float32, torch.bfloat16):
        expected = ops.block_linear(x.to(dtype), packed, None, activation)
        for converted in (False, True):
            linear = BlockFp8Linear(weight, scale, packed.grid, None, "reference", activation, converted)
            assert torch.equal(linear(x.to(dtype)), expected)
            fp64 = BlockFp8Linear(weight, scale, packed.grid, None, "reference-fp64", activation, converted)
            torch.testing.assert_close(fp64(x.to(dtype)), expected)


def test_a_comparison_notices_a_wrong_model(saved: Callable[..., Path]) -> None:
    """The negative control: one layer off by 3 %."""
    reference = runs.load_run(saved("--backend", "reference", "--activation", "w8a16"))
    wrong = dataclasses.replace(reference, logits=reference.logits * 1.03, layers=reference.layers.copy())
    wrong.layers[1] += 0.03 * np.abs(wrong.layers[1]).mean()
    row = compare(wrong, reference)
    assert row.max_rel == pytest.approx(0.03, rel=1e-3)
    assert row.layers is not None and row.layers["max_rel"] > 0.01


def test_without_logits_the_divergence_is_a_lower_bound(saved: Callable[..., Path]) -> None:
    reference, run = (runs.load_run(saved("--backend", b)) for b in ("reference", "dequantized"))
    short = dataclasses.replace(run, logits=None, layers=None)
    full, bound = compare(run, reference), compare(short, reference)
    assert bound.cosine is None and bound.layers is None and bound.kl_from == "top 20"
    assert 0 <= bound.kl_mean <= full.kl_mean + 1e-7


def test_runs_survive_their_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    run = runs.load_run(saved("--backend", "cpu"))
    runs.save_run(run, tmp_path / "again.run")
    again = runs.load_run(tmp_path / "again.run")
    for field in dataclasses.fields(run):
        a, b = getattr(run, field.name), getattr(again, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_a_damaged_file_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    whole = saved("--backend", "cpu").read_bytes()
    for name, data in {"cut": whole[:-100], "short": whole[:50], "empty": b"", "noise": b"x" * 100}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(BlockFp8Error, match="no saved run"):
            runs.load_run(path)
    with pytest.raises(BlockFp8Error, match="no saved run"):
        runs.load_run(tmp_path / "absent")


def test_runs_of_other_prompts_or_tokens_are_refused(saved: Callable[..., Path]) -> None:
    run = runs.load_run(saved("--backend", "cpu"))
    with pytest.raises(BlockFp8Error, match="different prompts"):
        compare(dataclasses.replace(run, prompts=["a", "b"]), run)
    other = dataclasses.replace(run, ids=run.ids + 1)
    with pytest.raises(BlockFp8Error, match="tokenizers differ"):
        compare(other, run)


def test_compare_writes_table_page_and_json(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(saved("--backend", b)) for b in ("reference", "cpu", "dequantized", "reference-fp64")]
    outputs = [str(tmp_path / name) for name in ("t.md", "t.html", "t.json")]
    line = ["eval-precision", "compare", *paths[:3], "--floor", paths[3]]
    line += ["--markdown", outputs[0], "--html", outputs[1], "--output", outputs[2]]
    assert run_command(app, line) == 0
    document = json.loads(Path(outputs[2]).read_text())
    assert [row["name"] for row in document["rows"]] == ["cpu w8a8", "dequantized float32"]
    assert [row["within"] is None for row in document["rows"]] == [False, True]  # another arithmetic is not judged
    assert {row["made"]["device"] for row in document["rows"]} == {"cpu"}
    table, page = Path(outputs[0]).read_text(), Path(outputs[1]).read_text()
    header = "|  | cpu w8a8 | dequantized float32 | noise floor |"
    assert table.startswith("**qwen3: against reference w8a8**") and header in table
    assert len(re.findall(r"^\| .* \|$", table, re.MULTILINE)) == 2 + len(METRICS) + 1
    assert "data:image/svg+xml;base64," in page and "<th>noise floor</th>" in page
    assert header in capsys.readouterr().out
    cosines = [row["cosine"] for row in document["rows"]]
    assert run_command(app, [*line, "--min-cosine", str(min(cosines))]) == 0
    assert run_command(app, [*line, "--min-cosine", str(min(cosines) + 1e-9)]) == 1
    assert run_command(app, [*line, "--min-top1", "1.0"]) == (
        0 if all(row["top1_agreement"] == 1 for row in document["rows"]) else 1
    )


def test_linears_alone_are_exact(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval-precision", "linears", str(model), "--backend", "cpu", "--limit", "1", "--json"]
    assert run_command(app, line) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["name"], row["units"], row["unit"]) for row in rows] == [
        ("cpu", 14, "linear"),
        ("reference", 14, "linear"),
        ("cpu", 2, "decoder layer"),
        ("reference", 2, "decoder layer"),
    ]
    ours, specification, layers, _ = rows
    for row in (ours, specification):
        assert row["max_rel"] < 1e-6 and row["min_cosine"] > 1 - 1e-9 and row["near"] == 1
        assert row["equal"] > 0.3
    assert layers["cosine"] > 0.99999 and layers["near"] > 0.99 and layers["equal"] is None


def test_linears_alone_notice_a_wrong_backend(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: one part in a thousand too much."""
    right = ops.block_linear

    def wrong(x: torch.Tensor, packed: ops.PackedWeight, *rest: Any) -> torch.Tensor:
        out = right(x, packed, *rest)
        return out if packed.backend == "reference" else out * 1.001

    monkeypatch.setattr(ops, "block_linear", wrong)
    assert run_command(app, ["eval-precision", "linears", str(model), "--limit", "1", "--json"]) == 0
    ours, specification, layers, _ = json.loads(capsys.readouterr().out)["rows"]
    assert ours["max_rel"] == pytest.approx(1e-3, rel=0.01) and ours["equal"] < 0.1
    assert specification["max_rel"] < 1e-6 and layers["p99_rel"] > 1e-4


def test_biases_are_added_where_the_specification_adds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_block_fp8_qwen3(tmp_path / "biased", attention_bias=True)
    line = ["eval-precision", "linears", str(model), "--limit", "1", "--dtype", "bfloat16", "--json"]
    assert run_command(app, line) == 0
    ours, specification, *_ = json.loads(capsys.readouterr().out)["rows"]
    assert ours["equal"] > 0.99 and specification["equal"] > 0.99


MODEL = "a checkpoint that is there"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "absent", "out.run"], "checkpoint folder cannot be read"),
        (["run", "http://127.0.0.1:9", "out.run"], "server"),
        (["run", "absent", "out.run", "--dtype", "int8"], "float32"),
        (["run", MODEL, "out.run", "--device", "tpu"], "unknown value"),
        (["run", MODEL, "out.run", "--device", "npu"], "there is no such device"),
        (["linears", MODEL, "--device", "cuda"], "there is no such device"),
        (["run", "absent", "out.run", "--prompts", "absent.json"], "prompts cannot be read"),
        (["compare", "absent.run", "absent.run"], "no saved run"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(model) if argument == MODEL else argument for argument in arguments]
    assert run_command(app, ["eval-precision", *line]) == 2
    error = capsys.readouterr().err
    assert said in error and "what to do:" in error


@pytest.mark.parametrize("what", ["no tokenizer", "one token", "another model's tokenizer", "unknown backend"])
def test_what_cannot_be_run_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    options, said = ["--limit", "1"], "a prompt's tokens cannot be used"
    if what == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
        said = "token"  # which of two errors depends on the version of transformers
    elif what == "one token":
        (tmp_path / "prompts.json").write_text('["a"]')
        options = ["--prompts", str(tmp_path / "prompts.json")]
    elif what == "another model's tokenizer":
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        (folder / "tokenizer.json").write_text(re.sub(r'"T": \d+', '"T": 264', text), encoding="utf-8")
    else:
        options, said = ["--backend", "bogus"], "unknown value"
    assert run_command(app, ["eval-precision", "run", str(folder), str(tmp_path / "x.run"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and "what to do:" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.run"))


def test_the_prompts_cover_what_the_report_asks() -> None:
    assert set(PROMPTS) == {"English", "Chinese", "arithmetic", "code"}
    assert len(set(all_prompts())) == len(all_prompts()) >= 12
