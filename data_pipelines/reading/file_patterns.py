"""Other people's file names: which file is which, by patterns such as ``t2w='*T2*'``.

A pattern is one of the shell (``*``, ``?``), without regard to upper and lower case. Without ``/``
it is compared with the names of files, and a case is the folder that a file lies in; ``{case}`` in
it, and ``{patient}``, stand for the part of the path that names them::

    t2w='*T2*'  adc='*ADC*'  lesion='*ROI*'                one folder for each case
    t2w='{case}_T2*'  lesion='{case}_roi*'                 all cases in one folder
    t2w='{patient}/{case}/T2/*'  lesion='{patient}/{case}/seg*'
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.faults import DataError, Problem
from data_pipelines.modalities import ALIASES, modality_of
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.reading.volume_io import name_without_ending

FILES = ("cmsad.yaml", "cmsad.yml", "cmsad.json")
"""Files beside the data that hold the same as ``--data.files``: names and patterns."""

GLAND = "gland"
EXAMPLE = "t2w='*T2*' adc='*ADC*' lesion='*ROI*'"
OPTION = "--data.files"

_PLACES = {
    "*": "[^/]*",
    "?": "[^/]",
    "{case}": "(?P<case>[^/]+?)",
    "{patient}": "(?P<patient>[^/]+?)",
}
_GUESSES = (
    ("label", r"lesion|tumou?r|roi|seg|mask|label|annot"),
    ("adc", r"adc"),
    ("hbv", r"hbv|dwi|trace|high|b-?\d{3,4}"),
    ("t2w", r"t2"),
)


def read(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Pattern of each name: those of ``--data.files``, else of a file beside the data, else none.

    Raises:
        DataError: something else than names and patterns.
    """
    if files:
        pairs = [entry.partition("=") for entry in files]
        wrong = [name for name, equals, pattern in pairs if not (name and equals and pattern)]
        if wrong:
            raise DataError(
                f"files are given as name=pattern; got {wrong[0]!r}. Write {OPTION} {EXAMPLE}."
            )
        return {name.strip(): pattern.strip() for name, _, pattern in pairs}
    path = next((root / name for name in FILES if (root / name).is_file()), None)
    if path is None:
        return {}
    import yaml  # reads JSON as well

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} must be YAML or JSON in UTF-8; got: {str(error).splitlines()[0]}. Write lines "
            "such as t2w: '*T2*'."
        ) from error
    texts = (
        isinstance(content, dict)
        and content
        and all(isinstance(text, str) for pair in content.items() for text in pair)
    )
    if not texts:
        raise DataError(
            f"{path} must hold names and patterns; got {content!r:.80}. Write lines such as "
            "t2w: '*T2*'."
        )
    return {str(name): str(pattern) for name, pattern in content.items()}


class Pattern(NamedTuple):
    """A pattern, by the name of what it finds: a modality, ``label`` or ``gland``."""

    name: str
    text: str
    expression: re.Pattern[str]

    def match(self, relative: Path) -> tuple[str, str] | None:
        """Case and patient of a file that is found; None for another file."""
        found = self.expression.fullmatch(
            relative.as_posix() if "/" in self.text else relative.name
        )
        if found is None:
            return None
        parts = found.groupdict()
        case = parts.get("case") or "_".join(relative.parent.parts)
        patient = parts.get("patient")
        return (f"{patient}_{case}", patient) if patient else (case, case)


def compiled(patterns: Mapping[str, str], wanted: Sequence[str], target: str) -> list[Pattern]:
    """The patterns that are used, labels first; names may be aliases.

    Args:
        patterns: by name, as ``read`` gives them.
        wanted: modalities.
        target: of the data set, whose name, or ``label``, names the label.

    Raises:
        DataError: a name that means nothing, no pattern for any modality, or none of a form that
            can be read.
    """
    found: dict[str, Pattern] = {}
    accepted = (*wanted, target, "label", GLAND)
    for name, text in patterns.items():
        modality = modality_of(name, wanted)
        if name in (target, "label"):
            modality = "label"
        elif name == GLAND:
            modality = GLAND
        if modality is None:
            if modality_of(name, tuple(ALIASES)) or name in ("lesion", "zones"):
                continue  # of the field, and not asked for
            raise DataError(
                f"names of files must be among {', '.join(dict.fromkeys(accepted))}; got {name!r}. "
                f"Write {OPTION} {EXAMPLE}; other modalities need --data.modalities too."
            )
        if modality in found:
            raise DataError(
                f"a name has one pattern; got {found[modality].text!r} and {text!r} for "
                f"{modality}. Leave one of them out."
            )
        if "/" in text and "{case}" not in text:
            raise DataError(
                "a pattern with / must say where the name of the case stands; got "
                f"{text!r}. Write it as {name}='{{case}}/{Path(text).name}'."
            )
        found[modality] = Pattern(modality, text, _expression(text))
    if not found.keys() & {*wanted}:
        raise DataError(
            f"there must be a pattern for a modality ({', '.join(wanted)}); got "
            f"{', '.join(patterns)}. Write {OPTION} {EXAMPLE}."
        )
    return sorted(found.values(), key=lambda pattern: pattern.name not in ("label", GLAND))


def _expression(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\*|\?|\{case\}|\{patient\})", text)
    return re.compile("".join(_PLACES.get(p, re.escape(p)) for p in parts), re.IGNORECASE)


def volumes(root: Path) -> Iterator[Path]:
    """Volumes below a folder: files of a known ending, and folders of a DICOM series."""
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in files if not name.startswith("."))
        named = [name for name in visible if name_without_ending(name)]
        yield from (Path(place, name) for name in named)
        odd = [name for name in visible if name not in named and Path(name).suffix in ("", ".dcm")]
        if odd and not named and Path(place) != root:
            yield Path(place)


def find(
    root: Path, patterns: Sequence[Pattern], wanted: Sequence[str], *, with_gland: bool
) -> list[CaseFiles]:
    """The cases whose files the patterns find.

    Raises:
        DataError: none, a file that two patterns find, or files of one folder without ``{case}``.
    """
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    patients: dict[str, str] = {}
    for path in volumes(root):
        relative = path.relative_to(root)
        matches = [(p, ids) for p in patterns if (ids := p.match(relative)) is not None]
        labels = [match for match in matches if match[0].name in ("label", GLAND)]
        matches = labels or matches
        if len(matches) > 1:
            named = " and ".join(f"{p.name}={p.text!r}" for p, _ in matches)
            raise DataError(
                f"a file must be found by one pattern; got {relative}, which {named} find. Write "
                "a narrower pattern for one of them."
            )
        for pattern, (case_id, patient) in matches:
            if not case_id:
                raise DataError(
                    f"files that lie in one folder need {{case}} in their pattern; got "
                    f"{pattern.text!r} and {path}. Write it as "
                    f"{pattern.name}='{{case}}_{pattern.text.strip('*')}*'."
                )
            found[case_id][pattern.name].append(path)
            patients[case_id] = patient
    cases = {c: files for c, files in found.items() if files.keys() & {*wanted}}
    if not cases:
        told = " ".join(f"{p.name}={p.text!r}" for p in patterns)
        raise DataError(
            f"the patterns must find an image; got none for {told} in {root}, which holds "
            f"{holds(root)}. {suggestion(example(root), wanted, flat=is_flat(root))}."
        )
    texts = {pattern.name: pattern.text for pattern in patterns}
    return [
        _case_files(case_id, patients[case_id], cases[case_id], wanted, texts, with_gland)
        for case_id in sorted(cases)
    ]


def _case_files(
    case_id: str,
    patient_id: str,
    files: Mapping[str, list[Path]],
    wanted: Sequence[str],
    texts: Mapping[str, str],
    with_gland: bool,
) -> CaseFiles:
    folder = next(iter(files.values()))[0].parent
    first = {name: paths[0] for name, paths in files.items()}
    return CaseFiles(
        case_id=case_id,
        patient_id=patient_id,
        images={name: first[name] for name in wanted if name in first},
        label=first.get("label"),
        gland=first.get(GLAND) if with_gland else None,
        looked_for={
            name: f"'{texts[name]}' in {folder}" if name in texts else f"a pattern in {OPTION}"
            for name in (*wanted, "label", GLAND)
        },
        problems=tuple(
            Problem(
                case_id,
                None,
                f"a case must have one file for '{name}'; got {', '.join(p.name for p in paths)} "
                f"by '{texts[name]}'. Write a narrower pattern, or take out all but one.",
            )
            for name, paths in files.items()
            if len(paths) > 1
        ),
    )


def holds(root: Path, most: int = 4) -> str:
    """What lies in a folder, in words: folders, and the volumes of the first that has some."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    told = []
    if folders:
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        told.append(f"folders {', '.join(folders[:3])}{more}")
    first = next(volumes(root), None)
    if first is None:
        told.append("no image file")
    else:
        names = example(root)
        more = f" and {len(names) - most} more" if len(names) > most else ""
        told.append(f"in {first.parent.relative_to(root)}: {', '.join(names[:most])}{more}")
    return "; ".join(told)


def example(root: Path) -> list[str]:
    """Names of the volumes in the first folder that has some."""
    first = next(volumes(root), None)
    if first is None:
        return []
    return sorted(path.name for path in volumes(first.parent) if path.parent == first.parent)


def is_flat(root: Path) -> bool:
    """Whether the volumes lie in the folder itself."""
    first = next(volumes(root), None)
    return first is not None and first.parent == root


def suggestion(names: Sequence[str], wanted: Sequence[str], *, flat: bool = False) -> str:
    """What to type for files of these names, guessed from them; without a full stop.

    Args:
        names: of the files of a case, or of several in one folder.
        wanted: modalities.
        flat: whether the names begin with that of the case.
    """
    guessed = {name: _guess(names, name, flat=flat) for name in (*wanted, "label")}
    words = [f"{name}='{pattern}'" for name, pattern in guessed.items()]
    return f"Files of other names are told by {OPTION} {' '.join(words)}"


def _guess(names: Sequence[str], wanted: str, *, flat: bool) -> str:
    """A pattern for a modality or the label from the names of files; ``*...*`` for no guess."""
    for name in names:
        kind, found = next(
            (
                (kind, found)
                for kind, expression in _GUESSES
                if (found := re.search(expression, name, re.IGNORECASE))
            ),
            (None, None),
        )
        if kind != wanted or found is None:
            continue
        before = name[: found.start()]
        if flat and before:
            between = re.sub(r".*[A-Za-z0-9]", "", before)
            return f"{{case}}{between}{found[0]}*"
        return f"*{found[0]}*"
    return "*...*"
