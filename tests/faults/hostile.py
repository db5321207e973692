"""Names and files made to reach outside the folders they belong to."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder, find_cases
from data_pipelines.reading.case_files import CaseFiles
from experiments.reproduce import read

_STEMS = (
    "../a", "../../a", "a/../../b", "..", ".", "", "/etc/a", "//a", "a/b", "a\\b", "..\\a", "C:\\a",
    "a\0b", "a\0/../b", "a\nb", "a\rb", "a\tb", "a\x1b[2J", "a\x7f", "-rf", "--output=a", ".a",
    "a b", " a", "a ", "~", "~root", "$HOME", "`id`", "a;b", "a|b", "a&b", "a*", "a?", "[a]", "{a}",
    "a%2e%2e%2fb", "a:b", "a'b", 'a"b', "<a>", "a#b", "a@b", "a=b", "a,b", "a+b", "a!b",
    "\uff0e\uff0e\uff0fa", "\u0430dam", "a\u0301", "\u2024\u2024/a", "\u2215a", "a\u202eb",
    "a\u200bb", "\ufeffa", "a\u00a0b", "\U0001f600", "\u0661", "\ud800",
)  # fmt: skip
_LONG = tuple("a" * n for n in (65, 100, 255, 256, 1000, 5000))
IDS = tuple(
    dict.fromkeys(
        (
            *_STEMS,
            *_LONG,
            *(
                f"case_{stem}"
                for stem in _STEMS
                if not stem.isprintable() or set(stem) & set("/\\ ~$;")
            ),
        )
    )
)
"""Case ids that must not become file names."""

ENDINGS = (
    "/../../secret.nii.gz",
    "/../x",
    "",
    "*",
    "/",
    ".exe",
    "\0",
    "../../labelsTr/a.nii.gz",
    7,
)
"""``file_ending`` of a ``dataset.json``."""

MEMBERS = ("../../outside", "/tmp/outside", "state/../../outside", "a\0b", "facts/../x", "\u0430")
"""Members of an archive."""


def refuse_id(case_id: str, folder: Path) -> None:
    """Build a data set with a case of this id."""
    case = CaseFiles(case_id, "p", {}, None, {"t2w": "", "label": ""})
    config = DataConfig(
        name="nifti_folder", path=folder, cache=folder / "cache", modalities=("t2w",)
    )
    with mock.patch.object(Builder, "find_cases", return_value=[case]):
        builder = Builder(config)
    if builder.check_ids():
        builder.prepare()


def refuse_ending(ending: object, folder: Path) -> None:
    """List the cases of nnU-Net's layout with this ``file_ending``."""
    (folder / "imagesTr").mkdir(exist_ok=True)
    description = {"channel_names": {"0": "T2W"}, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    find_cases(folder, DataConfig(name="nifti_folder", path=folder))


def refuse_member(member: str, folder: Path) -> None:
    """Read a recorded step that holds such a member, or pickled objects."""
    file = folder / "step.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member + ".npy", b"not an array")
    read(file)


def refuse_pickle(folder: Path) -> None:
    """Read a recorded step that would run code if it were unpickled."""

    class Touch:
        def __reduce__(self):
            return Path.touch, (folder.parent / "touched",)

    np.savez(folder / "step.npz", facts=np.array([Touch()], object))
    read(folder / "step.npz")


def results(folder: Path, count: int) -> list[str]:
    """Try each; empty texts where it was refused and nothing outside ``folder`` changed."""
    inside = folder / "inside"
    inside.mkdir(parents=True)
    tries: list[tuple[str, Callable[[], None]]] = [("pickle", lambda: refuse_pickle(inside))]
    for kind, refuse, names in (
        ("id", refuse_id, IDS),
        ("ending", refuse_ending, ENDINGS),
        ("member", refuse_member, MEMBERS),
    ):
        tries += [
            (f"{kind} {name!r:.40}", lambda refuse=refuse, name=name: refuse(name, inside))
            for name in names
        ]
    return [_refused(text, attempt, folder, inside) for text, attempt in tries[:count]]


def _refused(text: str, attempt: Callable[[], None], folder: Path, inside: Path) -> str:
    before = _outside(folder, inside)
    try:
        attempt()
    except DataError:
        return "" if _outside(folder, inside) == before else f"{text}: files changed outside"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {error}"
    return f"{text}: accepted"


def _outside(folder: Path, inside: Path) -> set[Path]:
    """What lies around ``inside``, and where the names above point to."""
    return {path for path in folder.parent.rglob("*") if not path.is_relative_to(inside)} | {
        path for place in ("/tmp", "/etc") for path in Path(place).glob("outside*")
    }
