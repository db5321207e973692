"""Pictures of cases: the slice that tells most, and a viewer through all of them."""

import base64
import dataclasses
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import PIL.Image
from markupsafe import Markup

from experiments.metrics import Row
from experiments.wording import Drawing, class_label, number, volume


@dataclasses.dataclass(frozen=True)
class Picture:
    """The slice of one case that is shown, panel by panel."""

    title: str
    caption: str
    columns: int
    panels: Sequence[Drawing]


def pictures_of(run_dir: Path, metrics: Mapping[str, Any], classes: Sequence[str]) -> list[Picture]:
    """One picture of each case that ``choose_cases`` names."""
    return [
        _picture(file, title, rows, classes, metrics)
        for file, title, rows in _chosen(run_dir, metrics)
    ]


def _chosen(run_dir: Path, metrics: Mapping[str, Any]) -> list[tuple[Path, str, Sequence[Row]]]:
    """File, title and rows of each case to show."""
    files = {file.stem: file for file in run_dir.glob("fold_*/figures/*.npz")}
    rows: dict[str, list[Row]] = {}
    for row in metrics["metric_per_case"]:
        rows.setdefault(row["case_id"], []).append(row)
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
        worst = max(
            negatives, key=lambda case: sum(row["volume_predicted_ml"] for row in rows[case])
        )
        chosen[worst] = "Negative, most false positives of the cases pictured"
    return chosen


def _case_dice(rows: Sequence[Row]) -> float | None:
    """Mean over the classes that the case holds."""
    dice = [row["dice"] for row in rows if row["dice"] is not None]
    return float(np.mean(dice)) if dice else None


def _picture(
    file: Path,
    title: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    metrics: Mapping[str, Any],
) -> Picture:
    with np.load(file, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    truth = data["truth"]
    foreground, mask = _foreground(data["probability"], len(classes), metrics.get("threshold", 0.5))
    index = slice_to_show(truth, mask, foreground)
    spacing = data["spacing_mm"][1:]
    outlines = [
        *_outlines(truth[index], "truth", len(classes)),
        *_outlines(mask[index], "prediction", len(classes)),
    ]
    modalities = [str(name) for name in data["modalities"]]
    panels = [
        _panel(name.upper(), _grey(data["image"][index, ..., m]), spacing, outlines)
        for m, name in enumerate(modalities)
    ]
    panels.append(
        _panel("Probability", _colored(foreground[index], "magma", 1.0), spacing, outlines)
    )
    if "attention" in data:
        truth_only = _outlines(truth[index], "truth", len(classes))
        height, width = truth.shape[1:]
        for m, name in enumerate(modalities):
            stage = data["attention"].shape[-1] - 1
            coarse = data["attention"][index, ..., m, stage].astype(np.float32)
            attention = _enlarge(coarse, height, width)
            image = _colored(attention, "viridis", float(attention.max()))
            title_of = f"Attention {name.upper()}, stage {stage}"
            panels.append(_panel(title_of, image, spacing, truth_only))
    return Picture(
        title, f"{_caption(rows)}; slice {index + 1} of {len(truth)}", len(modalities) + 1, panels
    )


def _caption(rows: Sequence[Row]) -> str:
    """What was measured on a case, and its fold."""
    scores = ", ".join(
        f"{class_label(row['class'])} Dice {number(row['dice'], 'dice')}"
        if row["dice"] is not None
        else f"no {class_label(row['class'])}, {volume(row['volume_predicted_ml'])} predicted"
        for row in rows
    )
    fold = rows[0]["fold"]
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
    """uint8 ``h w 3`` between the 1st and 99.5th percentile of what is inside the field of view."""
    image = image.astype(np.float32)
    inside = image[image != 0]
    if not inside.size:
        return np.zeros((*image.shape, 3), np.uint8)
    low, high = np.percentile(inside, (1, 99.5))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((255 * scaled).astype(np.uint8)[..., None], 3, -1)


def _colored(image: np.ndarray, colormap: str, largest: float) -> np.ndarray:
    """uint8 ``h w 3``: 0 to ``largest`` in a colormap."""
    scaled = np.clip(image / max(largest, 1e-12), 0, 1)
    return (255 * matplotlib.colormaps[colormap](scaled)[..., :3]).astype(np.uint8)


def _panel(
    title: str, image: np.ndarray, spacing_mm: np.ndarray, outlines: Sequence[tuple[str, str]]
) -> Drawing:
    """A slice (``h w 3``) in its physical proportions with outlines on it, as SVG."""
    height, width = image.shape[:2]
    dy, dx = (float(step) for step in spacing_mm)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.ascontiguousarray(_radiological(image)), format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
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
            f'preserveAspectRatio="none" href="data:image/png;base64,{encoded}"/>{paths}</svg>'
        ),
    )


# The viewer: every slice of a case, each layer one grey picture with the slices below each other --


def viewer_of(
    run_dir: Path, metrics: Mapping[str, Any], classes: Sequence[str]
) -> dict[str, Any] | None:
    """What ``report_viewer.js`` needs: the cases' layers and the colour maps; None without cases.

    Cases that would make the page larger than ``VIEWER_BYTES`` are left out, the first one never.
    """
    cases: list[dict[str, Any]] = []
    size, left_out = 0, 0
    for file, title, rows in _chosen(run_dir, metrics):
        case = _viewer_case(file, title, rows, classes, metrics)
        size += sum(len(uri) for uri in _uris(case["layers"]))
        if cases and size > VIEWER_BYTES:
            left_out += 1
            continue
        cases.append(case)
    if not cases:
        return None
    return {
        "cases": cases,
        "classes": [class_label(name) for name in classes],
        "colormaps": {name: _lookup(name) for name in ("magma", "viridis")},
        "left_out": left_out,
    }


VIEWER_BYTES = 11_000_000


def _uris(layers: Any) -> list[str]:
    if isinstance(layers, str):
        return [layers]
    values = layers.values() if isinstance(layers, Mapping) else layers
    return [uri for value in values for uri in _uris(value)]


def _viewer_case(
    file: Path,
    title: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    truth = data["truth"]
    foreground, mask = _foreground(data["probability"], len(classes), metrics.get("threshold", 0.5))
    index = slice_to_show(truth, mask, foreground)
    modalities = [str(name) for name in data["modalities"]]
    layers: dict[str, Any] = {
        "images": {
            name: _sprite(_grey(data["image"][..., m])[..., 0], lossy=True)
            for m, name in enumerate(modalities)
        },
        "truth": _sprite(truth),
        "prediction": _sprite(mask),
        "probability": _sprite(np.round(255 * foreground)),
        "attention": {},
    }
    if "attention" in data:
        layers["attention"] = {
            name: [
                _sprite(data["attention"][..., m, stage])
                for stage in range(data["attention"].shape[-1])
            ]
            for m, name in enumerate(modalities)
        }
    return {
        "title": title,
        "caption": _caption(rows),
        "shape": list(truth.shape),
        "spacing_mm": [float(step) for step in data["spacing_mm"]],
        "slice": index,
        "layers": layers,
    }


def _sprite(volume_8bit: np.ndarray, *, lossy: bool = False) -> str:
    """Data URI of ``d h w`` values 0 to 255, slices below each other; large images as JPEG."""
    flipped = np.ascontiguousarray(volume_8bit[:, ::-1, ::-1].astype(np.uint8))
    image = PIL.Image.fromarray(flipped.reshape(-1, flipped.shape[-1]))
    buffer = io.BytesIO()
    kind = "jpeg" if lossy and flipped.size > 200_000 else "png"
    image.save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _lookup(colormap: str) -> list[list[int]]:
    """256 colours."""
    return (
        np.round(255 * matplotlib.colormaps[colormap](np.arange(256))[:, :3]).astype(int).tolist()
    )
