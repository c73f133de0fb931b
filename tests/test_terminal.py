"""The conventions of the command line: help, colour, silence, Ctrl-C, a reader that leaves, a disk that is full."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.serving import free_port
from qwen3_fp8_ascend.terminal import check_writable
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3, write_qwen3
from tests.support.checkpoint_folders import digests, write_sparse

COMMANDS = [
    ("doctor",),
    ("inspect",),
    ("quantize",),
    ("dequantize",),
    ("serve",),
    ("verify",),
    ("validate",),
    ("bench", "serving"),
    ("bench", "linear"),
    ("eval-precision", "run"),
    ("eval-precision", "compare"),
    ("eval-precision", "linears"),
    ("report",),
]
ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b["


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "qwen3_fp8_ascend", *map(str, arguments)]


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=600, **options)  # type: ignore[call-overload,no-any-return]


def on_a_terminal(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """Exit code and what appears on a terminal of 100 columns."""
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM", "CI")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=plain | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment,
    )
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:  # Linux: the other side was closed
        pass
    os.close(ours)
    return process.wait(60), seen.decode()


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_block_fp8_qwen3(tmp_path_factory.mktemp("models") / "fp8")


@pytest.mark.parametrize("words", [name for name in COMMANDS if name != ("bench", "linear")], ids=" ".join)
def test_help_has_an_example(words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert re.search(rf"Examples?: .*qwen3-fp8-ascend {' '.join(words)} ", text), done.stdout
    assert ESCAPE not in done.stdout


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = run("--help")
    assert all(words[0] in done.stdout for words in COMMANDS)
    assert "130 after Ctrl-C" in " ".join(done.stdout.split())
    assert run().stdout == done.stdout


def test_colour_is_for_terminals_that_want_it(fp8: Path) -> None:
    code, seen = on_a_terminal("inspect", fp8)
    assert code == 0 and ESCAPE in seen
    assert on_a_terminal("inspect", fp8, NO_COLOR="1")[1].count("\x1b[3") == 0
    assert ESCAPE not in run("inspect", fp8).stdout


def test_a_progress_bar_is_for_terminals(bf16: Path, tmp_path: Path) -> None:
    code, seen = on_a_terminal("quantize", bf16, tmp_path / "seen")
    assert code == 0 and "quantize model.safetensors" in seen
    done = run("quantize", bf16, tmp_path / "piped")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {tmp_path / 'piped'}\n")


def test_quiet_is_quiet(bf16: Path, fp8: Path, tmp_path: Path) -> None:
    code, seen = on_a_terminal("--quiet", "quantize", bf16, tmp_path / "out")
    assert (code, seen) == (0, "")
    assert run("-q", "inspect", fp8).stdout == ""
    assert json.loads(run("-q", "inspect", fp8, "--json").stdout)["block_fp8_layers"] > 0
    failed = run("-q", "inspect", tmp_path / "nowhere")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["nonsense"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["inspect", "."],
        ["quantize", ".", "out", "--bogus"],
        ["dequantize", "no-such-folder", "out"],
        ["verify", "127.0.0.1:8000"],
        ["bench", "nonsense"],
        ["eval-precision", "run", "no-such-folder", "out.run"],
        ["eval-precision", "compare", "absent.run", "absent.run"],
        ["eval-precision", "linears", "no-such-folder"],
        ["report", "no-such-folder"],
        ["report", "."],
    ],
    ids=" ".join,
)
def test_every_mistake_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "what to do: " in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_folder_is_named(fp8: Path, tmp_path: Path) -> None:
    """A download that stopped: the index names a shard that is not there, and one is cut."""
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((fp8 / "config.json").read_bytes())
    (half / "model.safetensors").write_bytes((fp8 / "model.safetensors").read_bytes()[:5000])
    done = run("dequantize", half, tmp_path / "out")
    assert done.returncode == 2 and "model.safetensors" in done.stderr and "what to do" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    (half / "model.safetensors").unlink()
    done = run("dequantize", half, tmp_path / "out")
    assert done.returncode == 2 and "no weights" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_reader_that_leaves_is_no_error(fp8: Path) -> None:
    line = f"{' '.join(command('inspect', fp8, '--json'))} | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout == "{" and done.stderr == ""


def interrupt(arguments: list[str | Path], ready: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Run until `ready`, then press Ctrl-C."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_ctrl_c_while_waiting_is_130() -> None:
    start = time.monotonic()
    done = interrupt(
        ["verify", f"http://127.0.0.1:{free_port()}", "--wait", "600"], lambda: time.monotonic() > start + 3
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def big_checkpoint(folder: Path, rows: int, shards: int) -> int:
    """A checkpoint whose weights are sparse zeros; bytes of a shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    for shard in range(shards):
        names = [f"model.layers.{shard}.mlp.{name}_proj.weight" for name in ("gate", "up")]
        file = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        size = write_sparse(file, dict.fromkeys(names, ("BF16", (rows, 4096))))
    return size


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_stopped_in_the_middle_and_started_again(tmp_path: Path, end: signal.Signals) -> None:
    source, unfinished = tmp_path / "source", tmp_path / "fp8.incomplete"
    big_checkpoint(source, 1500, shards=4)
    process = subprocess.Popen(command("quantize", source, tmp_path / "fp8"), stderr=subprocess.PIPE, text=True)
    while not list(unfinished.glob("checkpoint/*.safetensors")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(end)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130 if end == signal.SIGINT else -signal.SIGKILL, "")
    assert unfinished.exists() and not (tmp_path / "fp8").exists()
    kept = {path.name: path.stat().st_ino for path in unfinished.glob("checkpoint/*.safetensors")}
    assert run("quantize", source, tmp_path / "fp8").returncode == 0
    quantize_checkpoint(source, tmp_path / "at-once", progress=False)
    assert digests(tmp_path / "fp8") == digests(tmp_path / "at-once")
    assert not unfinished.exists()
    assert kept and all((tmp_path / "fp8" / name).stat().st_ino == inode for name, inode in kept.items())


MEASURED = """
import atexit, pathlib, re, sys
file = sys.argv.pop(1)
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: pathlib.Path(file).write_text(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]))
from qwen3_fp8_ascend.cli import main
main()
"""


def measured(scratch: Path, *arguments: str | Path) -> tuple[float, float]:
    """Seconds of processor and peak resident bytes of a whole command, its interpreter and imports included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-c", MEASURED, str(scratch / "peak"), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert done.returncode == 0, done.stderr
    return seconds, int((scratch / "peak").read_text()) * 1024


def test_inspect_of_nine_gigabytes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Qwen3-8B-FP8's shapes in two sparse shards of real headers; the command as it is typed."""
    total = 0
    for shard in range(2):
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for layer in range(18 * shard, 18 * shard + 18):
            for name, (n, k) in {
                **{f"self_attn.{x}_proj": (1024 if x in "kv" else 4096, 4096) for x in "qkvo"},
                **{"mlp.gate_proj": (12288, 4096), "mlp.up_proj": (12288, 4096), "mlp.down_proj": (4096, 12288)},
            }.items():
                weight = f"model.layers.{layer}.{name}.weight"
                tensors[weight] = ("F8_E4M3", (n, k))
                tensors[f"{weight}_scale_inv"] = ("F32", (n // 128, k // 128))
        tensors["lm_head.weight" if shard else "model.embed_tokens.weight"] = ("BF16", (151936, 4096))
        total += write_sparse(tmp_path / f"model-{shard + 1:05d}-of-00002.safetensors", tensors)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert total > 9e9
    seconds, peak = min(measured(tmp_path_factory.mktemp("peak"), "inspect", tmp_path) for _ in range(3))
    print(f"inspect of {total / 1e9:.1f} GB: {seconds:.2f} s of processor, {peak / 1e6:.0f} MB")
    assert seconds < 2
    assert peak < 300e6


def test_quantize_holds_an_output_file_and_one_tensor(tmp_path: Path) -> None:
    """Of a shard of two tensors, half of it each, beside what the same command takes for a shard of almost nothing.

    A further copy of a tensor would be half a shard more. What the allocator keeps and how much of the mapped input is
    resident varies; the process's own memory is judged in `tests/checkpoints/test_conversion.py`.
    """
    almost_nothing, shard = (big_checkpoint(tmp_path / f"{rows}", rows, shards=1) for rows in (16, 20000))
    _, base = measured(tmp_path, "quantize", tmp_path / "16", tmp_path / "16.fp8")
    seconds, peak = measured(tmp_path, "quantize", tmp_path / "20000", tmp_path / "20000.fp8")
    print(f"quantize of a shard of {shard / 1e6:.0f} MB: {seconds:.1f} s, peak {peak / 1e6:.0f} MB of {base / 1e6:.0f}")
    assert almost_nothing < 1e6 and peak - base < 1.4 * shard


def limited(size: int) -> Callable[[], None]:
    """Let a child process write no file beyond `size` bytes, as on a disk that is full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_without_space_is_told(bf16: Path, tmp_path: Path) -> None:
    done = run("quantize", bf16, tmp_path / "fp8", preexec_fn=limited(4096))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "what to do" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "fp8").exists()
    assert run("quantize", bf16, tmp_path / "fp8").returncode == 0  # once there is space again


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "http://127.0.0.1:9", "--output"],
        ["eval-precision", "run", "MODEL"],
        ["eval-precision", "linears", "MODEL", "--output"],
        ["eval-precision", "compare", "absent.run", "absent.run", "--html"],
        ["bench", "serving", "--checkpoint", "FP8=MODEL", "--output"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_result_that_could_not_be_written_is_told_before_the_work(
    words: list[str], fp8: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = [word.replace("MODEL", str(fp8)) for word in words]
    for where, said in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x", "is no folder")):
        done = run(*line, where)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "the result cannot be written" in done.stderr and said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_to_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    from tests.support.answering_server import answering

    target = tmp_path / "verify.json"
    target.write_text("what was there")
    with answering({"": "one"}) as url:
        done = run("verify", url, "--output", target, preexec_fn=limited(100))
    assert done.returncode == 2 and "the result cannot be written" in done.stderr and "free some space" in done.stderr
    assert done.stderr.count("\n") == 1
    if shutil.which("git") and (ROOT / ".git").exists():
        path = ["git", "rev-parse", "--path-format=absolute", "--git-path", "index.lock"]
        lock = subprocess.run(path, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        assert not Path(lock).exists(), "asking for the commit left a lock behind"
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"] and target.read_text() == "what was there"


def test_asking_whether_a_result_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in (tmp_path / "a" / "b" / "result.json", kept / "result.json", tmp_path / "result.json"):
        check_writable(path)
    assert list(tmp_path.rglob("*")) == [kept]
