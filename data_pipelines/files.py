"""Files that are written whole or not at all, and paths that begin with ``~``."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.faults import DataError


def expanded(path: Path, option: str) -> Path:
    """``path`` with ``~`` put in full.

    Raises:
        DataError: nobody's home is known, as in a container under a user's number alone.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise DataError(
            f"~ must stand for a home folder; got {path} and neither HOME nor an entry for this "
            f"user. Give {option} a full path."
        ) from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path`` to write to, renamed to it at the end and removed on a fault.

    It has the ending of ``path``, by which writers choose the format, and the number of the
    process, so that two of them do not meet. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    partial = path.with_name(f".{path.name.removesuffix(ending)}.{os.getpid()}{ending}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
