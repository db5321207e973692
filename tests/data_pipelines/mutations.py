"""Files of every format with headers that Hypothesis changes, through validate and predict.

``check`` writes one such file as the T2W of a case, lets both commands' ways to the voxels have it,
and compares what they accept with what nibabel and ITK read, voxel by voxel.
"""

import contextlib
import dataclasses
import gzip
import math
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st

from data_pipelines.building import validation
from data_pipelines.building.builders import open_builder
from data_pipelines.case import Case, Volume
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.geometry import canonical
from data_pipelines.reading.volume_io import read_volume
from experiments.prediction import inputs
from tests.data_pipelines.corruptions import itk_image, with_field
from tests.data_pipelines.fabricate import SMALL, raw_case, write_folder
from tests.data_pipelines.test_dicom import dicom_slice

LIMIT_S = 2.0
LIMIT_BYTES = 2**30
"""What one file may take, beyond what this process has already."""

KINDS = (
    *("t2w.nii", "t2w.nii.gz", "t2w.mha", "packed t2w.mha", "t2w.mhd"),
    *("t2w.nrrd", "packed t2w.nrrd", "t2w.seg.nrrd", "t2w"),
)
"""Names of the mutated file; ``t2w`` is a folder with a DICOM series."""

NUMBERS = st.one_of(
    st.sampled_from((0, 1, -1, 2, 3, 0.5, 1e-3, 1e3, -3, 1e9, 32767, -32768, math.nan, math.inf)),
    st.floats(-100, 100),
    st.integers(0, 64),
)

NIFTI = {
    "dim": 8,
    "pixdim": 8,
    "srow_x": 4,
    "srow_y": 4,
    "srow_z": 4,
    "quatern_b": 1,
    "quatern_c": 1,
    "quatern_d": 1,
    "qoffset_x": 1,
    "qoffset_z": 1,
    "qform_code": 1,
    "sform_code": 1,
    "datatype": 1,
    "bitpix": 1,
    "vox_offset": 1,
    "scl_slope": 1,
    "scl_inter": 1,
    "xyzt_units": 1,
    "dim_info": 1,
    "intent_code": 1,
    "sizeof_hdr": 1,
    "cal_max": 1,
}
"""Fields of a NIfTI header and how many numbers each holds."""

METAIMAGE = (
    *("NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset"),
    *("ElementDataFile", "BinaryData", "CompressedData", "CompressedDataSize", "HeaderSize"),
    *("ElementNumberOfChannels", "BinaryDataByteOrderMSB", "CenterOfRotation", "Position"),
    *("AnatomicalOrientation", "ElementByteOrderMSB", "DistanceUnits", "Comment", "ElementSize"),
)
NRRD = (
    *("type", "dimension", "space", "sizes", "space directions", "kinds", "endian", "encoding"),
    *("space origin", "spacings", "byte skip", "line skip", "space units", "measurement frame"),
    *("axis mins", "old min", "content", "thicknesses", "space dimension", "centers", "units"),
)
WORDS = (
    *("True", "False", "MET_DOUBLE", "MET_UCHAR", "MET_FLOAT", "MET_SHORT", "MET_USHORT", "LOCAL"),
    *("short", "ushort", "uchar", "double", "float", "int64", "big", "little", "raw", "gzip"),
    *("left-posterior-superior", "right-anterior-superior", "LAS", "scanner-xyz", "none", "RAI"),
    *("domain domain domain", "mm", "cm", '"mm" "mm" "mm"', "", "x", "\xb5", "\x1b[31m", "?"),
    *("(1,0,0) (0,1,0) (0,0,3)", "(0,1,0) (1,0,0) (0,0,-2)", "24 24 8", "24 8 24", "8 24 24"),
    *("(0,0,0)", "(1e3,-5,2)", "1 0 0 0 1 0 0 0 1", "0 1 0 1 0 0 0 0 1", "1 1 3", "-1 2 3"),
)
DICOM = (
    *("rows", "columns", "spacing", "position", "orientation", "slope", "intercept", "samples"),
    *("photometric", "allocated", "stored", "high", "signed", "number", "series", "instance"),
    *("pixels", "modality"),
)

TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.lists(NUMBERS, min_size=1, max_size=9).map(lambda n: " ".join(f"{x:g}" for x in n)),
    st.integers(-5, 10**12).map(str),
)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What is changed in a file.

    Attributes:
        kind: of ``KINDS``.
        fields: of its header, each with where in it and the number, or its new text.
        slices: of a DICOM series, those whose header is changed.
        flips: places, as shares of the file, and what is put over a byte there.
        cut: share of the file that is kept.
        more: bytes after its end.
    """

    kind: str
    fields: tuple[tuple[str, object], ...]
    slices: tuple[int, ...] = ()
    flips: tuple[tuple[float, int], ...] = ()
    cut: float = 1.0
    more: bytes = b""


@st.composite
def mutations(draw, kind: str) -> Mutation:
    """Mostly one or two fields of a header; now and then a byte, an end, a beginning."""
    values: st.SearchStrategy[tuple[str, object]] = {
        "nii": st.tuples(st.sampled_from(sorted(NIFTI)), st.tuples(st.integers(0, 7), NUMBERS)),
        "mha": st.tuples(st.sampled_from(METAIMAGE), TEXTS),
        "nrrd": st.tuples(st.sampled_from(NRRD), TEXTS),
        "dicom": st.tuples(st.sampled_from(DICOM), st.tuples(NUMBERS, TEXTS, st.booleans())),
    }[_family(kind)]
    return Mutation(
        kind,
        tuple(draw(st.lists(values, min_size=0, max_size=3))),
        tuple(draw(st.sets(st.integers(0, 7), min_size=1, max_size=8))),
        tuple(
            draw(st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=2))
            if draw(st.integers(0, 3)) == 0
            else ()
        ),
        draw(st.sampled_from((1.0, 1.0, 1.0, 1.0, 0.999, 0.5))),
        draw(st.sampled_from((b"", b"", b"", b"\0", bytes(400), b"more" * 300))),
    )


def _family(kind: str) -> str:
    if "nii" in kind:
        return "nii"
    return "mha" if ".mh" in kind else "nrrd" if "nrrd" in kind else "dicom"


def whole() -> Volume:
    """What every file holds before it is changed."""
    return raw_case("c0").images["t2w"]


def write(mutation: Mutation, folder: Path) -> Path:
    """Write the changed file (and its voxels, where they lie apart) into the folder of a case."""
    path = folder / mutation.kind.removeprefix("packed ")
    if _family(mutation.kind) == "dicom":
        _write_dicom(mutation, path)
        return path
    content = _changed(mutation, _content(mutation.kind, folder))
    for place, change in mutation.flips:
        if content:
            at = int(place * len(content))
            content = content[:at] + bytes([content[at] ^ change]) + content[at + 1 :]
    content = content[: int(mutation.cut * len(content))] + mutation.more
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".nii.gz") else content)
    return path


def _content(kind: str, folder: Path) -> bytes:
    volume = whole()
    if "nii" in kind:
        image = nib.Nifti1Image(volume.array.T, volume.affine)
        image.set_qform(volume.affine, 1)
        image.set_sform(volume.affine, 1)
        return image.to_bytes()
    path = folder / kind.removeprefix("packed ")
    sitk.WriteImage(itk_image(volume), str(path), useCompression=kind.startswith("packed"))
    content = path.read_bytes()
    path.unlink()
    return content


def _changed(mutation: Mutation, content: bytes) -> bytes:
    if _family(mutation.kind) == "nii":
        header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
        for name, value in mutation.fields:
            index, number = value  # pyright: ignore[reportGeneralTypeIssues]
            _set(header, name, index % NIFTI[name], number)
        return header.tobytes() + content[348:]
    separator = b" = " if _family(mutation.kind) == "mha" else b": "
    for name, text in mutation.fields:
        value = str(text).encode("latin-1", "replace")
        content = with_field(content, name.encode(), separator, value)
    return content


def _set(header: np.ndarray, name: str, index: int, number: float) -> None:
    """A number into a field of a header, as far as its type can hold it."""
    place = header[0][name] if NIFTI[name] > 1 else header[name]
    index = index if NIFTI[name] > 1 else 0
    if place.dtype.kind in "iu":
        if not math.isfinite(number):
            return
        info = np.iinfo(place.dtype)
        number = min(max(int(number), info.min), info.max)
    with np.errstate(over="ignore"):
        place[index] = number


def _write_dicom(mutation: Mutation, folder: Path) -> None:
    folder.mkdir()
    shorts = ("rows", "columns", "samples", "allocated", "stored", "high", "signed")
    for k, plane in enumerate(whole().array):
        changed: dict[str, bytes | None] = {}
        for name, value in mutation.fields if k in mutation.slices else ():
            number, text, absent = value  # pyright: ignore[reportGeneralTypeIssues]
            if absent:
                changed[name] = None
            elif name in shorts:
                number = int(number) if math.isfinite(number) else 7
                changed[name] = struct.pack("<H", number % 2**16)
            elif name == "pixels":
                changed[name] = plane.tobytes()[: max(int(abs(len(text)) * 9), 0)]
            else:
                changed[name] = text.replace(" ", "\\").encode("latin-1", "replace")
        content = dicom_slice(plane, k, whole().affine, **changed)
        if k in mutation.slices:
            content = content[: int(mutation.cut * len(content))]
        (folder / f"IM{k:03d}.dcm").write_bytes(content)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, the process may take ``LIMIT_BYTES`` more of memory, and ``LIMIT_S`` of processor."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    kept = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, kept[1]))
    started = time.process_time()  # of this process alone, however busy the machine is
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
    took = time.process_time() - started
    assert took < LIMIT_S, f"{took:.1f} s"


def check(mutation: Mutation, root: Path) -> str:
    """Try one file; ``error`` or ``same`` for what came of it.

    Raises:
        AssertionError: a fault that is no ``DataError``, commands that differ, or other voxels than
            the format's readers find.
    """
    whole_case, data = root / "whole", root / "data"
    if not whole_case.is_dir():
        config = write_folder(whole_case, raw_case("c0"))
        validation.validate(open_builder(config))  # takes what a process needs once
        (whole_case / "c0/t2w.nii.gz").unlink()
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(whole_case, data)
    folder = data / "c0"
    path = write(mutation, folder)
    config = DataConfig(name="nifti_folder", path=data, cache=root / "cache", preprocess=SMALL)
    with bounded():
        found = validation.validate(open_builder(config))
    with bounded():
        predicted = _predicted(folder, config)
    try:
        with bounded():
            volume = read_volume(path)
    except DataError as error:
        volume = error
    if isinstance(volume, Volume):
        _compare(path, volume)
    else:
        assert str(path) in str(volume), f"an error that does not name the file: {volume}"
        assert found.num_errors, f"validate accepts what cannot be read: {volume}"
        assert isinstance(predicted, DataError), f"predict accepts what cannot be read: {volume}"
    return "error" if isinstance(predicted, DataError) else "same"


def _predicted(folder: Path, config: DataConfig) -> Case | DataError:
    """What the way of a case into the network gives."""
    try:
        (entry,) = inputs.find_inputs(folder, config.modalities)
        return inputs.read_case(entry, config)
    except DataError as error:
        return error


def _compare(path: Path, volume: Volume) -> None:
    """Whether nibabel and ITK, where they read a file, find these voxels, and there."""
    readers: Mapping[str, Callable[[Path], Volume]] = {"ITK": _itk}
    if "nii" in path.name:
        readers = {"nibabel": _nibabel, **readers}
    agree, others = [], []
    for name, reader in readers.items():
        try:
            other = reader(path)
        except Exception as error:  # a reader that refuses the file says nothing of it
            others.append(f"{name} refuses it: {str(error)[-200:]}")
            continue
        ours, theirs = canonical(volume).array, canonical(other).array
        if ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-5, atol=1e-4):
            agree.append(name)
        else:
            others.append(f"{name} finds other voxels, {theirs.shape} for {ours.shape}")
        if name != "ITK" or "nii" not in path.name:  # of two places ITK may take the other one
            scale = _millimetres(path)
            far = abs(np.diag([*scale, 1]) @ other.affine - volume.affine).max()
            if not far <= 1e-3 * max(1, abs(volume.affine).max()):
                others.append(f"{name} finds another place, {far:g} apart")
    assert agree or not others or all("refuses" in text for text in others), others
    assert not any("other voxels" in text for text in others) or agree, others
    assert not any("another place" in text for text in others), others


def _millimetres(path: Path) -> tuple[float, float, float]:
    """What nibabel leaves to others: the unit of lengths."""
    if "nii" not in path.name:
        return 1.0, 1.0, 1.0
    unit = int(nib.load(path).header["xyzt_units"]) & 7  # pyright: ignore[reportIndexIssue]
    scale = {1: 1e3, 3: 1e-3}.get(unit, 1.0)
    return scale, scale, scale


def _nibabel(path: Path) -> Volume:
    image = nib.load(path)
    array = np.asanyarray(image.dataobj)  # pyright: ignore[reportAttributeAccessIssue]
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Volume(array.T, np.asarray(image.affine))  # pyright: ignore[reportAttributeAccessIssue]


def _itk(path: Path) -> Volume:
    if path.is_dir():
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
        planes = [sitk.ReadImage(name) for name in names]  # each scaled by its own values
        image = sitk.ReadImage(names)
        array = np.concatenate([sitk.GetArrayFromImage(plane) for plane in planes])
    else:
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image)
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if image.GetDimension() != 3:
        return Volume(array, np.eye(4))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return Volume(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix)
