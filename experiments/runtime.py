"""Where a run happens: accelerator, versions, logging of progress, errors without tracebacks."""

import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from cmsad_jax.types import ConfigError, Device
from data_pipelines import files
from data_pipelines.faults import DataError

T = TypeVar("T")
P = ParamSpec("P")

PACKAGES = (
    "cmsad-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "nibabel",
    "SimpleITK",
    "numpy",
    "scipy",
    "surface-distance",
    "picai_eval",
)

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def select_accelerator(name: str) -> list[Device]:
    """Devices of the accelerator asked for; ``auto`` is the best that JAX finds.

    Raises:
        ConfigError: if there is none.
    """
    platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
    if name in ("auto", "cpu"):
        keep_freed_memory()
    if name != "auto":
        jax.config.update("jax_platforms", platforms[name])
    try:
        devices = jax.devices()
    except RuntimeError as error:
        jax.config.update("jax_platforms", "")
        raise ConfigError(
            f"the accelerator must be there and supported by the installed JAX; got "
            f"--accelerator={name}, and JAX found none. "
            f'Use --accelerator=auto, or install ".[{name}]" on a machine that has one.'
        ) from error
    return list(devices)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for what is allocated next.

    XLA on CPUs allocates its buffers anew for every call. By default glibc gets large ones from
    the system and gives them back, and the system fills each page with zeros again: up to a third
    of a training step, and two thirds of an operation as light as distillation. One arena, because
    those of threads cannot hold large buffers. It acts on threads that start later: call it before
    JAX looks for devices. The process then keeps the most memory that it ever needed. Nothing is
    changed on other systems, nor where the environment sets up memory by itself (``MALLOC_*``,
    ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    theirs = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(theirs) for name in os.environ):
        return
    set_option = ctypes.CDLL(None).mallopt
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        set_option(option, value)


def keep_compiled(folder: Path) -> None:
    """Keep compiled programs in ``folder`` for runs to come, unless JAX has such a folder already.

    The folder holds programs of any configuration, device and version side by side.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def uncollected(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, in whose calls Python's garbage collector rests.

    For calls in which JAX traces and compiles: a program is hundreds of thousands of objects that
    all stay, and a quarter of the time to trace a train step went to looking through them.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return call


def peak_memory_bytes(device: Device) -> int:
    """Most memory in use so far: of an accelerator, or of this process on a CPU."""
    stats = device.memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    if sys.platform == "linux":  # whose getrusage counts what a parent had before it forked
        status = Path("/proc/self/status").read_text("utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Trace what runs within into ``folder``; None traces nothing."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(str(folder.expanduser())):
        yield


def environment() -> dict[str, Any]:
    """Versions, git commit, hardware and time, for the record in a run folder."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu_cores": os.cpu_count(),
        "git_commit": git_commit(),
        "versions": versions,
    }


def git_commit() -> str | None:
    """Commit of the checkout that runs, with ``-dirty`` if files differ; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def progress(
    items: Iterable[T], *, description: str, total: int | None = None, initial: int = 0
) -> "tqdm[T]":
    """A progress bar on a terminal; nothing where output goes to a file."""
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        leave=False,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        smoothing=0.1,
    )


def log(message: str) -> None:
    """A line of the run's account on stdout, at once; of several processes, the first says it."""
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        return
    print(f"{message}\n", end="", flush=True)  # in one piece, whichever thread says it


class RunError(RuntimeError):
    """A run that cannot go on until its cause is removed; the message holds cause and remedy."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end, and all that it had is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Whether a signal has asked to stop; ``number`` is that signal, or None."""

    number: int | None = None
    unanswered: ClassVar[int | None] = None
    """A signal whose ``Interrupted`` may have been raised where Python drops exceptions, such as a
    callback of the garbage collector."""

    def after_step(self) -> bool:
        """Whether to stop now, at the end of a step; of several processes, all say so at the same.

        They agree through JAX's preemption service, a few steps after the signal came to any of
        them. Each calls this once for each step that it makes, whatever the fold.
        """
        if not jax.distributed.is_initialized():
            return self.number is not None
        if self.number is not None:
            _preemption.notify()
        if not multihost_utils.reached_preemption_sync_point(next(_preemption.steps)):
            return False
        self.number = self.number or signal.SIGTERM
        return True


class _PreemptionService:
    """What JAX's service needs of a process: a notice of the signal, and the count of its steps.

    ``jax.distributed.initialize`` takes SIGTERM away from Python without telling it. The C function
    that it puts there notes that the signal came, and nothing else; here it is called instead of
    being left to the kernel, so that both know.
    """

    def __init__(self):
        self.steps = itertools.count(1)
        self._notice: Callable[[int], None] | None = None

    def take_over(self) -> None:
        """Keep the function that JAX put there, and give SIGTERM back to Python."""
        previous = signal.getsignal(signal.SIGTERM)
        exchange = ctypes.CDLL(None).signal
        exchange.argtypes, exchange.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        address = exchange(signal.SIGTERM, None)  # SIG_DFL
        signal.signal(signal.SIGTERM, previous)
        if address:
            self._notice = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

    def notify(self) -> None:
        """Tell the service, as the kernel would; again changes nothing."""
        if self._notice is not None:
            self._notice(signal.SIGTERM)


_preemption = _PreemptionService()


def share_signals() -> None:
    """Let the processes of a run stop at one step; once, after ``jax.distributed.initialize``.

    Without it SIGTERM does nothing in such a process, as JAX has taken it.
    """
    _preemption.take_over()


@contextlib.contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM only set ``number``, for the code to save and leave at its time.

    A second signal ends the process at once, also while XLA compiles, when Python runs no handler:
    a thread reads the signals from a socket. ``Interrupted`` is raised at the end if one came.
    Outside the main thread, which alone may handle signals, nothing is changed.
    """
    if Stop.unanswered is not None:
        raise Interrupted(Stop.unanswered)
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while received := receiver.recv(1):
            number = received[0]
            if number not in _SIGNALS:
                continue
            if stop.number is not None:
                os._exit(128 + number)
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # nobody reads stdout any more
                # Not log(), which starts JAX's backend in a process of several and waits for it.
                print(
                    f"{name}: finishing this step and saving; again to quit now\n",
                    end="",
                    flush=True,
                )
            stop.number = number

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()
        thread.join()
        receiver.close()
    if stop.number is not None:
        raise Interrupted(stop.number)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the kernel frees it when the process ends, however it does.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"one process works on a run folder at a time; {folder} is in use by "
                f"{file.read().strip()}. Wait for it to end, or name another folder with --output."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


LOCK = ".lock"
"""File by which a process holds a run folder; it stays, and means nothing when no one holds it."""

TEMPORARY = re.compile(r"\..+\.\d+(\.tmp)?(\.[a-z.]+)?")
"""Names under which files are written before they are renamed."""


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left half-written under ``folder``, which must be locked."""
    for path in folder.rglob(".*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it becomes ``path`` if nothing is raised."""
    with naming_path(path), files.whole_file(path) as partial:
        yield partial


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"a file of a run must be as it was written; {path}: {error}. "
            "Restore it from a copy, or remove the folder that holds it to do that part again."
        ) from error


@contextlib.contextmanager
def naming_path(
    path: Path, action: str = "write", *, faults: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Turn ``faults`` of storage inside into an ``OSError`` that names ``path``.

    A full disk says so without a name, and some libraries have errors of their own for it.
    """
    try:
        yield
    except (ConfigError, DataError):
        raise
    except faults as error:
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        if (full := os.strerror(errno.ENOSPC)) in str(error):  # from within a library's message
            number, reason = errno.ENOSPC, full
        raise OSError(number, f"cannot {action}: {reason}", str(path)) from error


def run_main(main: Callable[[], Any]) -> None:
    """Run a program and end with its status; what a user can mend ends in one message.

    0 done; 1 a fault of the program, with a traceback; 2 the request or the data cannot work; 3
    stopped by something outside it (full disk, memory, values that are not finite): mend that and
    run the same command again; 130 and 143 stopped by SIGINT and SIGTERM: run it again to continue.
    """

    def interrupt(number: int, _: Any) -> None:
        Stop.unanswered = number
        raise Interrupted(number)

    for number in _SIGNALS:
        signal.signal(number, interrupt)
    try:
        main()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}. What was finished before is intact. "
            "Mend the storage and run the same command again to continue.",
            file=sys.stderr,
        )
        raise SystemExit(3) from None
    except KeyboardInterrupt as error:
        Stop.unanswered = None
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        print("interrupted; what is done is kept, run again to continue", file=sys.stderr)
        raise SystemExit(128 + number) from None
