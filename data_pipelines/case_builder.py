"""The TFDS builder that all data sets share: raw cases in, stored cases out, all or nothing.

A data set is built once for each configuration and state of the user's files, into
``<cache>/<name>/<target>_<hash>/<version>``, as one ArrayRecord split named ``train``. TensorFlow
is not needed.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tqdm import tqdm

from data_pipelines import validation
from data_pipelines.case import Case, DataConfig, DataError, MissingDataError, RawCase
from data_pipelines.preprocessing import preprocess_case
from data_pipelines.splits import CaseInfo
from data_pipelines.volume_io import read_volume

SPLIT = "train"
_INFO_FILE = "cases.json"
_HASHED_FIELDS = ("target", "modalities", "allow_missing", "preprocess")
_SOURCES = ("case.py", "case_builder.py", "preprocessing.py", "volume_io.py")


class CaseBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds and reads one data set; a subclass says which cases there are and reads one.

    A subclass is named ``Builder``, stands in ``<name>/<name>_dataset_builder.py`` beside a
    ``README.md`` and a ``CITATIONS.bib``, and defines ``find_cases`` and ``read_case``. It may
    also define ``files``, so that changed files are noticed, and add to ``hashed_fields``.
    """

    VERSION = tfds.core.Version("1.0.0")
    hashed_fields: tuple[str, ...] = ()
    """Further fields of ``DataConfig`` on which the stored cases depend."""

    def __init__(self, config: DataConfig):
        self.data_config = config
        self.entries = list(self.find_cases())
        with _quiet_tfds():
            super().__init__(
                data_dir=config.cache.expanduser(),
                config=tfds.core.BuilderConfig(name=self._config_name()),
                file_format="array_record",
            )

    def __reduce__(self):
        return type(self), (self.data_config,)

    def find_cases(self) -> Sequence[Any]:
        """List the cases, cheaply: one entry each, with at least ``case_id``.

        Raises:
            DataError: the folder is not there or holds no case.
        """
        raise NotImplementedError

    def read_case(self, entry: Any) -> RawCase:
        """Read one case; its faults are ``DataError``."""
        raise NotImplementedError

    def files(self, entry: Any) -> Mapping[str, Path]:
        """What ``read_case`` reads for ``entry``, by name; nothing if the case is computed."""
        return {}

    def find_problems(self) -> list[validation.Problem]:
        """What is wrong with the cases as far as it shows without reading voxels."""
        return validation.check_ids(entry.case_id for entry in self.entries)

    def is_prepared(self) -> bool:
        """Whether the data set is built: the information file is there only if all else is."""
        return (Path(self.data_dir) / _INFO_FILE).is_file()

    def prepare(self) -> None:
        """Build the data set unless it is there already.

        Raises:
            DataError: faults of the data, all cases' in one message. Nothing is left behind.
        """
        if self.is_prepared():
            return
        problems = self.find_problems()
        if problems:
            raise DataError(_report([str(problem) for problem in problems], len(self.entries)))
        try:
            with _quiet_tfds():
                self.download_and_prepare()
        except OSError:
            if not self.is_prepared():  # else another process was faster
                raise
            self.info.read_from_directory(self.data_dir)
        finally:
            self._remove_empty_folders()

    def source(self) -> Sequence[Mapping[str, Any]]:
        """Random-access records of the prepared data set; ``decode`` makes cases of them."""
        return self.as_data_source(SPLIT)  # pyright: ignore[reportCallIssue]

    @property
    def infos(self) -> tuple[CaseInfo, ...]:
        """Facts of the prepared cases, in stored order, without reading them."""
        return tuple(
            CaseInfo(case["case_id"], case["patient_id"], case["positive"], case["metadata"])
            for case in self._stored_info()["cases"]
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of everything stored: equal data have equal fingerprints, wherever built."""
        return self._stored_info()["sha256"]

    def _stored_info(self) -> dict[str, Any]:
        return json.loads((Path(self.data_dir) / _INFO_FILE).read_text())

    def _info(self) -> tfds.core.DatasetInfo:
        info = self.dataset_info_from_configs(features=_features(), disable_shuffling=True)
        info.initialize_from_bucket = lambda: None  # it would leave an empty folder in /tmp
        return info

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Nothing was downloaded."""

    def _split_generators(self, dl_manager):
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Preprocessed cases in order of their ids; after a fault the rest is only checked."""
        faults: list[str] = []
        stored: list[dict[str, Any]] = []
        digest = hashlib.sha256()
        entries = sorted(self.entries, key=lambda entry: entry.case_id)
        for index, entry in enumerate(
            tqdm(
                entries,
                desc=f"Building {self.name}",
                unit="case",
                leave=False,
                disable=not sys.stderr.isatty(),
            )
        ):
            try:
                raw = self.read_case(entry)
                case = preprocess_case(raw, self.data_config)
            except DataError as error:
                faults.append(f"{entry.case_id}: {error}")
                continue
            if faults:
                continue
            record = encode(case)
            for name, value in record.items():
                digest.update(name.encode() + _bytes(value))
            stored.append(
                {
                    "case_id": case.case_id,
                    "patient_id": case.patient_id,
                    "positive": case.positive,
                    "metadata": dict(raw.metadata),
                }
            )
            yield index, record
        if faults:
            raise DataError(_report(faults, len(entries)))
        content = {"sha256": digest.hexdigest(), "cases": stored}
        (Path(self.data_dir) / _INFO_FILE).write_text(json.dumps(content, indent=1) + "\n")

    def _config_name(self) -> str:
        """Target and a hash of all that the stored cases depend on: settings, files, code."""
        config = dataclasses.asdict(self.data_config)
        package = Path(__file__).parent
        code = [package / name for name in _SOURCES]
        code += sorted((package / self.name).glob("*.py"))
        depends_on = {
            "settings": {name: config[name] for name in (*_HASHED_FIELDS, *self.hashed_fields)},
            "cases": [self._entry_state(entry) for entry in self.entries],
            "code": [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
        }
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return f"{self.data_config.target}_{digest[:16]}"

    def _entry_state(self, entry: Any) -> tuple[str, str, list[tuple[str, str, int, int]]]:
        files = [(name, *self._file_state(path)) for name, path in self.files(entry).items()]
        return entry.case_id, getattr(entry, "patient_id", ""), sorted(files)

    def _file_state(self, path: Path) -> tuple[str, int, int]:
        root = (self.data_config.path or Path()).expanduser()
        state = path.stat()
        name = path.relative_to(root) if path.is_relative_to(root) else path
        return name.as_posix(), state.st_size, state.st_mtime_ns

    def _remove_empty_folders(self) -> None:
        """TFDS makes a folder for downloads; of a failed build it leaves the empty parents."""
        downloads = Path(self.data_dir_root) / "downloads"
        config_folder = Path(self.data_dir).parent
        for folder in (
            downloads / "extracted",
            downloads,
            config_folder,
            config_folder.parent,
        ):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


class FileCaseBuilder(CaseBuilder, skip_registration=True):
    """A data set of image files: ``find_cases`` lists ``validation.CaseFiles``."""

    entries: list[validation.CaseFiles]

    def root(self) -> Path:
        """The user's folder, ``config.path``."""
        path = self.data_config.path
        if path is None:
            raise DataError(f"the data set '{self.name}' needs a folder; pass --data.path FOLDER.")
        if not path.expanduser().is_dir():
            raise MissingDataError(f"no folder at {path}. Check --data.path.")
        return path.expanduser()

    def files(self, entry: validation.CaseFiles) -> Mapping[str, Path]:
        """All files of a case, by modality and as ``label``."""
        return {**entry.images, **({"label": entry.label} if entry.label else {})}

    def find_problems(self) -> list[validation.Problem]:
        """Faults that show in file names and headers."""
        return validation.check_files(self.entries, self.data_config)

    def read_case(self, entry: validation.CaseFiles) -> RawCase:
        """Read the volumes that are there; what is missing stays missing."""
        return RawCase(
            case_id=entry.case_id,
            patient_id=entry.patient_id,
            images={name: read_volume(path) for name, path in entry.images.items()},
            label=read_volume(entry.label) if entry.label else None,
            metadata=entry.metadata,
        )


def encode(case: Case) -> dict[str, Any]:
    """The record of a case, as TFDS stores it."""
    return {
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "image": case.image,
        "label": case.label,
        "present": case.present,
        "affine": case.affine,
        "original_shape": np.asarray(case.original_shape, np.int32),
        "original_affine": case.original_affine,
        "truth": case.truth.ravel(),
        "truth_shape": np.asarray(case.truth.shape, np.int32),
        "truth_offset": np.asarray(case.truth_offset, np.int32),
    }


def decode(record: Mapping[str, Any]) -> Case:
    """The case in a stored record. Its arrays are read-only."""
    return Case(
        case_id=_text(record["case_id"]),
        patient_id=_text(record["patient_id"]),
        image=record["image"],
        label=record["label"],
        present=record["present"],
        affine=record["affine"],
        original_shape=_triple(record["original_shape"]),
        original_affine=record["original_affine"],
        truth=record["truth"].reshape(_triple(record["truth_shape"])),
        truth_offset=_triple(record["truth_offset"]),
    )


def _features() -> tfds.features.FeaturesDict:
    def tensor(shape: tuple[int | None, ...], dtype: type) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "case_id": tfds.features.Text(),
            "patient_id": tfds.features.Text(),
            "image": tensor((None, None, None, None), np.int16),
            "label": tensor((None, None, None), np.uint8),
            "present": tensor((None,), np.bool_),
            "affine": tensor((4, 4), np.float64),
            "original_shape": tensor((3,), np.int32),
            "original_affine": tensor((4, 4), np.float64),
            "truth": tensor((None,), np.uint8),  # TFDS 4.9 cannot read back an empty 3D one
            "truth_shape": tensor((3,), np.int32),
            "truth_offset": tensor((3,), np.int32),
        }
    )


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silence what TFDS says of downloads and of settings that are not its own."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.display_progress_bar(False)  # its three bars say less than our one
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _report(faults: Sequence[str], num_cases: int) -> str:
    lines = "\n".join(f"- {fault}" for fault in faults)
    return f"the data set cannot be built; faults: {len(faults)}, cases: {num_cases}.\n{lines}"


def _bytes(value: str | np.ndarray) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return str((value.shape, value.dtype.str)).encode() + value.tobytes()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _triple(value: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in value)
    return a, b, c
