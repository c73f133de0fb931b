"""Ignore lists as people write them, and patterns that mean harm."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend.checkpoints.ignore import MAX_PATTERNS, IgnoreList
from qwen3_fp8_ascend.checkpoints.patterns import Pattern, UnreadableError, glob
from tests.support.own_time import within

Q = "model.layers.1.self_attn.q_proj"
IN_A = "model.language_model.layers.0.linear_attn.in_proj_a"


@pytest.mark.parametrize(
    ("entry", "module"),
    [
        (Q, Q),
        ("model.layers.1", Q),
        ("q_proj", Q),
        ("self_attn.q_proj", Q),
        ("self_attn", Q),
        ("layers.1", Q),
        ("qkv_proj", Q),  # the layer that it becomes a part of
        ("model.layers.1.self_attn.qkv_proj", Q),
        ("gate_up_proj", "model.layers.1.mlp.up_proj"),
        ("model.language_model.layers.1.self_attn.q_proj", Q),  # a wrapper in the list, none in the model
        (Q, "model.language_model.layers.1.self_attn.q_proj"),  # and the other way round
        ("language_model.lm_head", "lm_head"),
        ("model.visual", "visual.blocks.0.attn.qkv"),  # vLLM's mapper knows `model.visual.` only
        ("model.vision_tower", "vision_tower.transformer.layers.0.attention.q_proj"),  # Mistral
        ("multi_modal_projector", "model.multi_modal_projector.linear_1"),
        (r"re:.*in_proj_[ab]$", IN_A),
        (r"re:.*lm_head", "lm_head"),
        (r"re:visual.*", "visual.blocks.0.attn.qkv"),
        (r"re:model\.visual\..*", "visual.blocks.0.attn.qkv"),
        (r"re:.*mlp\.gate$", "model.layers.3.mlp.gate"),
        (r"re:model\.layers\.(0|1)\..*", Q),
        ("*.linear_attn.in_proj_a", IN_A),
        ("*linear_attn.in_proj_a*", IN_A),
        ("*.linear_attn.in_proj_[ab]", IN_A),
        ("model.layers.*.mlp.down_proj", "model.layers.12.mlp.down_proj"),
        ("model.layers.1*", Q),
        (r"model\.layers\.\d+\.self_attn", Q),  # transformers
        (r".*\.self_attn\.(?:q|k|v)_proj$", Q),
    ],
)
def test_what_a_list_names(entry: str, module: str) -> None:
    assert IgnoreList([entry]).has(module)
    assert IgnoreList(["lm_head", "model.embed_tokens", entry]).has(module)


@pytest.mark.parametrize(
    ("entry", "module"),
    [
        ("", Q),
        ("proj", Q),
        ("model.layers.11", Q),
        ("attn.q_proj", Q),
        (f"{Q}.x", Q),
        ("model", "visual.blocks.0.attn.qkv"),
        ("model.language_model.layers.0.mlp.gate", "visual.layers.0.mlp.gate"),
        ("gate", "model.layers.0.mlp.gate_proj"),
        ("k_proj", Q),
        (r"re:.*in_proj_[ab]$", "model.layers.0.linear_attn.in_proj_ba"),
        (r"re:layers\.1$", Q),
        ("*.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("model.layers.*.mlp.down_proj", "model.layers.1.mlp.up_proj"),
        (r"model\.layers\.1", "model.layers.11.mlp.up_proj"),
        ("mlp.gate", "model.layers.0.mlp.gate_proj"),
    ],
)
def test_what_a_list_does_not_name(entry: str, module: str) -> None:
    assert not IgnoreList([entry]).has(module)


TEXT = st.text("abx._1", max_size=12)
PIECES = st.lists(
    st.sampled_from(
        ["a", "b", ".", "x*", "(a|b)*", "[ab]+", r"\.", r"\d?", "a{1,2}", "(?:ab)+?", "^", "$", "[^.]*", "|", r"\w+"]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(PIECES, TEXT)
def test_patterns_are_pythons(pattern: str, name: str) -> None:
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        ours = Pattern(pattern)
    except UnreadableError:
        return
    name = name.rstrip("\n")
    assert ours.matches(name) == (re.match(pattern, name) is not None)
    assert ours.matches(name, whole_parts=True) == (re.match(f"(?:{pattern}){boundary}", name) is not None)


@pytest.mark.parametrize("text", ["a*b?.c", "*", "x[1b]", "*[!b].c", "a-!"])
def test_globs_become_patterns(text: str) -> None:
    ours = Pattern(glob(text) + "$")
    for name in ("ab.c", "aab", "axxbx.c", "xb", "x1", "a-!", "!a.c", ""):
        assert ours.matches(name) == fnmatch.fnmatchcase(name, text), name


@pytest.mark.parametrize(
    "text",
    [
        "(?!a)b",
        "(?<=a)b",
        r"(a)\1",
        "(?P<n>a)",
        "(a",
        "a)",
        "[a",
        "a{2",
        "a{99}",
        "*a",
        "a**",
        "\\",
        "(" * 30,
        "a" * 600,
    ],
)
def test_what_is_not_understood_is_said(text: str) -> None:
    with pytest.raises(UnreadableError):
        Pattern(text)
    assert IgnoreList([f"re:{text}"]).unreadable == [f"re:{text}"]
    assert not IgnoreList([f"re:{text}"]).has("b")


EVIL = [
    r"re:(a*)*b",
    r"re:(a|a)*b",
    r"re:(a+)+$",
    r"re:(.*a){20}",
    r"re:.*a.*a.*a.*a.*a.*b",
    r"re:(a?){60}a{60}",
    "*a" * 40 + "b",
]


@pytest.mark.parametrize("entry", EVIL)
def test_no_pattern_takes_long(entry: str) -> None:
    """Python's own `re` would take longer than the universe has for some of them."""
    with within(3):
        found = IgnoreList([entry])
        try:
            for number in range(300):
                found.has(f"{number}." + "a" * 500)
        except UnreadableError:
            pass


def test_a_list_of_patterns_without_end_gives_up() -> None:
    found = IgnoreList([f"re:(a|b)*a(a|b){{{n % 20}}}c{n}" for n in range(2 * MAX_PATTERNS)])
    assert len(found.unreadable) == MAX_PATTERNS
    with within(10), pytest.raises(UnreadableError):
        for number in range(100_000):
            found.has(format(number, "b").replace("0", "a").replace("1", "b") * 20)
