"""Small synthetic cases, in memory and on disk, for the tests of this folder."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_pipelines.case import RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig

SMALL = PreprocessConfig(spacing_mm=(3.0, 1.0, 1.0), size=(6, 16, 16))


def affine(spacing_dhw=(3.0, 1.0, 1.0), origin=(-10.0, -12.0, 5.0), tilt_deg=10.0) -> np.ndarray:
    """An affine tilted about the x axis."""
    angle = np.deg2rad(tilt_deg)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) * spacing_dhw[::-1]
    matrix[:3, 3] = origin
    return matrix


def raw_case(case_id="a", *, seed=0, positive=True) -> RawCase:
    """T2W 8 x 24 x 24, ADC and HBV coarser and on a grid of their own, a box as the label."""
    rng = np.random.default_rng(seed)
    fine, coarse = affine(), affine((3.0, 2.0, 2.0), (-11.0, -13.0, 5.0))
    label = np.zeros((8, 24, 24), np.uint16)
    if positive:
        label[3:5, 10:14, 8:13] = 3
    return RawCase(
        case_id,
        f"patient_{case_id}",
        {
            "t2w": Volume(rng.integers(0, 1000, (8, 24, 24)).astype(np.int16), fine),
            "adc": Volume(rng.integers(0, 3000, (8, 13, 14)).astype(np.uint16), coarse),
            "hbv": Volume(rng.gamma(2.0, 40.0, (8, 13, 14)).astype(np.float32), coarse),
        },
        Volume(label, fine),
    )


def save(path: Path, volume: Volume) -> None:
    """Write with the library of the format, independently of volume_io."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(volume.array.T, volume.affine), path)
        return
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path))


def write_folder(root: Path, *cases: RawCase, ending=".nii.gz", label="lesion") -> DataConfig:
    """One folder per case; returns the config to read them."""
    for case in cases:
        for name, volume in case.images.items():
            save(root / case.case_id / f"{name}{ending}", volume)
        if case.label is not None:
            save(root / case.case_id / f"{label}{ending}", case.label)
    return DataConfig(name="nifti_folder", path=root, cache=root.parent / "cache", preprocess=SMALL)


def write_dicom(folder, volume: Volume, *, tags=None, name="slice", skip=()) -> None:
    """A series of single images, oblique as the volume is."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, plane in enumerate(volume.array):
        if index in skip:
            continue
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing(spacing.tolist())
        position = lps[:3, 3] + lps[:3, 2] * index
        values = {
            "0008|0060": "MR",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"1.2.3.{abs(hash(name)) % 1000}.{index}",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0020|0032": "\\".join(f"{x:.6f}" for x in position),
            "0020|0037": "\\".join(f"{x:.8f}" for x in direction[:, :2].T.ravel()),
            "0020|0013": str(index),
            "0018|0050": str(spacing[2]),
            **(tags or {}),
        }
        for tag, value in values.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{name}{index:03d}.dcm"))
        writer.Execute(image)
