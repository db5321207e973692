"""Files that are whole or not there, folders that one process holds, faults that name the path."""

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file

LOCK = ".lock"
"""File by which a process holds a folder; it stays, and means nothing when no one holds it."""

HOLDER = ".lock.holder"
"""Who holds the folder, for the message to others; Windows lets no one else read the lock."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system frees it when the process ends, however it does.

    Raises:
        ConfigError: another process holds it.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    holder = folder / HOLDER
    try:
        lock.acquire()
    except filelock.Timeout:
        by = holder.read_text("utf-8").strip() if holder.is_file() else "another process"
        raise ConfigError(
            f"one process works on a folder at a time; {folder} is in use by {by}. "
            "Wait for it to end, or name another folder with --output."
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # a file system that became read-only
            holder.unlink()
        lock.release()


TEMPORARY = re.compile(r"\..+\.\d+(\.tmp)?(\.[a-z.]+)?")
"""Names under which files are written before they are renamed."""


def remove_temporary_files(folder: Path, *, deep: bool = True) -> None:
    """Remove what killed processes left half-written in ``folder``, which must be locked.

    ``deep`` looks into the folders within it as well.
    """
    for path in folder.rglob(".*") if deep else folder.glob(".*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


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


def file_sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file appears whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
