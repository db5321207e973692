"""Predicted masks as other programs open them: 3D Slicer, ITK-SNAP, and whatever reads DICOM.

``.seg.nrrd`` is 3D Slicer's own: a labelled NRRD whose header names and colours the segments.
ITK-SNAP takes the NIfTI mask with a file of label descriptions. DICOM SEG is written by highdicom
(Bridge et al., J Digit Imaging 2022) and refers to the series that the mask was drawn on.
"""

import dataclasses
import gzip
import hashlib
import importlib.util
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmsad_jax import __version__
from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file
from data_pipelines.targets import Target

Code = tuple[str, str, str]
"""Value, scheme and meaning of a coded term."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A class as it is shown and coded.

    Attributes:
        label: its value in masks.
        name: of the class.
        color: red, green, blue, 0 to 255.
        category, kind: SNOMED CT terms of what it is.
        region: that of where it lies; None where the class is one of the user's own.
    """

    label: int
    name: str
    color: tuple[int, int, int]
    category: Code
    kind: Code
    region: Code | None = None


_TISSUE = ("85756007", "SCT", "Tissue")
_CHANGED = ("49755003", "SCT", "Morphologically Abnormal Structure")
_KNOWN: dict[str, tuple[tuple[int, int, int], Code, Code]] = {
    "lesion": ((230, 60, 50), _CHANGED, ("52988006", "SCT", "Lesion")),
    "gland": ((222, 184, 100), _TISSUE, ("41216001", "SCT", "Prostate")),
    "pz": (
        (90, 170, 235),
        _TISSUE,
        ("279706003", "SCT", "Peripheral zone of the prostate"),
    ),
    "tz": (
        (120, 205, 110),
        _TISSUE,
        ("399384005", "SCT", "Transition zone of the prostate"),
    ),
}
_OTHER_COLORS = ((240, 190, 60), (180, 110, 220), (70, 200, 190), (235, 130, 170), (150, 150, 150))
_PROSTATE: Code = ("41216001", "SCT", "Prostate")


def segments_of(target: Target) -> tuple[Segment, ...]:
    """The parts of a target, in label order from 1 on.

    Those of the built-in targets lie in the prostate. Of others nothing is known but the name, and
    nothing is claimed: they are tissue, of no region.
    """
    built_in = not target.values
    found = []
    for label, name in enumerate(target.part_names, 1):
        color, category, kind = _OTHER_COLORS[(label - 1) % len(_OTHER_COLORS)], _TISSUE, _TISSUE
        if built_in:
            color, category, kind = _KNOWN[name]
        found.append(Segment(label, name, color, category, kind, _PROSTATE if built_in else None))
    return tuple(found)


def write_seg_nrrd(
    path: Path, mask: np.ndarray, affine: np.ndarray, segments: Sequence[Segment]
) -> None:
    """Write a mask as 3D Slicer's segmentation, whole or not at all.

    Args:
        path: ending in ``.seg.nrrd``.
        mask: uint8 ``d h w``, class ``i`` as ``i + 1``.
        affine: to RAS+ millimetres, index ``(w, h, d)``; written in LPS+, as Slicer does.
        segments: of the classes.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    depth, height, width = mask.shape

    def vector(values: np.ndarray) -> str:
        return f"({','.join(f'{value:.10g}' for value in values)})"

    header = [
        "NRRD0004",
        "# Complete NRRD file format specification at:",
        "# http://teem.sourceforge.net/nrrd/format.html",
        "type: unsigned char",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {width} {height} {depth}",
        f"space directions: {' '.join(vector(lps[:3, axis]) for axis in range(3))}",
        "kinds: domain domain domain",
        "encoding: gzip",
        f"space origin: {vector(lps[:3, 3])}",
        *(
            line
            for number, segment in enumerate(segments)
            for line in _fields(number, segment, mask)
        ),
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(("\n".join(header) + "\n\n").encode())
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:  # no name, no time
            packed.write(np.ascontiguousarray(mask, np.uint8).tobytes())


def _fields(number: int, segment: Segment, mask: np.ndarray) -> list[str]:
    """Header lines of one segment."""
    found = np.argwhere(mask == segment.label)
    low, high = (found.min(0), found.max(0)) if len(found) else (np.zeros(3, int), -np.ones(3, int))
    region = segment.region
    extent = " ".join(f"{low[axis]} {high[axis]}" for axis in (2, 1, 0))
    terms = "~".join(
        (
            "Segmentation category and type - 3D Slicer General Anatomy list",
            *("^".join((code[1], code[0], code[2])) for code in (segment.category, segment.kind)),
            "^^",
            "Anatomic codes - DICOM master list",
            "^^" if region is None else "^".join((region[1], region[0], region[2])),
            "^^",
        )
    )
    values = {
        "Color": " ".join(f"{value / 255:.6g}" for value in segment.color),
        "ColorAutoGenerated": "0",
        "Extent": extent,
        "ID": segment.name,
        "LabelValue": str(segment.label),
        "Layer": "0",
        "Name": segment.name,
        "NameAutoGenerated": "0",
        "Tags": f"TerminologyEntry:{terms}|",
    }
    return [f"Segment{number}_{name}:={value}" for name, value in values.items()]


def label_descriptions(segments: Sequence[Segment], values: Sequence[int] = ()) -> str:
    """The classes as ITK-SNAP reads them (Segmentation > Import Label Descriptions).

    ``values`` are those of the mask's file, where they are not the labels.
    """
    rows = [(0, (0, 0, 0), 0, 0, "Clear Label")]
    rows += [
        (value, each.color, 1, 1, each.name)
        for each, value in zip(segments, values or [s.label for s in segments], strict=True)
    ]
    lines = [
        f'{label:5d} {r:5d} {g:4d} {b:4d} {shown:8d} {shown:2d} {meshed:2d}    "{name}"'
        for label, (r, g, b), shown, meshed, name in rows
    ]
    return "\n".join(
        (
            "################################################",
            "# ITK-SnAP Label Description File",
            "# File format:",
            "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
            "################################################",
            *lines,
            "",
        )
    )


def has_highdicom() -> bool:
    """Whether DICOM SEG can be written."""
    return importlib.util.find_spec("highdicom") is not None


def write_dicom_seg(
    path: Path,
    mask: np.ndarray,
    affine: np.ndarray,
    series: Path,
    segments: Sequence[Segment],
    model_sha256: str,
) -> None:
    """Write a mask as DICOM SEG that refers to the series it was drawn on, whole or not at all.

    Needs highdicom (``has_highdicom``).

    The object is of the patient and the study of that series. Slices without any segment are left
    out, as usual; of a mask of nothing one empty slice remains.

    Args:
        path: ending in ``.dcm``.
        mask: uint8 ``d h w`` on the grid of the series, class ``i`` as ``i + 1``.
        affine: of the mask, to RAS+ millimetres.
        series: folder of the DICOM series.
        segments: of the classes.
        model_sha256: identity of the model; with the series it makes the identifiers of the object.

    Raises:
        DataError: the series lacks what such an object must repeat of it.
    """
    import pydicom

    sources = _in_order(series, affine, len(mask))
    if not all(getattr(source, "FrameOfReferenceUID", "") for source in sources):
        raise DataError(
            f"a DICOM SEG lies in the frame of reference of its series; got none in {series}. "
            "Use the NIfTI mask or the .seg.nrrd."
        )
    try:
        segmentation = _segmentation(sources, mask, segments, model_sha256)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"a DICOM SEG repeats patient, study and place of the series; {series} does not give "
            f"what it needs: {error}. Use the NIfTI mask or the .seg.nrrd."
        ) from error
    with atomic_file(path) as partial:
        pydicom.dcmwrite(partial, segmentation, enforce_file_format=True)


def _in_order(series: Path, affine: np.ndarray, depth: int) -> list:
    """The files of a series by their place in the mask."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    placed = {}
    to_index = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    for file in sorted(series.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        try:
            dataset = pydicom.dcmread(file, stop_before_pixels=False)
            position = [float(value) for value in dataset.ImagePositionPatient]
        except (InvalidDicomError, AttributeError):
            continue
        placed[round(float((to_index @ [*position, 1])[2]))] = dataset
    if sorted(placed) != list(range(depth)):
        raise DataError(
            f"a DICOM SEG needs a file of the series for each slice; got {len(placed)} for {depth} "
            f"in {series}. Use the NIfTI mask or the .seg.nrrd."
        )
    return [placed[index] for index in range(depth)]


def _segmentation(sources: list, mask: np.ndarray, segments: Sequence[Segment], model_sha256: str):
    """The object, of the patient and study of its sources."""
    import highdicom
    from pydicom.sr.codedict import codes

    def uid(what: str) -> str:
        seeds = [what, model_sha256, *(str(source.SOPInstanceUID) for source in sources)]
        digest = hashlib.sha256(" ".join(seeds).encode()).digest()
        return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"

    def coded(code: Code) -> "highdicom.sr.CodedConcept":
        return highdicom.sr.CodedConcept(*code)

    for source in sources:
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate",
                     "StudyTime", "StudyID", "AccessionNumber"):  # fmt: skip
            if name not in source:  # may be empty, but must be there
                setattr(source, name, None if name.startswith(("Study", "PatientB")) else "")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="cmsad-jax",
        version=__version__,
        family=codes.DCM.ArtificialIntelligence,
        source="https://arxiv.org/abs/2011.03908 (a reconstruction)",
    )
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(mask, np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=each.label,
                segment_label=each.name,
                segmented_property_category=coded(each.category),
                segmented_property_type=coded(each.kind),
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                display_color=highdicom.color.CIELabColor(*_lab(each.color)),
                anatomic_regions=None if each.region is None else [coded(each.region)],
            )
            for each in segments
        ],
        omit_empty_frames=bool(mask.any()),
        series_instance_uid=uid("series"),
        series_number=9000,
        sop_instance_uid=uid("instance"),
        instance_number=1,
        manufacturer="cmsad_jax",
        manufacturer_model_name="cmsad_jax",
        software_versions=__version__,
        device_serial_number=model_sha256[:16],
        content_description="Research software, not for diagnosis",
        content_label="CMSAD",
        series_description="CMSAD segmentation (research)",
    )


def _lab(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """CIELab (D65) of an sRGB colour."""
    linear = np.array(color) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ linear / (0.9505, 1.0, 1.089)
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
