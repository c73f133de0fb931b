"""What an attack did to a reader: refused with our error, read, or one of the things that must never happen."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from qwen3_fp8_ascend.checkpoints.folder import PICKLE_SUFFIXES
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.fuzz.folders import OUTSIDE, HostileFolder
from tests.support.own_time import at_pace

SECONDS = 1.0
"""Most of an idle core's time for one input (`own_time`); a slower one is measured twice more."""

HANG_SECONDS = 20
"""After so long by the clock an input is given up: it waits for something, or never ends."""

FACTOR = 4
"""Most memory, in multiples of the input's bytes."""

PYTHON_ALLOWANCE = 2 << 20
"""Python objects that any input may cost besides: exceptions, messages, a console, buffers."""

RESIDENT_ALLOWANCE = 8 << 20
"""Pages that any input may cost besides: torch's first use of an operator, an allocator's arenas."""

HANGS = "hangs: given up three times"

ADDRESS_SPACE = 2 << 30
"""Hard bound on what an input may make the process map, so that a bomb fails here and not the machine."""

MAX_MESSAGE = 4000

FORBIDDEN_EVENTS = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)
PATH_EVENTS = ("open", "os.listdir", "os.scandir")


class Hang(BaseException):
    """The input was given up; no reader catches this."""


@dataclass(frozen=True)
class Verdict:
    """`violation` says what must not happen; `refusal` is the first line of our error, or None if it was read."""

    seconds: float
    python_peak: int
    resident_peak: int
    size: int
    refusal: str | None = None
    violation: str | None = None

    @property
    def factor(self) -> float:
        """Python's peak above the allowance, in multiples of the input; what the bound is about."""
        return max(0, self.python_peak - PYTHON_ALLOWANCE) / max(1, self.size)


@dataclass
class Watch:
    """What Python's audit events report while an input is read."""

    sandbox: str = ""
    folder: str = ""
    forbidden: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Files opened outside the checkpoint folder."""
    pickles: list[str] = field(default_factory=list)
    _folders: dict[str, str] = field(default_factory=dict)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN_EVENTS:
            self.forbidden.append(f"{event} {str(arguments)[:100]}")
        elif event in PATH_EVENTS and arguments and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self.sandbox):
                return
            if path.lower().endswith(PICKLE_SUFFIXES):
                self.pickles.append(path)
            real = self._real(path)
            if OUTSIDE in os.path.basename(real) or not real.startswith(self.sandbox):
                self.left.append(path)

    def _real(self, path: str) -> str:
        """As `os.path.realpath`, which looks at each folder above; all paths here are in the same few."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(self._folders[folder], name)


_watching: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        watch = _watching.pop()  # what the hook does itself is not watched
        try:
            watch.see(event, arguments)
        finally:
            _watching.append(watch)


sys.addaudithook(_audit)


@contextmanager
def _refuse_torch_load(watch: Watch) -> Iterator[None]:
    """`torch.load` unpickles in ways that raise no audit event."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    original = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        watch.forbidden.append("torch.load")
        raise AssertionError("torch.load was called")

    torch.load = load  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.load = original  # type: ignore[attr-defined]


def fast_folder() -> Path:
    """Memory if there is a file system in it: conversions sync every file."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def resident_peak(reset: bool = False) -> int:
    """The process's highest resident memory in bytes since the last reset; 0 where the kernel does not say."""
    try:
        if reset:
            os.write(_opened("clear_refs", os.O_WRONLY, os.getpid()), b"5")
        status = os.pread(_opened("status", os.O_RDONLY, os.getpid()), 4096, 0)
        at = status.index(b"VmHWM:")
        return int(status[at + 6 : at + 24].split()[0]) * 1024
    except (OSError, ValueError):
        return 0


def give_back_free_memory() -> None:
    """Else an input could fill what was freed before, hundreds of megabytes after many tests, without a new page."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


@functools.cache
def _opened(name: str, flags: int, pid: int) -> int:
    """A file of the kernel's about a process, opened once: for small inputs that would be a good part of the time."""
    return os.open(f"/proc/{pid}/{name}", flags)


def address_space() -> int:
    """Bytes that the process has mapped."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[0]) * resource.getpagesize()


class Sandbox:
    """A place for one checkpoint folder after the other, with secrets beside it, as in a download cache."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="hostile-", dir=fast_folder())).resolve()
        self.path = self._root / "sandbox"
        self._folder = self.path / "models" / "snapshots" / "model"
        self._folder.mkdir(parents=True)
        (self._folder.parent / f"{OUTSIDE}.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        (self._folder.parent / f"{OUTSIDE}.json").write_bytes(b'{"key":"secret"}')

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def fill(self, hostile: HostileFolder) -> Path:
        """Write it into the empty folder."""
        hostile.write(self._folder)
        return self._folder

    def clear(self) -> None:
        """Remove the checkpoint and what was made of it."""
        for place in (os.fsencode(self._folder), os.fsencode(self.path)):
            for entry in list(os.scandir(place)):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                elif entry.name != b"models":
                    shutil.rmtree(entry.path)


class Judge:
    """Lets a reader read one hostile folder after the other, each in a sandbox of its own.

    `reads_data`: the reader reads the tensors too, so that holes count as the bytes they stand for.
    """

    def __init__(self, reader: Callable[[Path], None], *, reads_data: bool = False) -> None:
        self.reader = reader
        self.reads_data = reads_data
        self._sandbox = Sandbox()
        self._limit = resource.getrlimit(resource.RLIMIT_AS)
        give_back_free_memory()
        self._bound = address_space() + ADDRESS_SPACE

    def close(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._limit)
        self._sandbox.__exit__()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def judge(self, hostile: HostileFolder) -> Verdict:
        """Read it and say what happened; one that takes too much is read up to three times, and the best counts.

        A busy machine makes anything slow, and now and then the interpreter enlarges a table of its own.
        """
        verdict = self._read(hostile)
        for _ in range(2):
            if verdict.violation not in ("slow", HANGS) and " memory for " not in (verdict.violation or ""):
                return verdict
            verdict = self._read(hostile)
        if verdict.violation == "slow":
            words = f"took {verdict.seconds:.2f} s, three times more than {SECONDS} s"
            return Verdict(verdict.seconds, 0, 0, verdict.size, verdict.refusal, words)
        return verdict

    def _read(self, hostile: HostileFolder) -> Verdict:
        size = hostile.size(data=self.reads_data)
        resource.setrlimit(resource.RLIMIT_AS, (self._bound + hostile.mapped, self._limit[1]))
        try:
            return self._watch(self._sandbox.fill(hostile), self._sandbox.path, size)
        finally:
            self._sandbox.clear()

    def _watch(self, folder: Path, sandbox: Path, size: int) -> Verdict:
        watch = Watch(f"{sandbox}/", str(folder))
        violation = refusal = None
        with _refuse_torch_load(watch), _alarm():
            resident = resident_peak(reset=True)
            tracemalloc.start(1)
            _watching.append(watch)
            started = time.process_time()
            try:
                self.reader(folder)
            except BlockFp8Error as error:
                refusal = error
            except Hang:
                violation = HANGS
            except Exception as error:
                violation = f"{type(error).__name__} instead of BlockFp8Error: {_where(error)}"
            seconds = time.process_time() - started
            _watching.pop()
            python_peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            resident = resident_peak() - resident
        seconds = at_pace(seconds, SECONDS)
        violation = (
            violation
            or _judge_events(watch, copied=self.reads_data and refusal is None)
            or _judge_message(refusal)
            or _judge_memory(python_peak, resident, size)
            or ("slow" if seconds > SECONDS else None)
        )
        words = None if refusal is None else str(refusal).split("\n")[0]
        return Verdict(seconds, python_peak, resident, size, words, violation)


def _where(error: BaseException) -> str:
    trace, at = error.__traceback__, ""
    while trace is not None:
        at = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{str(error)[:200]} ({at})"


def _judge_events(watch: Watch, *, copied: bool) -> str | None:
    """A link within the folder may be looked at wherever it leads, but what is outside may not be copied."""
    if watch.forbidden:
        return f"forbidden: {watch.forbidden[0]}"
    if watch.pickles:
        return f"a pickle was opened: {os.path.basename(watch.pickles[0])}"
    outside = [path for path in watch.left if copied or not path.startswith(watch.folder + "/")]
    if outside:
        return f"left the checkpoint folder: {outside[0].removeprefix(watch.sandbox)}"
    return None


def _judge_message(error: BlockFp8Error | None) -> str | None:
    if error is None:
        return None
    text = str(error)
    if len(text) > MAX_MESSAGE:
        return f"a message of {len(text)} characters"
    if not all(line.isprintable() for line in text.split("\n")):
        return f"a message that is not printable: {text[:200]!a}"
    if str(pickle.loads(pickle.dumps(error))) != text:
        return "the error does not survive the way between processes"
    return None


def _judge_memory(python_peak: int, resident: int, size: int) -> str | None:
    for kind, peak, allowance in (
        ("Python", python_peak, PYTHON_ALLOWANCE),
        ("resident", resident, RESIDENT_ALLOWANCE),
    ):
        if peak > FACTOR * size + allowance:
            return f"{peak / 1e6:.1f} MB of {kind} memory for {size / 1e6:.3f} MB of input"
    return None


@contextmanager
def _alarm() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
