"""Pictures of cases for paper and for pages without JavaScript: the slice that tells most.

They keep to the bytes they are given: where a grid is too large for them, it is thinned in plane.
"""

import base64
import dataclasses
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from markupsafe import Markup

from experiments.measuring.rows import Row
from experiments.reporting.views import View, read_view
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
class KeptCase:
    """A case of which the run kept what pictures are drawn from.

    Attributes:
        file: as ``experiments.reporting.figures.save_figure`` wrote it.
        rows: one for each class.
    """

    file: Path
    rows: Sequence[Row]

    def view(self, title: str, num_classes: int, threshold: float | None) -> View:
        """The case on the grid of its T2W file."""
        return read_view(self.file, title, caption_of(self.rows), num_classes, threshold)


def kept_cases(run: RunFolder, results: Results) -> dict[str, KeptCase]:
    """The cases whose pictures the run kept, by name: the worst first.

    First those that hold the target by their Dice, then the others by what is falsely predicted.
    """
    rows: dict[str, list[Row]] = {}
    for row in results.summary.metric_per_case:
        rows.setdefault(row.case_id, []).append(row)
    kept: dict[str, KeptCase] = {}
    for case_id, members in rows.items():
        fold = members[0].fold
        if fold is not None and (file := run.fold(fold).figure(case_id)).is_file():
            kept[case_id] = KeptCase(file, members)

    def rank(case_id: str) -> tuple[bool, float, str]:
        dice = _case_dice(kept[case_id].rows)
        false = sum(row.false_positive_volume_ml for row in kept[case_id].rows)
        return dice is None, -false if dice is None else dice, case_id

    return {case_id: kept[case_id] for case_id in sorted(kept, key=rank)}


def pictures_of(
    kept: Mapping[str, KeptCase], results: Results, classes: Sequence[str], limit_bytes: int
) -> list[Picture]:
    """One picture of each case that ``choose_cases`` names, smaller ones if they need too much."""
    rows: dict[str, list[Row]] = {}
    for row in results.summary.metric_per_case:
        rows.setdefault(row.case_id, []).append(row)
    views = []
    for case, role in choose_cases(rows, kept.keys()).items():
        view = kept[case].view(f"{role}: {case}", len(classes), results.threshold)
        views.append((_one_slice(view), f"slice {view.index + 1} of {len(view.mask)}"))
    side = PANEL_SIDE
    while True:
        pictures = [_picture(view, where, len(classes), side) for view, where in views]
        size = sum(len(panel.svg.encode()) for each in pictures for panel in each.panels)
        if size <= limit_bytes or side == 1:
            return pictures
        side //= 2


PANEL_SIDE = 384  # pixels: a panel is at most 260 wide, on many screens of two pixels each


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


def _thinned(view: View, step: int) -> View:
    """The case on a grid ``step`` times as coarse in plane: means of images, every n-th label."""
    if step == 1:
        return view
    dz, dy, dx = view.spacing_mm
    high, wide = view.attention_step
    return dataclasses.replace(
        view,
        caption=f"{view.caption}; shown at 1/{step} of the resolution in plane",
        images=_block_means(view.images, step),
        truth=None if view.truth is None else _block_centres(view.truth, step),
        mask=_block_centres(view.mask, step),
        foreground=_block_means(view.foreground, step),
        attention_step=(high / step, wide / step),
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


def _one_slice(view: View) -> View:
    """The case without its other slices."""
    kept = slice(view.index, view.index + 1)
    arrays = {name: getattr(view, name)[kept] for name in ("images", "mask", "foreground")}
    truth = None if view.truth is None else view.truth[kept]
    attention = None if view.attention is None else view.attention[kept]
    return dataclasses.replace(view, truth=truth, attention=attention, index=0, **arrays)


def _picture(view: View, number_of_slice: str, num_classes: int, side: int) -> Picture:
    """A case of one slice, at most ``side`` pixels wide and high."""
    _, *plane = view.mask.shape
    view = _thinned(view, min(-(-max(plane) // side), *plane))
    truth_only = _outlines(view.truth_or_empty[0], "truth", num_classes)
    outlines = [*truth_only, *_outlines(view.mask[0], "prediction", num_classes)]
    spacing = view.spacing_mm[1:]
    panels = [
        _panel(name.upper(), _grey(view.images[0, ..., m]), spacing, outlines)
        for m, name in enumerate(view.modalities)
    ]
    panels.append(
        _panel("Probability", _colored(view.foreground[0], "magma", 1.0), spacing, outlines)
    )
    if view.attention is not None:
        stage = view.attention.shape[-1] - 1
        for m, name in enumerate(view.modalities):
            coarse = view.attention[0, ..., m, stage].astype(np.float32)
            attention = _enlarge(coarse, view.mask.shape[1:], view.attention_step)
            image = _colored(attention, "viridis", float(attention.max()))
            title_of = f"Attention {name.upper()}, stage {stage}"
            panels.append(_panel(title_of, image, spacing, truth_only))
    return Picture(
        view.title, f"{view.caption}; {number_of_slice}", len(view.modalities) + 1, panels
    )


def caption_of(rows: Sequence[Row]) -> str:
    """What was measured on a case, and its fold."""
    scores = ", ".join(
        f"{class_label(row.name)} Dice {number(row.dice)}"
        if row.dice is not None
        else f"no {class_label(row.name)}, {volume(row.volume_predicted_ml)} predicted"
        for row in rows
    )
    fold = rows[0].fold
    return scores if fold is None else f"{scores}; fold {fold}"


def _enlarge(image: np.ndarray, shape: Sequence[int], step: tuple[float, float]) -> np.ndarray:
    """Nearest neighbours of ``h w``, each of which stands for ``step`` pixels of ``shape``."""
    rows, columns = (
        np.minimum(np.floor(np.arange(size) / each).astype(int), there - 1)
        for size, each, there in zip(shape, step, image.shape, strict=True)
    )
    return image[rows][:, columns]


def _outlines(labels: np.ndarray, kind: str, num_classes: int) -> list[tuple[str, str]]:
    """SVG path (in voxels) around every class, along the voxel edges."""
    return [
        (kind, path)
        for label in range(1, num_classes + 1)
        if (path := outline(_radiological(labels == label)))
    ]


def outline(mask: np.ndarray) -> str:
    """SVG path of closed lines along the voxel edges around the foreground of a bool ``h w``."""
    padded = np.pad(mask, 1).astype(bool)
    after: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # edges clockwise: from the upper left corner of a voxel on, its foreground on their right
    for (dy, dx), (y0, x0), (y1, x1) in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    ):
        beside = padded[1 + dy : 1 + dy + mask.shape[0], 1 + dx : 1 + dx + mask.shape[1]]
        for y, x in np.argwhere(mask.astype(bool) & ~beside).tolist():
            after.setdefault((y + y0, x + x0), []).append((y + y1, x + x1))
    lines = []
    while after:
        start = at = min(after)
        line = [f"M{at[1]} {at[0]}"]
        while True:
            ends = after[at]
            end = ends.pop()
            if not ends:
                del after[at]
            step = (end[0] - at[0], end[1] - at[1])
            line.append(f"v{step[0]}" if step[0] else f"h{step[1]}")
            at = end
            if at == start or at not in after:
                break
        lines.append("".join(_joined(line)) + "z")
    return "".join(lines)


def _joined(line: Sequence[str]) -> list[str]:
    """Steps in one direction as one."""
    joined: list[str] = []
    for step in line:
        last = joined[-1] if joined else ""
        if last and last[0] == step[0] and last[0] in "hv" and int(last[1:]) * int(step[1:]) > 0:
            joined[-1] = f"{step[0]}{int(last[1:]) + int(step[1:])}"
        else:
            joined.append(step)
    return joined


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
    uri = _data_uri(_radiological(image))
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


def _data_uri(image: np.ndarray) -> str:
    """A uint8 image, grey or coloured."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(image)).save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
