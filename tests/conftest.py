import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# Threads that spin while they wait starve others, and tests run beside each other and beside whatever else there is.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")

pytest_plugins = ["tests.support.costs"]

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms too: `make test-long`")
    parser.addoption("--device", default="cpu", help="cpu, cuda or npu: what tests/test_ops.py runs on")


def pytest_configure(config: pytest.Config) -> None:
    """Before workers are started, and modules imported that ask for the device."""
    if not hasattr(config, "workerinput"):
        keep_what_is_left_behind_in_one_folder()
    if config.getoption("--device") != "cpu":
        from tests.support import devices

        devices.choose(config.getoption("--device"))


def keep_what_is_left_behind_in_one_folder() -> None:
    """Temporary files that nobody removes: engines of vLLM leave sockets and files, compilers that are killed objects.

    What tests make in `tmp_path` stays, as always, where pytest keeps the last three runs.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="tests-")
    # Behind what multiprocessing removes there (at -100), which prints a traceback if it is gone.
    multiprocessing.util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)
    os.environ["TMPDIR"] = tempfile.tempdir = folder


APART = ("test_cpu_sanitizers.py", "tests/server/")
"""Tests that share nothing worth keeping, and take long: any worker takes any of them, not the whole file."""
TOGETHER = ("tests/server/test_renewal.py", "tests/server/test_scripts.py")
"""But for these, each of which has one server."""
LONGEST = (
    "test_cpu_sanitizers.py::test_short_under_address",
    "tests/ascendc/test_linear.py",
    "test_cpu_sanitizers.py::test_short_under_thread",
    "tests/server/",
    "tests/ascendc/",
    "test_cpu_sanitizers.py",
    "test_cpu_planted_defects.py",
    "tests/evaluate/validate/",
    "tests/test_terminal.py",
    "tests/fuzz/",
    "tests/evaluate/",
    "tests/test_scripts.py",
    "tests/test_packaging.py",
    "tests/test_model.py",
    "tests/test_docker.py",
    "tests/test_npu_document.py",
    "tests/test_torch_versions.py",
)
"""The order in which several workers begin. The first of tests/ascendc compiles what the others wait for."""


def rank_of(nodeid: str) -> int:
    return next((rank for rank, part in enumerate(LONGEST) if part in nodeid), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[Any]:
    """In a new checkout, the first of several workers collects alone: the others read the bytecode that it has written.

    Compiling what tests import takes longer than importing it.
    """
    collected = CACHE / "collected"
    if not hasattr(session.config, "workerinput") or collected.exists():
        return (yield)
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "collected.lock") as lock:
        if collected.exists():
            lock.release()
        found = yield
        collected.touch()
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadfile` means here: file by file, as fixtures are shared, and test by test where none are."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrTest(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            alone = any(part in nodeid for part in APART) and not nodeid.startswith(TOGETHER)
            return nodeid if alone else super()._split_scope(nodeid)

    return ByFileOrTest(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long forms only with `--long`. Several workers begin with what takes longest, so that they end together;

    one worker has servers last: they take minutes, and what breaks them is mostly found sooner.
    """
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: rank_of(item.nodeid))
    else:
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

    with FileLock(cache / "models.lock"):
        return prepare(cache / "models")


@pytest.fixture(scope="session")
def smollm2_experts(smollm2: Path, cache: Path) -> dict[str, Path]:
    """The demo's model as mixtures of experts that compute the same, in block FP8: "copied" and "sliced"."""
    from prepare_demo_model import prepare_experts

    with FileLock(cache / "models.lock"):
        return {form: prepare_experts(cache / "models", form) for form in ("copied", "sliced")}
