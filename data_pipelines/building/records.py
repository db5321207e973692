"""How a case lies in the built data set: one TFDS record."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.case import Case

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


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
        case_id=text_of(record["case_id"]),
        patient_id=text_of(record["patient_id"]),
        image=record["image"],
        label=record["label"],
        present=record["present"],
        affine=record["affine"],
        original_shape=_triple(record["original_shape"]),
        original_affine=record["original_affine"],
        truth=record["truth"].reshape(_triple(record["truth_shape"])),
        truth_offset=_triple(record["truth_offset"]),
    )


def features() -> "tfds.features.FeaturesDict":
    """Names, shapes and types of a record's entries."""
    import tensorflow_datasets as tfds

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
            "metadata": tfds.features.Text(),
        }
    )


def text_of(value: str | bytes) -> str:
    """A text, which TFDS gives back as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _triple(value: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in value)
    return a, b, c
