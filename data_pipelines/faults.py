"""Faults of a user's data: the errors that are raised, and the problems that are gathered."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal


class DataError(ValueError):
    """A fault of the user's data; the message holds the rule, what came and the remedy.

    Attributes:
        file: the file at fault, where it is one file's fault.
        part: the modality at fault, or ``label`` or ``gland``.
    """

    file: Path | None = None
    part: str | None = None


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that must exist does not."""


class DataErrors(DataError):
    """Several faults at once, one a line of the message."""

    def __init__(self, errors: Sequence[DataError]):
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)

    def __reduce__(self):
        return type(self), (self.errors,)


def raise_all(errors: Sequence[DataError]) -> None:
    """Raise nothing, the one error, or all of them as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataErrors(errors)


_SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fault of one case, told as rule, what came, and remedy.

    Attributes:
        case_id: the case at fault.
        file: the file at fault, if it is one file's fault.
        text: ``rule; what came. Remedy.``
        level: a data set with an error cannot be built; a warning is worth a look.
    """

    case_id: str
    file: Path | None
    text: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.case_id}: {self.text}"

    def without_names(self, text: str) -> str:
        """A part of the text with the names of file and case taken out, for comparison."""
        if self.file is not None:
            text = text.replace(str(self.file), "<file>").replace(self.file.name, "<file>")
        # a name of one or two letters stands in words as well
        return text.replace(self.case_id, "<case>") if len(self.case_id) > 2 else text

    @property
    def rule(self) -> str:
        """What must hold."""
        return self.text.partition("; ")[0]

    @property
    def came(self) -> str:
        """What was found instead."""
        return _SENTENCE_END.split(self.text.partition("; ")[2], maxsplit=1)[0].rstrip(".")

    @property
    def remedy(self) -> str:
        """What to do."""
        return (*_SENTENCE_END.split(self.text.partition("; ")[2], maxsplit=1), "")[1]


MOST_ROWS = 2
"""Cases with one fault that have a row each; more of them share one."""

EXAMPLES = 3
"""Cases that such a row names."""


def format_table(problems: Sequence[Problem], *, width: int = 132) -> str:
    """The problems as a table: case, file, rule, what came, remedy; errors first.

    The same fault of more than ``MOST_ROWS`` cases is one row, with their number and examples; what
    came is then that of the first.
    """
    if not problems:
        return ""
    header = ("", "case", "file", "rule", "what came", "remedy")
    rows = []
    for alike in _alike(sorted(problems, key=lambda p: (p.level, p.case_id))):
        first = alike[0]
        texts = (first.rule, first.came, first.remedy)
        if first.file:
            texts = tuple(text.replace(str(first.file), "the file") for text in texts)
        cases, file = first.case_id, first.file.name if first.file else ""
        if len(alike) > 1:
            ids = [*dict.fromkeys(problem.case_id for problem in alike)]
            times = f"{len(alike)} in " if len(alike) > len(ids) else ""
            more = " ..." if len(ids) > EXAMPLES else ""
            cases = f"{times}{len(ids)} cases: {', '.join(ids[:EXAMPLES])}{more}"
            texts = (texts[0], f"in {first.case_id}: {texts[1]}", texts[2])
        rows.append((first.level, cases, file, *texts))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(2)]
    widths[1] = min(widths[1], 28 if any("cases: " in row[1] for row in rows) else widths[1])
    widths.append(min(max(len(row[2]) for row in (header, *rows)), 28))
    rest = max((width - sum(widths) - 5 * 2) // 3, 16)
    widths += [rest] * 3
    lines = [*_wrapped(header, widths), "  ".join("-" * n for n in widths)]
    for row in rows:
        lines += _wrapped(row, widths)
    return "\n".join(lines)


def _alike(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems of one rule and remedy together, where there are more than ``MOST_ROWS``."""
    groups: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        key = (problem.level, *map(problem.without_names, (problem.rule, problem.remedy)))
        groups.setdefault(key, []).append(problem)
    shared = {key for key, group in groups.items() if len(group) > MOST_ROWS}
    found = []
    for problem in problems:
        key = (problem.level, *map(problem.without_names, (problem.rule, problem.remedy)))
        if key not in shared:
            found.append([problem])
        elif problem is groups[key][0]:
            found.append(groups[key])
    return found


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    cells = [
        textwrap.wrap(text, n, break_on_hyphens=False) for text, n in zip(row, widths, strict=True)
    ]
    for i in range(max(map(len, cells))):
        columns = [cell[i] if i < len(cell) else "" for cell in cells]
        yield "  ".join(f"{c:{n}}" for c, n in zip(columns, widths, strict=True)).rstrip()
