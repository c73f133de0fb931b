import dataclasses
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def spared_interpreter():
    """Leaves out what takes half of the time of upstream Triton's interpreter and changes no result.

    It computes whether each integer operation overflows, and drops the answer unless `debug` is set. And for every call
    of a device function it looks through all of Triton's language for what it has to replace, which stays replaced.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, honest = interpreter.interpreter_builder, interpreter._patch_lang
    assert not builder.options.debug, "an overflow is an error then"
    kept, languages = {}, {}

    def once(function):
        names = function.__globals__
        if id(names) not in languages:
            here = frozenset(v.__name__ for v in names.values() if v is interpreter.tl or v is interpreter.tl.core)
            languages[id(names)] = here, names  # kept, so that no other gets its id
        here, _ = languages[id(names)]
        if here not in kept:
            kept[here] = honest(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patched.setattr(interpreter, "_patch_lang", once)
        yield
    for scope in reversed(kept.values()):
        scope.restore()
