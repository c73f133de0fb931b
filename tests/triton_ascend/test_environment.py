"""Says why the rest of this folder was not collected, where that is so."""

import pytest


def test_triton_ascend_is_here(environment_reason):
    if environment_reason:
        pytest.skip(f"{environment_reason}; it has an environment of its own: `make test-triton-ascend`")
