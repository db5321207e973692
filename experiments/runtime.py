"""Where a run happens: accelerator, versions, logging of progress, errors without tracebacks."""

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from cmsad_jax.types import ConfigError, Device
from data_pipelines.case import DataError

T = TypeVar("T")

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


def select_accelerator(name: str) -> list[Device]:
    """Devices of the accelerator asked for; ``auto`` is the best that JAX finds.

    Raises:
        ConfigError: if there is none.
    """
    platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
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


def peak_memory_mb() -> float:
    """Most main memory that this process has held so far, in MB (of 2**20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


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


def progress(items: Iterable[T], *, description: str, total: int | None = None) -> "tqdm[T]":
    """A progress bar on a terminal; nothing where output goes to a file."""
    return tqdm(
        items,
        desc=description,
        total=total,
        leave=False,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        smoothing=0.1,
    )


def run_main(main: Callable[[], None]) -> None:
    """Run a program: a user's mistake ends in one message and status 2, never in a traceback."""
    try:
        main()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; finished folds are kept, run again to continue", file=sys.stderr)
        raise SystemExit(130) from None
