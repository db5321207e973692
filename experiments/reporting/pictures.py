"""Pictures of cases: the slice that tells most, and a viewer through all of them.

Both keep to the bytes they are given: where a grid is too large for them, it is thinned in plane.
"""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import matplotlib
import numpy as np
import PIL.Image
from markupsafe import Markup

from experiments.measuring.rows import Row
from experiments.reporting.wording import Drawing, class_label, number, volume
from experiments.run_folder import Results, RunFolder


@dataclasses.dataclass(frozen=True)
class Picture:
    """The slice of one case that is shown, panel by panel."""

    title: str
    caption: str
    columns: int
    panels: Sequence[Drawing]


@dataclasses.dataclass(frozen=True)
class _Case:
    """What a run kept of a case, on the reference grid or on every n-th voxel of it in plane."""

    title: str
    caption: str
    modalities: Sequence[str]
    images: np.ndarray  # d h w m
    truth: np.ndarray  # d h w
    mask: np.ndarray  # d h w
    foreground: np.ndarray  # d h w
    attention: np.ndarray | None  # d h w m s, with an h and a w of its own
    spacing_mm: Sequence[float]
    index: int  # of the slice that tells most


def pictures_of(
    run: RunFolder, results: Results, classes: Sequence[str], limit_bytes: int
) -> list[Picture]:
    """One picture of each case that ``choose_cases`` names, smaller ones if they need too much."""
    side = PANEL_SIDE
    while True:
        pictures = [
            _picture(_read_case(*chosen, classes, results.threshold), len(classes), side)
            for chosen in _chosen(run, results)
        ]
        size = sum(len(panel.svg.encode()) for each in pictures for panel in each.panels)
        if size <= limit_bytes or side == 1:
            return pictures
        side //= 2


PANEL_SIDE = 384  # pixels: a panel is at most 260 wide, on many screens of two pixels each


def _chosen(run: RunFolder, results: Results) -> list[tuple[Path, str, Sequence[Row]]]:
    """File, title and rows of each case to show."""
    rows: dict[str, list[Row]] = {}
    for row in results.summary.metric_per_case:
        rows.setdefault(row.case_id, []).append(row)
    files: dict[str, Path] = {}
    for case_id, (first, *_) in rows.items():
        if first.fold is not None and (file := run.fold(first.fold).figure(case_id)).is_file():
            files[case_id] = file
    return [
        (files[case], f"{role}: {case}", rows[case])
        for case, role in choose_cases(rows, files.keys() & rows.keys()).items()
    ]


def choose_cases(rows: Mapping[str, Sequence[Row]], pictured: Collection[str]) -> dict[str, str]:
    """Which pictured cases to show, and why: best, median, worst, and a negative one.

    Best, median and worst are by Dice (its mean over the classes that a case holds); the role
    says so if a case that was not pictured would be the better choice. The negative case is the
    pictured one with most false-positive volume.
    """
    dice = {case: _case_dice(members) for case, members in sorted(rows.items())}
    positives = {case: score for case, score in dice.items() if score is not None}
    shown = {case: score for case, score in positives.items() if case in pictured}
    negatives = [case for case in dice if case in pictured and case not in positives]
    chosen: dict[str, str] = {}
    if shown:
        ordered = np.sort(list(positives.values()))
        wanted = {"Best": ordered[-1], "Worst": ordered[0], "Median": ordered[len(ordered) // 2]}
        for role, score in wanted.items():
            case = min(shown, key=lambda case, score=score: abs(shown[case] - score))
            exact = shown[case] == score
            chosen.setdefault(case, role if exact else f"{role} of the cases pictured")
        chosen = dict(sorted(chosen.items(), key=lambda item: -shown[item[0]]))
    if negatives:
        worst = max(negatives, key=lambda case: sum(row.volume_predicted_ml for row in rows[case]))
        chosen[worst] = "Negative, most false positives of the cases pictured"
    return chosen


def _case_dice(rows: Sequence[Row]) -> float | None:
    """Mean over the classes that the case holds."""
    dice = [row.dice for row in rows if row.dice is not None]
    return float(np.mean(dice)) if dice else None


def _read_case(
    file: Path,
    title: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    threshold: float | None,
) -> _Case:
    with np.load(file, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    foreground, mask = _foreground(
        data["probability"], len(classes), 0.5 if threshold is None else threshold
    )
    return _Case(
        title=title,
        caption=_caption(rows),
        modalities=[str(name) for name in data["modalities"]],
        images=data["image"],
        truth=data["truth"],
        mask=mask,
        foreground=foreground,
        attention=data.get("attention"),
        spacing_mm=[float(step) for step in data["spacing_mm"]],
        index=slice_to_show(data["truth"], mask, foreground),
    )


def _thinned(case: _Case, step: int) -> _Case:
    """The case on a grid ``step`` times as coarse in plane: means of images, every n-th label."""
    if step == 1:
        return case
    dz, dy, dx = case.spacing_mm
    truth, attention = _block_centres(case.truth, step), case.attention
    if attention is not None:
        sides = attention.shape[1:3]
        finer = max(-(-side // room) for side, room in zip(sides, truth.shape[1:], strict=True))
        attention = _block_means(attention, min(finer, *sides))
    return dataclasses.replace(
        case,
        caption=f"{case.caption}; shown at 1/{step} of the resolution in plane",
        images=_block_means(case.images, step),
        truth=truth,
        mask=_block_centres(case.mask, step),
        foreground=_block_means(case.foreground, step),
        attention=attention,
        spacing_mm=(dz, dy * step, dx * step),
    )


def _block_means(volume: np.ndarray, step: int) -> np.ndarray:
    """Means over blocks of ``step`` x ``step`` voxels; what fills no block at the end is cut."""
    depth, height, width = volume.shape[0], volume.shape[1] // step, volume.shape[2] // step
    whole = volume[:, : height * step, : width * step]
    blocks = whole.reshape(depth, height, step, width, step, *volume.shape[3:])
    return blocks.mean((2, 4), dtype=np.float32)


def _block_centres(volume: np.ndarray, step: int) -> np.ndarray:
    """The voxel in the middle of each of the blocks of ``_block_means``."""
    height, width = volume.shape[1] // step, volume.shape[2] // step
    return volume[:, step // 2 :: step, step // 2 :: step][:, :height, :width]


def _one_slice(case: _Case) -> _Case:
    """The case without its other slices."""
    kept = slice(case.index, case.index + 1)
    arrays = {name: getattr(case, name)[kept] for name in ("images", "truth", "mask", "foreground")}
    attention = None if case.attention is None else case.attention[kept]
    return dataclasses.replace(case, attention=attention, index=0, **arrays)


def _picture(case: _Case, num_classes: int, side: int) -> Picture:
    """The slice that tells most, at most ``side`` pixels wide and high."""
    depth, *plane = case.truth.shape
    number_of_slice = f"slice {case.index + 1} of {depth}"
    case = _thinned(_one_slice(case), min(-(-max(plane) // side), *plane))
    truth_only = _outlines(case.truth[0], "truth", num_classes)
    outlines = [*truth_only, *_outlines(case.mask[0], "prediction", num_classes)]
    spacing = case.spacing_mm[1:]
    panels = [
        _panel(name.upper(), _grey(case.images[0, ..., m]), spacing, outlines)
        for m, name in enumerate(case.modalities)
    ]
    panels.append(
        _panel("Probability", _colored(case.foreground[0], "magma", 1.0), spacing, outlines)
    )
    if case.attention is not None:
        stage = case.attention.shape[-1] - 1
        for m, name in enumerate(case.modalities):
            coarse = case.attention[0, ..., m, stage].astype(np.float32)
            attention = _enlarge(coarse, *case.truth.shape[1:])
            image = _colored(attention, "viridis", float(attention.max()))
            title_of = f"Attention {name.upper()}, stage {stage}"
            panels.append(_panel(title_of, image, spacing, truth_only))
    return Picture(
        case.title, f"{case.caption}; {number_of_slice}", len(case.modalities) + 1, panels
    )


def _caption(rows: Sequence[Row]) -> str:
    """What was measured on a case, and its fold."""
    scores = ", ".join(
        f"{class_label(row.name)} Dice {number(row.dice)}"
        if row.dice is not None
        else f"no {class_label(row.name)}, {volume(row.volume_predicted_ml)} predicted"
        for row in rows
    )
    fold = rows[0].fold
    return scores if fold is None else f"{scores}; fold {fold}"


def _enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbours, for a picture of ``height`` and ``width``."""
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    return image[rows][:, columns]


def _foreground(
    probability: np.ndarray, num_classes: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of any foreground and the predicted classes, both ``d h w``.

    ``probability`` is ``d h w``, ``d h w 1``, or ``d h w k`` with background first.
    """
    probability = probability.astype(np.float32)
    if num_classes > 1:
        return 1 - probability[..., 0], probability.argmax(-1)
    if probability.ndim == 4:
        probability = probability[..., 0]
    return probability, (probability > threshold).astype(np.uint8)


def slice_to_show(truth: np.ndarray, mask: np.ndarray, probability: np.ndarray) -> int:
    """Slice with most truth, else with most prediction, else with the largest probability."""
    for found in (truth > 0, mask > 0):
        if found.any():
            return int(found.sum((1, 2)).argmax())
    return int(probability.max((1, 2)).argmax())


def _outlines(labels: np.ndarray, kind: str, num_classes: int) -> list[tuple[str, str]]:
    """SVG path (in voxels) around every class, along the voxel edges."""
    return [
        (kind, path)
        for label in range(1, num_classes + 1)
        if (path := outline(_radiological(labels == label)))
    ]


def outline(mask: np.ndarray) -> str:
    """SVG path along the voxel edges between foreground and background of a bool ``h w``."""
    padded = np.pad(mask, 1).astype(np.int8)
    rows, columns = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
    path = [f"M{x} {y}h1" for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(np.diff(padded, axis=1)[1:-1])
    return "".join([*path, *(f"M{x} {y}v1" for y, x in zip(rows, columns, strict=True))])


def _radiological(array: np.ndarray) -> np.ndarray:
    """Reference-grid slice (``h`` to anterior, ``w`` to the right) as radiologists look at it.

    Anterior is up, and the patient's right on the left of the picture.
    """
    return array[::-1, ::-1]


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 between the 1st and 99.5th percentile of what is inside the field of view."""
    image = image.astype(np.float32)
    inside = image[image != 0]
    if not inside.size:
        return np.zeros(image.shape, np.uint8)
    low, high = np.percentile(inside, (1, 99.5))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return (255 * scaled).astype(np.uint8)


def _colored(image: np.ndarray, colormap: str, largest: float) -> np.ndarray:
    """uint8 ``h w 3``: 0 to ``largest`` in a colormap."""
    scaled = np.clip(image / max(largest, 1e-12), 0, 1)
    return (255 * matplotlib.colormaps[colormap](scaled)[..., :3]).astype(np.uint8)


def _panel(
    title: str, image: np.ndarray, spacing_mm: Sequence[float], outlines: Sequence[tuple[str, str]]
) -> Drawing:
    """A slice (``h w`` or ``h w 3``) in its physical proportions with outlines on it, as SVG."""
    height, width = image.shape[:2]
    dy, dx = spacing_mm
    uri = _data_uri(_radiological(image), "png")
    paths = "".join(
        f'<path class="{kind}" transform="scale({dx:g} {dy:g})" d="{path}"/>'
        for kind, path in outlines
    )
    size = f"{width * dx:g} {height * dy:g}"
    return Drawing(
        title,
        Markup(
            f'<svg class="panel" role="img" aria-label="{Markup.escape(title)}" '
            f'viewBox="0 0 {size}"><image width="{width * dx:g}" height="{height * dy:g}" '
            f'preserveAspectRatio="none" href="{uri}"/>{paths}</svg>'
        ),
    )


def _data_uri(image: np.ndarray, kind: str) -> str:
    """A uint8 image, grey or coloured, as png or jpeg."""
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(np.ascontiguousarray(image))
    if kind == "jpeg":
        picture.save(buffer, kind, quality=85)
    else:
        picture.save(buffer, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# The viewer: every slice of a case, each layer one grey picture with the slices side by side ------


class Layers(TypedDict):
    """Pictures of a case, as data URIs: slices side by side in each."""

    images: dict[str, str]
    truth: str
    prediction: str
    probability: str
    attention: dict[str, list[str]]


class ViewerCase(TypedDict):
    """A case as ``report_viewer.js`` reads it."""

    title: str
    caption: str
    shape: list[int]
    columns: int
    spacing_mm: list[float]
    slice: int
    layers: Layers


class Viewer(TypedDict):
    """What ``report_viewer.js`` reads."""

    cases: list[ViewerCase]
    classes: list[str]
    colormaps: dict[str, list[list[int]]]
    left_out: int


def viewer_of(
    run: RunFolder, results: Results, classes: Sequence[str], limit_bytes: int
) -> Viewer | None:
    """What ``report_viewer.js`` needs: the cases' layers and the colour maps; None without cases.

    The cases share ``limit_bytes``. One that exceeds its part is thinned in plane, and left out
    where that does not suffice.
    """
    chosen = _chosen(run, results)
    if not chosen:
        return None
    colormaps = {name: _lookup(name) for name in ("magma", "viridis")}
    room = limit_bytes - _json_bytes(colormaps)
    cases: list[ViewerCase] = []
    for position, each in enumerate(chosen):
        share = room // (len(chosen) - position)
        case = _case_within(_read_case(*each, classes, results.threshold), share)
        if case is not None:
            cases.append(case)
            room -= _json_bytes(case)
    return {
        "cases": cases,
        "classes": [class_label(name) for name in classes],
        "colormaps": colormaps,
        "left_out": len(chosen) - len(cases),
    }


def _json_bytes(value: object) -> int:
    return len(json.dumps(value))


def _case_within(case: _Case, limit_bytes: int) -> ViewerCase | None:
    """The case as the viewer needs it, thinned in plane until it fits; None if it never does."""
    depth, height, width = case.truth.shape
    for step in range(1, min(height, width) + 1):
        if _fits_browsers(depth, height // step, width // step):
            shown = _viewer_case(_thinned(case, step))
            if _json_bytes(shown) <= limit_bytes:
                return shown
    return None


# What a canvas holds in every browser: Safari on a phone has the least area.
CANVAS_PIXELS = 2**24
CANVAS_SIDE = 2**14


def _fits_browsers(depth: int, height: int, width: int) -> bool:
    """Whether a sprite of that many slices can be read back from a canvas."""
    columns = _columns(depth)
    height, width = -(-depth // columns) * height, columns * width
    return height * width <= CANVAS_PIXELS and max(height, width) <= CANVAS_SIDE


def _columns(depth: int) -> int:
    """Slices side by side in a sprite."""
    return math.isqrt(depth - 1) + 1


def _viewer_case(case: _Case) -> ViewerCase:
    layers: Layers = {
        "images": {
            name: _sprite(_grey(case.images[..., m]), lossy=True)
            for m, name in enumerate(case.modalities)
        },
        "truth": _sprite(case.truth),
        "prediction": _sprite(case.mask),
        "probability": _sprite(np.round(255 * case.foreground), lossy=True),
        "attention": {},
    }
    if case.attention is not None:
        layers["attention"] = {
            name: [
                _sprite(case.attention[..., m, stage], lossy=True)
                for stage in range(case.attention.shape[-1])
            ]
            for m, name in enumerate(case.modalities)
        }
    return {
        "title": case.title,
        "caption": case.caption,
        "shape": list(case.truth.shape),
        "columns": _columns(len(case.truth)),
        "spacing_mm": list(case.spacing_mm),
        "slice": case.index,
        "layers": layers,
    }


def _sprite(volume_8bit: np.ndarray, *, lossy: bool = False) -> str:
    """Data URI of ``d h w`` values 0 to 255, slices row by row in a grid; large images as JPEG."""
    depth, height, width = volume_8bit.shape
    columns = _columns(depth)
    rows = -(-depth // columns)
    grid = np.zeros((rows * columns, height, width), np.uint8)
    grid[:depth] = volume_8bit[:, ::-1, ::-1]
    sheet = grid.reshape(rows, columns, height, width).swapaxes(1, 2)
    kind = "jpeg" if lossy and grid.size > 200_000 else "png"
    return _data_uri(sheet.reshape(rows * height, columns * width), kind)


def _lookup(colormap: str) -> list[list[int]]:
    """256 colours."""
    return (
        np.round(255 * matplotlib.colormaps[colormap](np.arange(256))[:, :3]).astype(int).tolist()
    )
