import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# No test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile("default", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms too: `make test-long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Servers last: they take minutes, and what breaks them is mostly found sooner. Long forms only with `--long`."""
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
    items.sort(key=lambda item: item.get_closest_marker("server") is not None)


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where models and downloads are kept from run to run."""
    CACHE.mkdir(exist_ok=True)
    return CACHE


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> Path:
    """The demo's real model in block FP8; the bf16 one is beside it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from prepare_demo_model import prepare

    return prepare(cache / "models")
