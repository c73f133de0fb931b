"""``qwen3-fp8-ascend serve``: fetch a checkpoint, look at its headers, and become `vllm serve` on this machine."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.terminal import err

CANN_SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
HUBS = {"modelscope": "modelscope", "huggingface": "huggingface_hub"}
"""What `--source` takes, and the module that downloads from there."""

NPU_DEFAULTS = {
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "TASK_QUEUE_ENABLE": "1",
    "HCCL_OP_EXPANSION_MODE": "AIV",
}
"""What vLLM-Ascend's guides set; variables that are set already stay."""

Environment = dict[str, str]
Check = Callable[[typer.CallbackParam, str], str]


def _refuse(parameter: typer.CallbackParam, value: str, fix: str) -> BlockFp8Error:
    return BlockFp8Error(f"{parameter.opts[0]} is {value or 'empty'}", fix=fix)


def _one_of(*choices: str) -> Check:
    def check(parameter: typer.CallbackParam, value: str) -> str:
        if value not in choices:
            raise _refuse(parameter, value, f"choose one of: {' '.join(choices)}")
        return value

    return check


def _activation(parameter: typer.CallbackParam, value: str) -> str:
    return Activation.parse(value, parameter.opts[0]).value


def _whole_number(parameter: typer.CallbackParam, value: str) -> str:
    if not re.fullmatch("[1-9][0-9]{0,8}", value):
        raise _refuse(parameter, value, "give a whole number from 1")
    return value


def _fraction(parameter: typer.CallbackParam, value: str) -> str:
    if not re.fullmatch(r"0?\.[0-9]*[1-9][0-9]*|1(\.0*)?", value):
        raise _refuse(parameter, value, "give a fraction above 0 and up to 1")
    return value


def _option(variable: str, help: str = "", check: Check | None = None) -> typer.models.OptionInfo:
    """A flag that is also a variable; the flag wins, and an empty variable is none."""
    option: typer.models.OptionInfo = typer.Option(envvar=variable, help=help, callback=check)
    return option


Model = Annotated[str, _option("SERVE_MODEL", "A hub's name; or a folder, which is served as it is.")]
Source = Annotated[str, _option("SERVE_SOURCE", "modelscope or huggingface.", _one_of(*HUBS))]
DownloadDir = Annotated[str, _option("SERVE_DOWNLOAD_DIR", "Where downloads go; the hub's own cache if empty.")]
Device = Annotated[str, _option("SERVE_DEVICE", "auto, npu, cuda or cpu.", _one_of("auto", "npu", "cuda", "cpu"))]
Devices = Annotated[
    str, _option("ASCEND_RT_VISIBLE_DEVICES", "NPUs or GPUs to use, as in 0,1; the first ones if empty.")
]
Ranks = Annotated[str, _option("SERVE_TENSOR_PARALLEL_SIZE", "Ranks.", _whole_number)]
ServedModelName = Annotated[str, _option("SERVE_SERVED_MODEL_NAME", "What clients call the model.")]
Host = Annotated[str, _option("SERVE_HOST", "0.0.0.0 lets other machines in.")]
Port = Annotated[str, _option("SERVE_PORT", check=_whole_number)]
Quantization = Annotated[
    str, _option("SERVE_QUANTIZATION", "ascend; none for a bf16 checkpoint to compare with.", _one_of("ascend", "none"))
]
MaxModelLen = Annotated[str, _option("SERVE_MAX_MODEL_LEN", "Tokens of a prompt and its answer.", _whole_number)]
Dtype = Annotated[str, _option("SERVE_DTYPE")]
GpuMemoryUtilization = Annotated[str, _option("SERVE_GPU_MEMORY_UTILIZATION", "NPU and GPU only.", _fraction)]
KvCacheGib = Annotated[str, _option("VLLM_CPU_KVCACHE_SPACE", "CPU only.", _whole_number)]
Cores = Annotated[
    str, _option("VLLM_CPU_OMP_THREADS_BIND", "CPU only: those of each rank, apart by `|`; all of them if empty.")
]
TrustRemoteCode = Annotated[str, _option("SERVE_TRUST_REMOTE_CODE", "0 or 1.", _one_of("0", "1"))]
Backend = Annotated[str, _option("QWEN3_FP8_ASCEND_BACKEND", "The best that can run if empty.")]
ActivationFlag = Annotated[
    str, _option("SERVE_ACTIVATION", "w8a8, or w8a16 to leave activations as they are.", _activation)
]
Python = Annotated[
    str, typer.Option(envvar="PYTHON", help="Whose vLLM serves; this one by default.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands instead; needs neither NPU, GPU nor vLLM.")]
Further = Annotated[list[str] | None, typer.Argument(help="After --: further arguments of `vllm serve`.")]


def serve(
    model: Model = "Qwen/Qwen3-8B-FP8",
    source: Source = "modelscope",
    download_dir: DownloadDir = "",
    device: Device = "auto",
    devices: Devices = "",
    tensor_parallel_size: Ranks = "1",
    served_model_name: ServedModelName = "qwen3-8b-fp8",
    host: Host = "127.0.0.1",
    port: Port = "8000",
    quantization: Quantization = "ascend",
    max_model_len: MaxModelLen = "4096",
    dtype: Dtype = "auto",
    gpu_memory_utilization: GpuMemoryUtilization = "0.9",
    kv_cache_gib: KvCacheGib = "4",
    cores: Cores = "",
    trust_remote_code: TrustRemoteCode = "1",
    backend: Backend = "",
    activation: ActivationFlag = "w8a8",
    python: Python = sys.executable,
    dry_run: DryRun = False,
    further: Further = None,
) -> None:
    """Fetch a checkpoint, look at its headers, set what the NPU, GPU or CPU needs, and become `vllm serve`.

    On an NPU CANN's set_env.sh is sourced if ASCEND_HOME_PATH is unset (CANN_SET_ENV names another one).
    """
    ranks = int(tensor_parallel_size)
    download = [] if Path(model).is_dir() else _download_command(python, model, source, download_dir)
    cann = _cann_script(device, dry_run)
    environment = dict(os.environ) | (_sourced(cann) if cann and cann.is_file() else {})
    kind = _kind_of(device, python, environment, dry_run)
    if kind == "npu":
        changes = _for_npu(devices, ranks, environment)
    else:
        changes = _for_gpu(devices, ranks) if kind == "cuda" else _for_cpu(kv_cache_gib, cores, ranks)
    if backend:
        changes["QWEN3_FP8_ASCEND_BACKEND"] = backend
    arguments = ["--served-model-name", served_model_name, "--host", host, "--port", port]
    arguments += ["--trust-remote-code"] if trust_remote_code == "1" else []
    arguments += ["--quantization", quantization] if quantization != "none" else []
    arguments += ["--max-model-len", max_model_len]
    arguments += ["--gpu-memory-utilization", gpu_memory_utilization] if kind != "cpu" else []
    arguments += ["--dtype", dtype]
    arguments += ["--tensor-parallel-size", tensor_parallel_size] if ranks > 1 else []
    arguments += ["--hf-overrides", '{"qwen3_fp8_ascend": {"activation": "w8a16"}}'] if activation == "w8a16" else []
    arguments += further or []
    line = ["env", *(f"{name}={value}" for name, value in changes.items()), _vllm_of(python), "serve"]
    if dry_run:
        _print_commands(cann, download, line, model, arguments)
        return
    folder = _fetched(download, python, model, source) if download else model
    if quantization != "none":
        _look_at(folder, python, environment)
    _become(python, line, folder, arguments, environment | changes)


def _vllm_of(python: str) -> str:
    """The `vllm` beside a Python, else the one on the path."""
    vllm = Path(shutil.which(python) or python).with_name("vllm")
    return str(vllm) if os.access(vllm, os.X_OK) else "vllm"


def _download_command(python: str, model: str, source: str, folder: str) -> list[str]:
    """The command whose last line is the folder that a hub's client has put a model into."""
    if not re.match(r"[^/.].*/.", model):
        fix = "give a folder that exists, or a hub's name such as Qwen/Qwen3-8B-FP8"
        raise BlockFp8Error(f"there is no folder {model}", fix=fix)
    where = ", cache_dir=sys.argv[2]" if folder else ""
    code = f"import sys; from {HUBS[source]} import snapshot_download as fetch; print(fetch(sys.argv[1]{where}))"
    return [python, "-c", code, model, *([folder] if folder else [])]


def _cann_script(device: str, dry_run: bool) -> Path | None:
    """CANN's script, if it has to be sourced: its variables are not set, and an NPU may serve."""
    script = Path(os.environ.get("CANN_SET_ENV") or CANN_SET_ENV)
    if os.environ.get("ASCEND_HOME_PATH") or device in ("cuda", "cpu") or (device == "auto" and not script.is_file()):
        return None
    if not (script.is_file() or dry_run):
        fix = "install CANN, or set CANN_SET_ENV, or source it yourself"
        raise BlockFp8Error(f"CANN's {script} is not there", fix=fix)
    return script


def _sourced(script: Path) -> Environment:
    """The environment after a shell script: what it finds must be there before a process starts."""
    shell = ["bash", "-c", '. "$1" >&2 && env -0', "bash", str(script)]
    done = subprocess.run(shell, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        fix = "source it in a shell to see why; CANN_SET_ENV names another one"
        raise BlockFp8Error(f"CANN's {script} fails", got=f"exit code {done.returncode}", fix=fix)
    pairs = (entry.partition("=") for entry in os.fsdecode(done.stdout).split("\0") if entry)
    return {name: value for name, _, value in pairs}


REASONS = """
import json
from qwen3_fp8_ascend.backends import gpu, soc
from qwen3_fp8_ascend.vllm_plugin import versions

of_vllm = "this vLLM is its build for CPUs" if versions.is_cpu_build() else None
print(json.dumps([soc.missing_npu(), gpu.missing_gpu() or of_vllm]))
"""
"""What a Python is asked: why it cannot serve on an NPU, and why not on a GPU; null where it can."""


def _kind_of(device: str, python: str, environment: Mapping[str, str], dry_run: bool) -> str:
    """What serves: "npu", "cuda" or "cpu", in this order where nobody says.

    Raises:
        BlockFp8Error: what was asked for cannot be used, or an NPU that is there; that a GPU is not used may be meant,
            by a torch or a vLLM for CPUs.
    """
    if device == "cpu" or (device != "auto" and dry_run):
        return device
    done = subprocess.run([python, "-c", REASONS], stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        fix = "pip install this project there, or give --python"
        raise BlockFp8Error(f"{python} cannot load qwen3_fp8_ascend", fix=fix)
    no_npu, no_gpu = json.loads(done.stdout.splitlines()[-1])
    instead = "see `qwen3-fp8-ascend doctor`, or serve on the CPU with --device cpu"
    if no_npu and (device == "npu" or (device == "auto" and glob.glob("/dev/davinci[0-9]*"))):
        raise BlockFp8Error(f"the NPU cannot be used: {no_npu}", fix=instead)
    if no_gpu and device == "cuda":
        raise BlockFp8Error(f"the GPU cannot be used: {no_gpu}", fix=instead)
    if device != "auto":
        return device
    return "cpu" if no_npu and no_gpu else "cuda" if no_npu else "npu"


def _for_npu(devices: str, ranks: int, environment: Mapping[str, str]) -> Environment:
    chosen = devices or ",".join(map(str, range(ranks)))
    _check_count(chosen, ranks, "NPUs")
    defaults = {name: environment.get(name) or value for name, value in NPU_DEFAULTS.items()}
    return {"ASCEND_RT_VISIBLE_DEVICES": chosen} | defaults


def _for_gpu(devices: str, ranks: int) -> Environment:
    """vLLM takes the first ones by itself."""
    if not devices:
        return {}
    _check_count(devices, ranks, "GPUs")
    return {"CUDA_VISIBLE_DEVICES": devices}


def _check_count(devices: str, ranks: int, what: str) -> None:
    if len(devices.split(",")) < ranks:
        needs = f"--tensor-parallel-size {ranks} needs as many {what}, --devices is {devices}"
        raise BlockFp8Error(needs, fix=f"name more {what}")


def _for_cpu(kv_cache_gib: str, cores: str, ranks: int) -> Environment:
    own = sorted(os.sched_getaffinity(0))
    share = len(own) // ranks
    if not cores and not share:
        what = f"--tensor-parallel-size {ranks} needs a core a rank, this process has {len(own)}"
        raise BlockFp8Error(what, fix="use fewer ranks")
    shares = (own[rank * share : (rank + 1) * share] for rank in range(ranks))
    cores = cores or "|".join(",".join(map(str, each)) for each in shares)
    return {"VLLM_CPU_KVCACHE_SPACE": kv_cache_gib, "VLLM_CPU_OMP_THREADS_BIND": cores}


def _print_commands(cann: Path | None, download: list[str], line: list[str], model: str, arguments: list[str]) -> None:
    """The commands as a shell takes them."""
    if cann:
        print(shlex.join(["source", str(cann)]))
    if download:
        print(f"model=$({shlex.join(download)} | tail -n 1)")
        print(f'{shlex.join(line)} "$model" {shlex.join(arguments)}')
    else:
        print(shlex.join([*line, model, *arguments]))


def _fetched(download: list[str], python: str, model: str, source: str) -> str:
    """The folder of a downloaded model."""
    module = HUBS[source]
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        fix = f"{python} -m pip install {module}, or give --source, or a folder as --model"
        raise BlockFp8Error(f"{python} has no {module}", fix=fix)
    err.print(f"downloading {model} from {source}", markup=False, highlight=False, soft_wrap=True)
    done = subprocess.run(download, stdout=subprocess.PIPE, text=True, check=False)
    folder = done.stdout.splitlines()[-1] if done.stdout else ""  # clients may print on stdout before it
    if done.returncode or not Path(folder).is_dir():
        fix = "check the name and the network, or give a folder as --model"
        raise BlockFp8Error(f"{model} could not be downloaded from {source}", fix=fix)
    return folder


def _look_at(folder: str, python: str, environment: Mapping[str, str]) -> None:
    """Nothing is loaded before the headers agree; the reasons go to stderr."""
    inspect = [python, "-m", "qwen3_fp8_ascend", "inspect", folder]
    if subprocess.run(inspect, stdout=sys.stderr, env=environment, check=False).returncode:
        fix = "see the anomalies above; a half-written folder has to be made or fetched again"
        raise BlockFp8Error(f"{folder} cannot be served", fix=fix)


def _become(python: str, line: list[str], folder: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Replace this process by vLLM, so that whoever stops it stops the server."""
    command = [*line[line.index("serve") - 1 :], folder, *arguments]
    vllm = shutil.which(command[0], path=environment.get("PATH"))
    if vllm is None:
        raise BlockFp8Error(f"there is no vllm beside {python}", fix="`make venv`, or give --python")
    print(shlex.join([*line, folder, *arguments]), file=sys.stderr, flush=True)
    os.execve(vllm, command, dict(environment))
