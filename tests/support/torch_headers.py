"""Headers of releases of torch that are not installed, to compile against: fetched once, kept outside of git."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from fetch_torch_headers import fetch


def headers_of(version: str, cache: Path) -> Path:
    """A folder for the compiler; the installed torch's own if it is that release. Skips the test if there is none."""
    if torch.__version__.partition("+")[0] == version:
        return Path(torch.__file__).parent / "include"
    try:
        return fetch(version, cache / "torch-headers")
    except RuntimeError as error:
        pytest.skip(str(error))
