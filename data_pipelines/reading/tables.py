"""Tables that people keep in spreadsheets, read so that a blank or an encoding changes nothing."""

import csv
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.faults import DataError

_DELIMITERS = ",;\t"


def read_table(path: Path, columns: Sequence[str], *, remedy: str) -> list[dict[str, str]]:
    """The rows of a table, with blanks around header and cells removed; empty rows are left out.

    Args:
        path: UTF-8 text, with or without a byte order mark; whichever of comma, semicolon and tab
            is most frequent in the header parts the cells.
        columns: that there must be.
        remedy: what to do about a table without them.

    Raises:
        DataError: no text in UTF-8, columns missing or named twice, or more cells in a row than in
            the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = max(_DELIMITERS, key=file.readline().count)
            file.seek(0)
            lines = [
                [cell.strip() for cell in line]
                for line in csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            ]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must be text in UTF-8; got the byte {error.object[error.start]:#04x}, as of "
            "another encoding. Save it as 'CSV UTF-8'."
        ) from None
    except csv.Error as error:
        raise DataError(f"{path} must be a table in CSV; got: {error}. Save it as CSV.") from None
    except OSError as error:
        raise DataError(
            f"{path} must be a readable file; got: {error.strerror}. Copy or fetch it again."
        ) from None
    lines = [line for line in lines if any(line)]
    header = lines[0] if lines else []
    named = [name for name in header if name]
    if len(lines) < 2 or not {*columns} <= {*named}:
        came = ", ".join(named) if len(lines) != 1 else "no row below the header"
        raise DataError(
            f"{path} must have the columns {' and '.join(columns)}; got {came or 'no rows'}. "
            f"{remedy}"
        )
    if len(named) > len({*named}):
        twice = next(name for name in named if named.count(name) > 1)
        raise DataError(f"{path} must name each column once; got {twice} again. Rename one.")
    for line in lines[1:]:
        if any(line[len(header) :]):
            raise DataError(
                f"{path} must have no more cells in a row than in its header; got {len(line)} and "
                f"{len(header)} in the row of {line[0] or 'an empty cell'}. Put cells that hold "
                f"{delimiter!r} into quotes, or complete the header."
            )
    return [
        {name: line[i] if i < len(line) else "" for i, name in enumerate(header) if name}
        for line in lines[1:]
    ]
