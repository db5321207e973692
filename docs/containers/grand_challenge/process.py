"""Entry point of a container for PI-CAI on grand-challenge.org: one case in, two files out.

Read, each a folder with one file of any name (``.mha``, or what else the pipeline reads)::

    <input>/images/transverse-t2-prostate-mri/
    <input>/images/transverse-adc-prostate-mri/
    <input>/images/transverse-hbv-prostate-mri/

Written::

    <output>/images/cspca-detection-map/cspca_detection_map.mha
    <output>/cspca-case-level-likelihood.json

The map is float32 on the T2W grid, each lesion candidate with its confidence and 0 elsewhere; the
likelihood is the confidence of the strongest one.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.volume_io import SUFFIXES
from experiments.measuring.lesions import detection_map
from experiments.predict import PredictCommand, run
from experiments.process.console import run_main

INPUTS = {
    "t2w": "transverse-t2-prostate-mri",
    "adc": "transverse-adc-prostate-mri",
    "hbv": "transverse-hbv-prostate-mri",
}
"""Folder of each modality."""

CASE = "case"


def image_in(folder: Path) -> Path:
    """The one image of a folder.

    Raises:
        MissingDataError: there is none, or several.
    """
    found = [p for p in sorted(folder.glob("*")) if p.name.lower().endswith(SUFFIXES)]
    if len(found) != 1:
        raise MissingDataError(
            f"the interface has one image in each folder; got {len(found)} in {folder}. Put one "
            f"file of {', '.join(SUFFIXES)} there."
        )
    return found[0]


def process(input_folder: Path, output_folder: Path, model: Path) -> float:
    """Predict the case and write both files; returns its likelihood.

    Raises:
        MissingDataError: an image is not there.
        DataError: the case cannot be predicted.
    """
    images = {name: image_in(input_folder / "images" / folder) for name, folder in INPUTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        case, results = Path(scratch, "in", CASE), Path(scratch, "out")
        case.mkdir(parents=True)
        for name, path in images.items():
            ending = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
            shutil.copy(path, case / f"{name}{ending}")
        if run(PredictCommand(model=(model,), input=case.parent, output=results, page=False)):
            raise DataError(
                f"the case must be predicted; got the fault above, of {images['t2w'].name}. "
                "Correct the images."
            )
        probability = sitk.ReadImage(str(results / "probabilities" / f"{CASE}.nii.gz"))
    found = detection_map(sitk.GetArrayFromImage(probability))
    image = sitk.GetImageFromArray(found.astype(np.float32))
    image.CopyInformation(sitk.ReadImage(str(images["t2w"])))
    target = output_folder / "images" / "cspca-detection-map" / "cspca_detection_map.mha"
    target.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(target), useCompression=True)
    likelihood = float(found.max())
    file = output_folder / "cspca-case-level-likelihood.json"
    file.write_text(json.dumps(likelihood), encoding="utf-8")
    return likelihood


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the defaults are the interface's."""
    parser = argparse.ArgumentParser(description="Predict one case of the PI-CAI interface.")
    parser.add_argument("--input", type=Path, default=Path("/input"))
    parser.add_argument("--output", type=Path, default=Path("/output"))
    default = Path(os.environ.get("CMSAD_MODEL", "/opt/algorithm/model.cmsad"))
    parser.add_argument("--model", type=Path, default=default)
    given = parser.parse_args(arguments)
    print(f"likelihood {process(given.input, given.output, given.model):.4f}")


if __name__ == "__main__":
    run_main(main)
