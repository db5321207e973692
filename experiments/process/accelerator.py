"""The device that a process computes on: choosing it, its memory, compiled programs, profiles."""

import contextlib
import ctypes
import functools
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax

from cmsad_jax.types import ConfigError, Device

P = ParamSpec("P")
T = TypeVar("T")

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def select_accelerator(name: str) -> list[Device]:
    """Devices of the accelerator asked for; ``auto`` is the best that JAX finds.

    Raises:
        ConfigError: there is none, or JAX of this process works on another kind already.
    """
    platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
    if name in ("auto", "cpu"):
        keep_freed_memory()
    if name != "auto":
        jax.config.update("jax_platforms", platforms[name])
    try:
        devices = jax.devices()
    except Exception as error:  # JAX promises no type: without a plugin, an assertion of its own
        jax.config.update("jax_platforms", "")
        raise ConfigError(
            f"the accelerator must be there and supported by the installed JAX; got "
            f"--accelerator={name}, and JAX found none. "
            f'Use --accelerator=auto, or install ".[{name}]" on a machine that has one.'
        ) from error
    if name != "auto" and devices[0].platform not in (name, platforms[name]):
        jax.config.update("jax_platforms", "")
        raise ConfigError(
            f"a process computes on one kind of device; got --accelerator={name} where JAX has "
            f"already begun on {devices[0].platform}. Start a new process."
        )
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


def peak_memory_bytes(device: Device) -> int | None:
    """Most memory in use so far: of an accelerator, or of this process on a CPU.

    None where the system does not tell, as on Windows.
    """
    stats = device.memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    if sys.platform == "linux":  # whose getrusage counts what a parent had before it forked
        status = Path("/proc/self/status").read_text("utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource  # POSIX alone
    except ImportError:
        return None
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
