"""Inputs of every kind that people have, through validate, build, predict and evaluate.

``python -m tests.inputs FOLDER [NAME ...]`` writes each input into FOLDER, runs the commands on it
as a user would, and prints a table: input, expected, came. The exit status is 1 unless all are
equal. What is expected of a command is its exit status and a part of what it prints.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
from scipy import ndimage

from data_pipelines import build, command_line, validate
from data_pipelines.case import Volume
from experiments import evaluate, predict
from experiments.process.console import run_main
from experiments.process.signals import SIGNALS
from experiments.settings.command_line import complete
from tests.data_pipelines.fabricate import affine, raw_case, save, write_folder
from tests.data_pipelines.test_dicom import dicom_slice
from tests.data_pipelines.test_layouts import write_nnunet
from tests.data_pipelines.test_names import write_segmentation
from tests.data_pipelines.test_places import stored_in
from tests.experiments.untrained_run import make_untrained_run, tiny_config

GRID = ("--data.preprocess.spacing-mm", "3", "1", "1", "--data.preprocess.size", "6", "16", "16")
FINE = "0.12 ml median"
"""What validate says of the lesion of the raw case where it is read as it was meant."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command on an input.

    Attributes:
        command: validate, build, predict or evaluate.
        options: of the command; FOLDER stands for the input's folder.
        status: exit status that is expected.
        says: part of what is printed.
        before: changes the input first.
    """

    command: str
    options: tuple[str, ...]
    status: int
    says: str
    before: Callable[[Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class Input:
    """An input by its name, how it is written, and what the commands make of it."""

    name: str
    write: Callable[[Path], object]
    steps: tuple[Step, ...]


def run(command: str, options: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command with this command line."""
    said = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch.object(sys, "argv", [command, *options]),
    ):
        try:
            if command in ("validate", "build"):
                program = {"validate": validate, "build": build}[command]
                command_line.run(
                    program.main, program.Arguments, module=command, description=command
                )
            run_main({"predict": predict, "evaluate": evaluate}[command].main)
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, " ".join(said.getvalue().split())


def data(status: int, says: str, *options: str, command="validate", before=None) -> Step:
    """A step on a data set, by default a folder of cases on the small grid."""
    defaults = ["--data.path=FOLDER/data", "--data.cache=FOLDER/cache", *GRID]
    if not any(option.startswith("--data.name") for option in options):
        defaults.append("--data.name=nifti_folder")
    if command == "validate":
        defaults += ["--output", "FOLDER/sheet"]
    return Step(command, (*defaults, *options), status, says, before)


def prediction(status: int, says: str, source="data", output="out", *options: str) -> Step:
    """A step that predicts with a small model of random weights."""
    paths = ("--input", f"FOLDER/{source}", "--output", f"FOLDER/{output}")
    fixed = ("--model", "MODEL", "--folds", "0", "--accelerator", "cpu")
    return Step("predict", (*fixed, *paths, *options), status, says)


def measured(status: int, says: str, predictions="pred", labels="labels", *options: str) -> Step:
    """A step that compares masks with labels."""
    return Step("evaluate", (f"FOLDER/{predictions}", f"FOLDER/{labels}", *options), status, says)


def case(root: Path, **changed: Volume | None) -> Path:
    """A case folder ``c0`` with some volumes replaced, added or (None) left out; returns it."""
    write_folder(root / "data", raw_case("c0"))
    folder = root / "data/c0"
    for name, volume in changed.items():
        path = folder / f"{name}.nii.gz"
        path.unlink(missing_ok=True)
        if volume is not None:
            save(path, volume)
    return folder


def t2w() -> Volume:
    return raw_case().images["t2w"]


def lesion() -> Volume:
    return Volume((raw_case().label.array > 0).astype(np.uint8), affine())


def gland(*stray: tuple[int, int, int]) -> Volume:
    mask = np.zeros(t2w().shape, np.uint8)
    mask[2:6, 6:17, 6:16] = 1
    for place in stray:
        mask[place] = 1
    return Volume(mask, affine())


def shifted(volume: Volume, *millimetres: float) -> Volume:
    matrix = volume.affine.copy()
    matrix[:3, 3] += millimetres
    return Volume(volume.array, matrix)


def picai(root: Path, label: Volume) -> None:
    for name, volume in raw_case().images.items():
        save(root / f"data/images/1/1_100_{name}.mha", volume)
    folder = root / "data/labels/csPCa_lesion_delineations/human_expert/resampled"
    save(folder / "1_100.nii.gz", label)


def nnunet(root: Path, *, labels: object = None, channels: object = None, **more: object) -> None:
    named = channels or {"0": "High_B", "1": "T2W", "2": "ADC"}
    description = {"channel_names": named, **({"labels": labels} if labels else {}), **more}
    write_nnunet(root / "data", raw_case("p0"), raw_case("p1", seed=1), description=description)


def decathlon(root: Path, values=(0, 1, 2), order=("T2", "ADC")) -> None:
    raw = t2w()
    adc = 3000 - raw.array
    both = {"T2": raw.array, "ADC": adc}
    zones = np.zeros(raw.shape, np.uint8)
    zones[2:6, 4:12, 6:18], zones[2:6, 12:20, 6:18] = 1, 2
    for folder in ("imagesTr", "labelsTr"):
        (root / "data" / folder).mkdir(parents=True)
    image = np.stack([both[name].T for name in order], -1)
    nib.save(nib.Nifti1Image(image, affine()), root / "data/imagesTr/prostate_00.nii.gz")
    save(
        root / "data/labelsTr/prostate_00.nii.gz",
        Volume(np.array(values, np.uint8)[zones], affine()),
    )
    description = {"modality": dict(enumerate(order)), "labels": {"0": "background"}}
    description["labels"] |= {"1": "PZ", "2": "TZ"}
    (root / "data/dataset.json").write_text(json.dumps(description), encoding="utf-8")


def header(path: Path, volume: Volume, after: bytes = b"", **fields: object) -> None:
    """A NIfTI file with header fields set and bytes after its voxels."""
    image = nib.Nifti1Image(volume.array.T, volume.affine)
    image.set_qform(volume.affine, 1)
    image.set_sform(volume.affine, 1)
    content = bytearray(image.to_bytes())
    view = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        view[0][name] = value
    path.write_bytes(gzip.compress(bytes(content) + after))


def scaled(path: Path, array: np.ndarray, dtype: type) -> None:
    image = nib.Nifti1Image(array.T.astype(np.float64), affine())
    image.set_data_dtype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def in_metres(root: Path, code: int, scale: float) -> None:
    folder = case(root)
    for name, volume in {**raw_case().images, "lesion": lesion()}.items():
        matrix = np.diag([scale, scale, scale, 1]) @ volume.affine
        header(folder / f"{name}.nii.gz", Volume(volume.array, matrix), xyzt_units=code)


def dicom(root: Path, change: Callable[[int], dict] = lambda k: {}) -> Path:
    folder = case(root, adc=None) / "adc"
    folder.mkdir()
    stored = np.random.default_rng(0).integers(500, 2500, (8, 24, 24)).astype(np.uint16)
    for k, plane in enumerate(stored):
        (folder / f"IM{k:03d}.dcm").write_bytes(dicom_slice(plane, k, affine(), **change(k)))
    return folder


def metaimage(root: Path, *, data_file="reader1.raw", packed_more: int | None = None) -> None:
    """A label in MetaImage: its voxels in another file, or packed behind the header."""
    folder = case(root, lesion=None)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine()
    size = np.linalg.norm(lps[:3, :3], axis=0)
    direction = " ".join(f"{x:.9f}" for x in (lps[:3, :3] / size).T.ravel())
    voxels = lesion().array.tobytes()
    packed = zlib.compress(voxels)
    local = packed_more is not None
    more = f"CompressedDataSize = {len(packed) + (packed_more or 0)}\n" if local else ""
    text = (
        f"NDims = 3\nBinaryData = True\nCompressedData = {local}\n{more}"
        f"TransformMatrix = {direction}\nOffset = {' '.join(map(str, lps[:3, 3]))}\n"
        "ElementSpacing = 1 1 3\nDimSize = 24 24 8\nElementType = MET_UCHAR\n"
        f"ElementDataFile = {'LOCAL' if local else data_file}\n"
    )
    if local:
        (folder / "lesion.mha").write_bytes(text.encode() + packed)
    else:
        (folder / "lesion.mhd").write_text(text, encoding="utf-8")
        (folder / data_file).write_bytes(voxels)


def emptied_with_its_time(path: Path, content: bytes) -> None:
    """Another content under the same time stamp, as ``rsync -t`` leaves it."""
    state = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))


def patients(root: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_folder(root / "data", raw_case(name, seed=seed))
    (root / "data/patients.csv").write_text("case,patient\na,02\nb,2\n", encoding="utf-8")


def two_folders(root: Path) -> None:
    for seed, patient in enumerate("AB"):
        write_folder(root / "data" / patient, raw_case("mri", seed=seed))


def links(root: Path) -> None:
    (root / "data").mkdir()
    for n in range(3):
        write_folder(root / f"archive/{n}", raw_case("mri", seed=n))
        (root / f"data/case_{n}").symlink_to(root / f"archive/{n}/mri")


def sheared(root: Path) -> None:
    matrix = affine()
    matrix[:3, 2] += [0, 0.4, 0]
    for name in ("t2w", "adc", "hbv", "labels"):
        path = root / ("labels/c0.nii.gz" if name == "labels" else f"data/c0/{name}.nii.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        array = lesion().array if name == "labels" else t2w().array
        image = nib.Nifti1Image(array.T, matrix)
        image.set_qform(None, 0)
        nib.save(image, path)


def pair(root: Path, prediction: Volume | None = None, label: Volume | None = None) -> None:
    save(root / "pred/c0.nii.gz", prediction or lesion())
    save(root / "labels/c0.nii.gz", label or lesion())


def also(*actions: Callable[[Path], object]) -> Callable[[Path], None]:
    """All of them, one after the other."""

    def all_of(root: Path) -> None:
        for action in actions:
            action(root)

    return all_of


GLAND = ("--data.preprocess.centre=gland",)
ABSENT = ("--data.allow-missing", "True")
ZONES = ("--data.name=msd_prostate", "--data.target=zones", "--data.modalities", "t2w", "adc")
PICAI = ("--data.name=picai",)
FRACTIONAL = ndimage.gaussian_filter(lesion().array.astype(np.float32), 1)
PERCENT = (np.arange(8 * 24 * 24) % 101).reshape(8, 24, 24).astype(np.uint8)

INPUTS: tuple[Input, ...] = (
    Input("a plain case", case, (data(0, FINE), data(0, "1 with lesion", command="build"))),
    # Geometry
    Input(
        "PI-CAI label in another orientation, 1.5 mm off",
        lambda r: picai(r, shifted(stored_in(lesion(), "LPS"), 1.5, 0, 0)),
        (data(0, f"{FINE}", *PICAI), data(0, "1 with lesion", *PICAI, command="build")),
    ),
    Input(
        "PI-CAI label on T2W's axes with another origin",
        lambda r: picai(r, shifted(lesion(), 0, 0, 40)),
        (data(0, "replaced by", *PICAI),),
    ),
    Input(
        "label stored without its header",
        lambda r: case(r, lesion=Volume(lesion().array, np.eye(4))),
        (data(2, "'label' must say where"),),
    ),
    Input(
        "label of which most lies outside its image",
        lambda r: case(r, lesion=shifted(lesion(), 14, 0, 0)),
        (data(2, "60% of the"),),
    ),
    Input(
        "gland mask with a stray voxel",
        lambda r: case(r, gland=gland((0, 0, 0))),
        (data(0, "got 2, the largest of 1.32 ml", *GLAND),),
    ),
    Input(
        "gland mask outside the image",
        lambda r: case(r, gland=shifted(gland(), 18, 0, 0)),
        (data(2, "of it outside", *GLAND),),
    ),
    Input(
        "sheared T2W: masks in one place",
        sheared,
        (prediction(0, "1 of 1 cases predicted"), measured(0, "lesion", "out/masks")),
    ),
    Input("NIfTI in metres", lambda r: in_metres(r, 1, 1e-3), (data(0, FINE),)),
    Input("NIfTI in microns", lambda r: in_metres(r, 3, 1e3), (data(0, FINE),)),
    Input(
        "NIfTI in millimetres that says metres",
        lambda r: header(case(r) / "t2w.nii.gz", t2w(), xyzt_units=1),
        (data(2, "the metre"), prediction(4, "whose unit is the metre")),
    ),
    # DICOM
    Input(
        "DICOM, another rescale slope in the first slice",
        lambda r: dicom(r, lambda k: {"slope": b"1" if k else b"1.001"}),
        (data(0, FINE),),
    ),
    Input(
        "DICOM, an empty file among the slices",
        lambda r: (dicom(r) / "IM007.dcm").write_bytes(b""),
        (data(2, "IM007.dcm (0 bytes"), prediction(4, "IM007.dcm (0 bytes")),
    ),
    Input(
        "DICOM, more rows than pixels",
        lambda r: dicom(r, lambda k: {"rows": struct.pack("<H", 48)}),
        (data(2, "1152 bytes of pixels"), prediction(4, "1152 bytes of pixels")),
    ),
    Input(
        "DICOM, 20000 rows and columns",
        lambda r: dicom(
            r, lambda k: {"rows": struct.pack("<H", 20000), "columns": struct.pack("<H", 20000)}
        ),
        (data(2, "got 20000 x 20000"), prediction(4, "got 20000 x 20000")),
    ),
    Input(
        "DICOM, one slice with another spacing",
        lambda r: dicom(r, lambda k: {"spacing": b"1.5\\1.5"} if k == 4 else {}),
        (data(2, "another PixelSpacing"),),
    ),
    # Who is who
    Input(
        "two patients whose folders have one name",
        two_folders,
        (
            prediction(0, "1 of 1 cases", "data/A/mri"),
            prediction(4, "must not replace that of other images", "data/B/mri"),
            prediction(0, "2 of 2 cases predicted", "data", "both"),
        ),
    ),
    Input(
        "links to case folders",
        links,
        (prediction(0, "3 of 3 cases predicted"), data(0, "cases 3 of 3")),
    ),
    Input(
        "results within the input, twice",
        case,
        (
            prediction(0, "1 of 1 cases predicted", "data", "data/out", "--attention"),
            prediction(0, "1 of 1 cases predicted", "data", "data/out", "--attention"),
        ),
    ),
    Input("a patient as 02 and 2", patients, (data(2, "got 02, 2"),)),
    # Names and tables
    Input(
        "nnU-Net, the label ignore",
        lambda r: nnunet(r, labels={"background": 0, "csPCa lesion": 1, "ignore": 2}),
        (data(2, "got ignore"),),
    ),
    Input(
        "nnU-Net, an unknown organ",
        lambda r: nnunet(r, labels={"background": 0, "rectum": 1}),
        (data(2, "got rectum"),),
    ),
    Input(
        "nnU-Net, a region",
        lambda r: nnunet(r, labels={"background": 0, "lesion": [1, 2]}),
        (data(2, "got the region lesion"),),
    ),
    Input(
        "nnU-Net, a list of training cases",
        lambda r: nnunet(
            r,
            training=[{"image": "./imagesTr/p0.nii.gz", "label": "./labelsTr/p0.nii.gz"}],
            numTraining=1,
        ),
        (data(0, "cases 1 of 1"),),
    ),
    Input(
        "Decathlon, channels in another order",
        lambda r: decathlon(r, order=("ADC", "T2")),
        (data(0, "errors: 0", *ZONES),),
    ),
    Input(
        "Decathlon, one zone alone",
        lambda r: decathlon(r, values=(0, 0, 1)),
        (data(0, "got only value 1", *ZONES),),
    ),
    Input(
        "a second finding",
        lambda r: case(r, lesion_2=lesion()),
        (data(0, "got lesion_2.nii.gz"),),
    ),
    Input(
        "dwi beside hbv",
        lambda r: case(r, dwi=raw_case(seed=3).images["hbv"]),
        (data(0, "got dwi.nii.gz"), prediction(0, "1 of 1 cases predicted")),
    ),
    Input(
        "modalities in capitals, by alias and by comma",
        case,
        (
            data(0, FINE, "--data.modalities", "T2W", "ADC", "HBV"),
            data(0, FINE, "--data.modalities", "t2", "adc", "dwi"),
            data(0, FINE, "--data.modalities", "t2w,adc"),
        ),
    ),
    Input(
        "no case has ADC",
        lambda r: nnunet(r, channels={"0": "High_B", "1": "T2W", "2": "CT"}),
        (data(2, "got no 'adc'"), data(2, "got no 'adc' in any of 2", *ABSENT)),
    ),
    Input(
        "a case made of segmentations",
        lambda r: [save(r / f"data/c0/seg_{m}.nii.gz", lesion()) for m in ("t2w", "adc", "hbv")],
        (prediction(2, "found none in"),),
    ),
    # Other headers
    Input(
        "MetaImage with a wrong packed size",
        lambda r: metaimage(r, packed_more=-20),
        (data(2, "CompressedDataSize"),),
    ),
    Input(
        "MetaImage with voxels outside its folder",
        lambda r: metaimage(r, data_file="../reader1.raw"),
        (data(2, "got '../reader1.raw'"),),
    ),
    Input(
        "MetaImage whose detached voxels are edited",
        metaimage,
        (
            data(0, "1 cases, 1 with lesion", command="build"),
            data(
                0,
                "1 cases, 0 with lesion",
                command="build",
                before=lambda r: emptied_with_its_time(
                    r / "data/c0/reader1.raw", bytes(lesion().array.size)
                ),
            ),
        ),
    ),
    Input(
        "a label edited within one time stamp",
        lambda r: header(case(r) / "lesion.nii.gz", lesion()),
        (
            data(0, "1 cases, 1 with lesion", command="build"),
            data(
                0,
                "1 cases, 0 with lesion",
                command="build",
                before=lambda r: emptied_with_its_time(
                    r / "data/c0/lesion.nii.gz",
                    gzip.compress(
                        nib.Nifti1Image(np.zeros((24, 24, 8), np.uint8), affine()).to_bytes()
                    ),
                ),
            ),
        ),
    ),
    # Evaluation
    Input(
        "evaluate: fractional label",
        lambda r: pair(r, label=Volume(FRACTIONAL, affine())),
        (measured(2, "the label c0.nii.gz: label values must be whole numbers"),),
    ),
    Input(
        "evaluate: probabilities in percent",
        lambda r: pair(r, prediction=Volume(PERCENT, affine())),
        (measured(2, "must hold 0 and one other value"),),
    ),
    Input(
        "evaluate: scaled masks and labels",
        lambda r: [
            scaled(r / f / "c0.nii.gz", lesion().array, np.int16) for f in ("pred", "labels")
        ],
        (measured(0, "1 of 1 cases positive, 0 missed"),),
    ),
    Input(
        "evaluate: files of a Mac",
        also(pair, lambda r: (r / "labels/._c0.nii.gz").write_bytes(b"Mac OS X")),
        (measured(0, "1 of 1 cases positive, 0 missed"),),
    ),
    Input(
        "evaluate: one grid in two orientations",
        lambda r: pair(r, label=stored_in(lesion(), "PIL")),
        (measured(0, "1 of 1 cases positive, 0 missed"),),
    ),
    # What others read
    Input(
        "a label that nibabel scaled",
        lambda r: scaled(case(r) / "lesion.nii.gz", lesion().array, np.uint8),
        (data(0, FINE),),
    ),
    Input(
        "a quaternion above 1",
        lambda r: header(case(r) / "t2w.nii.gz", t2w(), quatern_b=1.000001),
        (data(0, FINE), prediction(0, "1 of 1 cases predicted")),
    ),
    Input(
        "bytes after the voxels",
        lambda r: header(case(r) / "t2w.nii.gz", t2w(), after=bytes(512)),
        (data(0, FINE), prediction(0, "1 of 1 cases predicted")),
    ),
    Input(
        "a segmentation of 3D Slicer",
        lambda r: write_segmentation(
            case(r, lesion=None) / "lesion.seg.nrrd", lesion().array, {"lesion": 1}
        ),
        (data(0, FINE),),
    ),
    # What was right and stays so
    Input(
        "grades as values, 255 as value",
        lambda r: case(r, lesion=Volume(lesion().array * np.uint8(255), affine())),
        (data(0, FINE),),
    ),
    Input(
        "every file in another orientation",
        lambda r: case(
            r,
            **{
                name: stored_in(volume, axes)
                for (name, volume), axes in zip(
                    (*raw_case().images.items(), ("lesion", lesion())),
                    ("LPS", "PIR", "SAL", "ILA"),
                    strict=True,
                )
            },
        ),
        (data(0, FINE), prediction(0, "1 of 1 cases predicted")),
    ),
)


def results(folder: Path, names: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
    """Name of each input and step, what was expected and what came."""
    model = folder / "model"
    config = tiny_config()
    modalities = dataclasses.replace(config.data, modalities=("t2w", "adc", "hbv"))
    make_untrained_run(model, complete(dataclasses.replace(config, data=modalities)), done=1)
    for number, each in enumerate(INPUTS):
        if names and not any(name in each.name for name in names):
            continue
        root = folder / f"{number:02d}"
        root.mkdir()
        each.write(root)
        for step in each.steps:
            if step.before is not None:
                step.before(root)
            options = [
                option.replace("FOLDER", str(root)).replace("MODEL", str(model))
                for option in step.options
            ]
            status, said = run(step.command, options)
            heard = step.says if step.says in said else f"{said[-300:]}"
            yield (
                f"{each.name}: {step.command}",
                f"{step.status}, {step.says}",
                f"{status}, {heard}",
            )
        shutil.rmtree(root)


def main(folder: Path, names: Sequence[str]) -> int:
    """Print the table; 0 if all came as expected."""
    unequal = 0
    for name, expected, came in results(folder, names):
        unequal += expected != came
        print(f"{'ok ' if expected == came else 'NOT'}  {name:<62}  {expected:<58}  {came}")
    print(f"{unequal} of the rows came otherwise")
    return int(unequal > 0)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    sys.exit(main(target.resolve(), sys.argv[2:]))
