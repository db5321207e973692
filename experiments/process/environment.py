"""What a run was made with: versions, commit, hardware, time."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout, or of the installed packages."""

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


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a run was made with; None, or empty, where it is not known.

    Attributes:
        started: date and time, ISO 8601 in UTC.
        python, system: versions.
        device: how many of what kind.
        cpu_cores: of the machine.
        git_commit: of the checkout; see ``git_commit``.
        versions: of each of ``PACKAGES``; None for one that is not installed.
    """

    started: str | None = None
    python: str | None = None
    system: str | None = None
    device: str | None = None
    cpu_cores: int | None = None
    git_commit: str | None = None
    versions: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def environment() -> Environment:
    """Versions, git commit, hardware and time, for the record in a run folder."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return Environment(
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        system=platform.platform(),
        device=f"{len(devices)} x {devices[0].device_kind}",
        cpu_cores=os.cpu_count(),
        git_commit=git_commit(),
        versions=versions,
    )


def versions_in_words() -> list[str]:
    """Lines for the head of a log: what the process runs on, and with which packages."""
    found = environment()
    commit = f", commit {found.git_commit}" if found.git_commit else ""
    packages = ", ".join(f"{name} {v}" for name, v in found.versions.items() if v is not None)
    return [
        f"{found.started}, {found.system}, {found.device}, {found.cpu_cores} cores{commit}",
        f"Python {found.python}, {packages}",
    ]


def git_commit() -> str | None:
    """Commit of the checkout that runs, with ``-dirty`` if files differ; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # installed within the checkout of another project
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
