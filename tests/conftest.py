import os
from pathlib import Path

import pytest
from hypothesis import settings

# No test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile("default", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")

CACHE = Path(__file__).parent.parent / ".cache"


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where models and downloads are kept from run to run."""
    CACHE.mkdir(exist_ok=True)
    return CACHE
