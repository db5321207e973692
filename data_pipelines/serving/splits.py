"""Cross-validation folds: grouped by patient, stratified by lesion presence, kept in a file.

A fold file is JSON: ``{"schema": 3, "sha256": ..., "folds": [...]}``, each fold ``{"train": [...],
"val": [...]}``, and has a list ``"names"`` where each fold is a group, such as a centre, and a list
``"test"`` where cases are held out of all folds. In files of schema 2 and 1 a fold trains on all
cases that it does not validate; the latter have no number. The bare list of folds, as PI-CAI and
nnU-Net write theirs, can be read as well.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipelines.case import CaseInfo
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.files import atomic_file

SCHEMA = 3
"""Version of the fold files that are written."""


@dataclasses.dataclass(frozen=True)
class Folds:
    """Which cases validate in which fold; all others of the folds train in it, or those named.

    Attributes:
        validation: case ids of each fold, sorted.
        names: what each fold leaves out, such as a centre; empty for folds drawn over patients.
        trained: case ids that train in each fold, sorted, where these are not all others.
        test: case ids that neither train nor validate anywhere.
    """

    validation: tuple[tuple[str, ...], ...]
    names: tuple[str, ...] = ()
    trained: tuple[tuple[str, ...], ...] = ()
    test: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.validation)

    def training(self, fold: int) -> tuple[str, ...]:
        """Sorted ids of the cases that train in ``fold``."""
        if self.trained:
            return self.trained[fold]
        others = (ids for i, ids in enumerate(self.validation) if i != fold)
        return tuple(sorted(case_id for ids in others for case_id in ids))

    @property
    def cases(self) -> tuple[str, ...]:
        """Sorted ids of the cases that train or validate somewhere."""
        trained = (self.training(fold) for fold in range(len(self)))
        return tuple(sorted({case for ids in (*self.validation, *trained) for case in ids}))

    def training_on(self, trained: Sequence[tuple[str, ...]]) -> "Folds":
        """These folds with the cases that train in each, unless those are all others anyway."""
        plain = dataclasses.replace(self, trained=())
        if all(ids == plain.training(i) for i, ids in enumerate(trained)):
            return plain
        return dataclasses.replace(self, trained=tuple(trained))

    @property
    def sha256(self) -> str:
        """Hash of the ids: equal folds have equal hashes."""
        ids: object = self.validation
        if self.trained or self.test:
            ids = [self.validation, self.trained, self.test]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the fold file, whole or not at all."""
        folds = [{"train": self.training(i), "val": ids} for i, ids in enumerate(self.validation)]
        names = {"names": self.names} if self.names else {}
        test = {"test": self.test} if self.test else {}
        record = {"schema": SCHEMA, "sha256": self.sha256, **names, **test, "folds": folds}
        content = json.dumps(record, indent=1)
        with atomic_file(path) as partial:
            partial.write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Folds":
        """Read a file written by ``save``; one that was changed since is a ``DataError``."""
        content = _read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path} must be a fold file written by this project. {_PUBLISHED}")
        listed = _fold_list(content, path)
        validation = tuple(tuple(fold["val"]) for fold in listed)
        folds = cls(validation, _names(content, len(validation), path), test=_test(content, path))
        folds = folds.training_on([tuple(fold["train"]) for fold in listed])
        if folds.sha256 != content.get("sha256"):
            raise DataError(
                f"{path} must hold the folds that its sha256 was taken of; got hash "
                f"{folds.sha256[:12]} and written {str(content.get('sha256'))[:12]}. "
                "Restore the file, or delete it to make new folds."
            )
        return folds


_PUBLISHED = "Read folds from elsewhere as published folds."


def make_folds(infos: Iterable[CaseInfo], *, num_folds: int = 5, seed: int = 0) -> Folds:
    """Spread the patients over folds of equal size and equal share of positive cases.

    Patients are taken in an order drawn by ``seed`` (a hash of seed and patient id, so it depends
    neither on the order of ``infos`` nor on a generator's version), those with most positive
    cases first, and each goes to the fold that has the fewest positive cases (if it brings any)
    and the fewest cases. With one case a patient both counts differ by at most 1 between folds.

    Raises:
        DataError: fewer than two folds, fewer patients than folds, or a case given twice.
    """
    infos = sorted(infos, key=lambda info: info.case_id)
    _check_unique(infos)
    patients: dict[str, list[CaseInfo]] = {}
    for info in infos:
        patients.setdefault(info.patient_id, []).append(info)
    if num_folds < 2:
        raise DataError(f"there must be at least 2 folds; got {num_folds}. Ask for 2 or more.")
    if len(patients) < num_folds:
        raise DataError(
            f"each fold needs a patient of its own; got {len(patients)} patients and {num_folds} "
            f"folds. Use --num-folds={len(patients)} or fewer, or add patients."
        )

    def order(patient: str) -> tuple[int, int, str]:
        cases = patients[patient]
        drawn = hashlib.sha256(f"{seed}/{patient}".encode()).hexdigest()
        return -sum(case.positive for case in cases), -len(cases), drawn

    folds: list[list[CaseInfo]] = [[] for _ in range(num_folds)]
    for patient in sorted(patients, key=order):
        cases = patients[patient]
        if any(case.positive for case in cases):
            fold = min(folds, key=lambda fold: (sum(case.positive for case in fold), len(fold)))
        else:
            fold = min(folds, key=len)
        fold.extend(cases)
    return Folds(tuple(tuple(sorted(case.case_id for case in fold)) for fold in folds))


def group_folds(infos: Sequence[CaseInfo], *, group: str) -> Folds:
    """One fold for each value of a fact of the cases: leave one centre out.

    Folds are in the order of the values. Each trains on all other centres, so that its result says
    how the model does where it has never been.

    Raises:
        DataError: a case without the fact, fewer than two values, a patient with several values, or
            a case given twice.
    """
    infos = sorted(infos, key=lambda info: info.case_id)
    _check_unique(infos)
    known = sorted({name for info in infos for name in info.metadata})
    lacking = [info.case_id for info in infos if not info.metadata.get(group)]
    if lacking:
        raise DataError(
            f"every case must have a {group!r} to be grouped by; {_some(lacking)} have none. "
            f"Known facts are: {', '.join(known) or 'none'}. Group by another, or add the column."
        )
    values = sorted({info.metadata[group] for info in infos})
    if len(values) < 2:
        raise DataError(
            f"there must be at least 2 groups; got {group} = {values[0]} alone. "
            "Group by another fact, or let the project draw folds over patients."
        )
    _check_one_group(infos, group)
    members = (
        tuple(info.case_id for info in infos if info.metadata[group] == value) for value in values
    )
    return Folds(tuple(members), tuple(values))


def _check_one_group(infos: Sequence[CaseInfo], group: str) -> None:
    """Refuse a patient whose cases are of several groups."""
    group_of: dict[str, str] = {}
    for info in infos:
        value = info.metadata[group]
        other = group_of.setdefault(info.patient_id, value)
        if other != value:
            raise DataError(
                f"the cases of a patient must have one {group!r}, as they share a fold; got "
                f"{other!r} and {value!r} for patient {info.patient_id}. Correct these values, "
                "leave the patient out, or group by another fact."
            )


def load_published(path: Path, infos: Sequence[CaseInfo]) -> Folds:
    """Folds that others published, cut to the cases of this data set.

    A fold may train on fewer cases than it does not validate, there may be one fold alone, and
    cases may be in none, such as those of the list ``"test"``.

    Args:
        path: JSON list of ``{"train": [ids], "val": [ids]}``, or a fold file of this project.
        infos: the cases at hand; published ids that are not among them are dropped.

    Raises:
        MissingDataError: no such file.
        DataError: a case or a patient is validated in several folds, or trains and validates in
            one, or is held out and is not; a fold keeps no case; or names that are not one for
            each fold.
    """
    known = {info.case_id for info in infos}
    content = _read_json(path)
    published = _fold_list(content, path)
    validation = tuple(tuple(sorted(known & set(fold["val"]))) for fold in published)
    test = tuple(sorted(known & set(_test(content, path))))
    folds = Folds(validation, _names(content, len(validation), path), test=test)
    folds = folds.training_on([tuple(sorted(known & set(fold["train"]))) for fold in published])
    check_folds(folds, infos, source=path, all_cases=False)
    _check_apart(folds, infos, path)
    return folds


def _check_apart(folds: Folds, infos: Sequence[CaseInfo], path: Path) -> None:
    """Refuse a fold that trains on none, or on patients whom it validates or that are held out."""
    patient_of = {info.case_id: info.patient_id for info in infos}
    held_out = {patient_of[case_id]: case_id for case_id in folds.test}
    for i, ids in enumerate(folds.validation):
        training = folds.training(i)
        if not training:
            raise DataError(
                f"every fold must train on at least one case; fold {i} of {path} has none of this "
                "data set. Correct the file, or add the missing cases."
            )
        validated = {patient_of[case_id]: case_id for case_id in ids}
        for what, other in (("validated", validated), ("held out as a test", held_out)):
            for case_id in (*training, *(ids if other is held_out else ())):
                if patient_of[case_id] in other:
                    raise DataError(
                        f"no patient may train and be {what} in one fold; fold {i} of {path} has "
                        f"{case_id} and {other[patient_of[case_id]]} of patient "
                        f"{patient_of[case_id]}. Correct the file."
                    )


def check_folds(
    folds: Folds, infos: Sequence[CaseInfo], *, source: Path | str, all_cases: bool = True
) -> None:
    """Raise ``DataError`` unless ``folds`` part these cases, with no patient in two.

    With ``all_cases`` each case must be validated in one of them.
    """
    _check_unique(infos)
    patient_of = {info.case_id: info.patient_id for info in infos}
    fold_of: dict[str, int] = {}
    fold_of_patient: dict[str, int] = {}
    for i, ids in enumerate(folds.validation):
        if not ids:
            raise DataError(
                f"every fold must validate at least one case; fold {i} of {source} has none of "
                "this data set. Let the project make the folds, or add the missing cases."
            )
        for case_id in ids:
            if case_id not in patient_of:
                raise DataError(
                    f"folds must be of the data set they are used with; {source} names the "
                    f"unknown case {case_id}. Use the fold file of this data set, or make new "
                    "folds."
                )
            if fold_of.setdefault(case_id, i) != i:
                raise DataError(
                    f"a case must be validated in one fold; {source} has {case_id} in folds "
                    f"{fold_of[case_id]} and {i}. Correct the file."
                )
            patient = patient_of[case_id]
            if fold_of_patient.setdefault(patient, i) != i:
                raise DataError(
                    f"the cases of a patient must share a fold; {source} has patient {patient} "
                    f"in folds {fold_of_patient[patient]} and {i}. Correct the file."
                )
    left_out = patient_of.keys() - fold_of.keys()
    if left_out and all_cases:
        raise DataError(
            f"every case must be in a fold; {source} lacks {len(left_out)} of {len(infos)}: "
            f"{_some(left_out)}. Remove these cases, or let the project make the folds."
        )


def _check_unique(infos: Sequence[CaseInfo]) -> None:
    seen: set[str] = set()
    for info in infos:
        if info.case_id in seen:
            raise DataError(f"case ids must be unique; got {info.case_id} twice. Rename one.")
        seen.add(info.case_id)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingDataError(f"no fold file at {path}. Check the path.") from None
    except ValueError as error:
        raise DataError(f"{path} must be JSON; got: {error}. Correct the file.") from None
    except OSError as error:
        raise DataError(
            f"{path} must be a file that can be read; got: {error.strerror}. Check the path."
        ) from None


def _fold_list(content: object, path: Path) -> list[dict[str, list[str]]]:
    """The folds of either file format, each with string lists ``train`` and ``val``."""
    schema = content.get("schema", 1) if isinstance(content, dict) else 1
    if type(schema) is not int or schema > SCHEMA:
        raise DataError(
            f"fold files of schema {SCHEMA} and before can be read; {path} has {schema!r}. "
            "Use the version of cmsad-jax that wrote it, or a later one."
        )
    folds = content.get("folds") if isinstance(content, dict) else content
    if isinstance(folds, list) and folds and all(_is_fold(fold) for fold in folds):
        return folds
    raise DataError(
        f'{path} must be a list of folds {{"train": [case ids], "val": [case ids]}}; got '
        f"something else. Correct the file."
    )


def _names(content: object, count: int, path: Path) -> tuple[str, ...]:
    """The names of ``count`` folds in a file of this project; empty where it holds none."""
    names = content.get("names", []) if isinstance(content, dict) else []
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if texts and len(names) in (0, count):
        return tuple(names)
    raise DataError(
        f'{path} must give as "names" one text for each of its {count} folds, or none at all; got '
        f"{names!r:.80}. Correct the file."
    )


def _test(content: object, path: Path) -> tuple[str, ...]:
    """The ids that a file holds out of all folds."""
    test = content.get("test", []) if isinstance(content, dict) else []
    if isinstance(test, list) and all(isinstance(case_id, str) for case_id in test):
        return tuple(test)
    raise DataError(
        f'{path} must give as "test" a list of case ids, or none; got {test!r:.80}. Correct the '
        "file."
    )


def _is_fold(fold: object) -> bool:
    return isinstance(fold, dict) and all(
        isinstance(fold.get(part), list) and all(isinstance(i, str) for i in fold[part])
        for part in ("train", "val")
    )


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
