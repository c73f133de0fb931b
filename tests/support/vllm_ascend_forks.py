"""Python programs beside vLLM-Ascend in forks of a process that has imported the packages of others, torch among them.

Of vLLM, vLLM-Ascend and torch-npu nothing is imported there: their unit tests replace the last before the others load.

`python -m tests.support.vllm_ascend_forks MODULE ...` is what a fork does: it becomes a Python of its own folder and
PYTHONPATH, to which the modules that started it are unknown.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

from tests.support import preloaded

PACKAGES = (
    "torch._inductor.lowering",
    "torch.distributed.tensor",
    "torch.onnx",
    "transformers.models.auto.image_processing_auto",
    "scipy.signal",
    "scipy.stats",
    "fastapi",
    "openai",
    "aiohttp",
    "cv2",
)
"""Those that take longest, whatever asks for them."""

FOLDER = "FOLDER_OF_FORK"


def run(
    module: str, *arguments: str, folder: Path, environment: Mapping[str, str], timeout: float = 600
) -> CompletedProcess[str]:
    """As `python -m` in a folder; what it writes is in `stdout`, errors as well.

    Raises:
        subprocess.TimeoutExpired: it was not done in time, and has been killed with all that it started.
    """
    command = [module, *arguments]
    template = preloaded.shared(PACKAGES)
    with tempfile.TemporaryDirectory() as made:
        log, variables = Path(made, "log"), {**environment, FOLDER: str(folder)}
        status = template.run(__name__, *command, environment=variables, log=log, timeout=timeout)
        return CompletedProcess(command, status, log.read_text(), "")


def main() -> None:
    folder = os.environ.pop(FOLDER)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = sys.path[sys.path.index(str(Path(os.__file__).parent)) :]
    sys.path[:] = [folder, *given, *installed]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
