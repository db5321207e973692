"""Files that are whole or not there, paths that begin with ``~``, faults that name the path."""

import contextlib
import errno
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

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    partial = path.with_name(f".{path.name.removesuffix(ending)}.{os.getpid()}{ending}")
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_path(
    path: Path, action: str = "write", *, faults: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Turn ``faults`` of storage inside into an ``OSError`` that names ``path``.

    A full disk says so without a name, and some libraries have errors of their own for it.
    """
    try:
        yield
    except DataError:
        raise
    except faults as error:
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        if (full := os.strerror(errno.ENOSPC)) in str(error):  # from within a library's message
            number, reason = errno.ENOSPC, full
        raise OSError(number, f"cannot {action}: {reason}", str(path)) from error
