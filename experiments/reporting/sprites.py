"""Cases as the slice viewer reads them, within the bytes that they are given.

Each layer is one grey picture with the slices in a grid, row by row: PNG, which loses nothing,
where there is room, else WebP, the better the more there is. Masks are always whole and exact, as
far as browsers hold pictures of that size.

Why a viewer of our own on a plain canvas, and not niivue: its bundle (ipyniivue 2.4.4) is 5.0 MB of
a page's 20 and reads volumes of at least one byte a voxel, so that 300 cases of 20 x 256 x 256 in
three modalities would take 1.2 GB before base64; here they are 20 MB. It needs WebGL2, too, which
not every reading room's machine has. ``viewer.js`` and ``lists.js`` are 0.03 MB together.
"""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import matplotlib
import numpy as np
import PIL.Image

from experiments.reporting.views import View


class Layer(TypedDict):
    """A picture with the slices of a layer, and what its grey values mean.

    A pixel covers ``step`` x ``step`` (rows, columns) voxels of the grid, from its first on; grey
    ``g`` means ``low + g / 255 * (high - low)``. ``exact`` says that nothing was lost but the
    rounding to 256 steps.
    """

    uri: str
    rows: int
    columns: int
    step: list[float]
    low: float
    high: float
    exact: bool


class ImageLayer(Layer):
    """An image, with the ends of the window that it is first shown in; or one that is not there."""

    window: list[float]
    absent: bool


class Layers(TypedDict):
    """The layers of a case; ``truth`` is None where it is not known."""

    images: dict[str, ImageLayer]
    truth: Layer | None
    prediction: Layer
    probability: Layer
    attention: dict[str, list[Layer]]


class ViewerCase(TypedDict):
    """A case as ``viewer.js`` reads it; ``shape`` and ``spacing_mm`` are ``d h w``."""

    id: str
    title: str
    caption: str
    shape: list[int]
    columns: int
    spacing_mm: list[float]
    affine: list[list[float]] | None
    slice: int
    units: str
    stages: list[int]
    layers: Layers


@dataclasses.dataclass(frozen=True)
class Quality:
    """How much of a case is kept.

    Attributes:
        step: voxels in plane, along either axis, that one pixel of an image stands for.
        quality: of WebP; None loses nothing.
        all_stages: attention of every stage, or of the last alone.
    """

    step: int
    quality: int | None
    all_stages: bool = True

    @property
    def bytes_per_voxel(self) -> float:
        """What an image takes, roughly, as text in a page."""
        per_pixel = 1.5 if self.quality is None else 0.02 + 0.55 * (self.quality / 100) ** 4
        return per_pixel / self.step**2


QUALITIES = (
    Quality(1, None),
    Quality(1, 92),
    Quality(1, 80),
    Quality(1, 60),
    Quality(2, 80, False),
    Quality(2, 60, False),
    Quality(2, 40, False),
    Quality(3, 50, False),
    Quality(4, 50, False),
    *(Quality(step, 40, False) for step in (6, 8, 12, 16, 24, 32, 48, 64)),
)
"""From the best to the least; after the last there is nothing worth a look."""

CANVAS_PIXELS = 2**24
CANVAS_SIDE = 16383
"""What a canvas holds in every browser (Safari on a phone has the least area), and WebP a side."""


def within(
    view: View, case_id: str, units: str, limit_bytes: int, start: int = 0
) -> tuple[ViewerCase, int] | None:
    """A case at the best quality that fits, and its place in ``QUALITIES``; None if none does.

    Args:
        view: the case.
        case_id: its name.
        units: what its intensities are.
        limit_bytes: of its JSON.
        start: place of a quality that may be tried first.
    """
    depth, height, width = view.mask.shape
    voxels = depth * height * width * len(view.modalities)
    for place, quality in enumerate(QUALITIES):
        if place < start or quality.bytes_per_voxel * voxels > 2 * limit_bytes:
            continue
        if quality.step > 1 and quality.step > min(height, width):
            break
        if not _fits_browsers(depth, height, width, quality.step):
            continue
        case = viewer_case(view, case_id, units, quality)
        if json_bytes(case) <= limit_bytes:
            return case, place
    return None


def json_bytes(value: object) -> int:
    """Length of a value as JSON in a page, where ``<``, ``>``, ``&`` and ``'`` take six bytes."""
    text = json.dumps(value)
    return len(text) + 5 * sum(map(text.count, "<>&'"))


def _fits_browsers(depth: int, height: int, width: int, step: int) -> bool:
    """Whether a sprite of that many slices can be read back from a canvas."""
    columns = columns_of(depth)
    rows = -(-depth // columns) * -(-height // step)
    columns *= -(-width // step)
    return rows * columns <= CANVAS_PIXELS and max(rows, columns) <= CANVAS_SIDE


def columns_of(depth: int) -> int:
    """Slices side by side in a sprite."""
    return math.isqrt(depth - 1) + 1


def viewer_case(view: View, case_id: str, units: str, quality: Quality) -> ViewerCase:
    """A case at one quality."""
    step, (depth, height, width) = quality.step, view.mask.shape
    exact = next(n for n in range(1, 1 + step) if _fits_browsers(depth, height, width, n))
    images: dict[str, ImageLayer] = {}
    for m, name in enumerate(view.modalities):
        image = _means(_displayed(view.images[..., m]), step)
        low, high, window = grey_range(image)
        images[name] = {
            **_layer(image, (step, step), low, high, quality.quality),
            "window": [rounded(end) for end in window],
            "absent": not image.any(),
        }
    soft = max(step, 2 if step > 1 else 1)
    case: ViewerCase = {
        "id": case_id,
        "title": view.title,
        "caption": "; ".join(
            ([view.caption] if view.caption else [])
            + ([f"images at 1/{step} of the resolution in plane"] if step > 1 else [])
            + ([f"masks at 1/{exact} of it"] if exact > 1 else [])
        ),
        "shape": list(view.mask.shape),
        "columns": columns_of(len(view.mask)),
        "spacing_mm": [rounded(mm) for mm in view.spacing_mm],
        "affine": None if view.affine is None else [[*map(rounded, r)] for r in view.affine[:3]],
        "slice": view.index,
        "units": units,
        "stages": [],
        "layers": {
            "images": images,
            "truth": None if view.truth is None else _labels(view.truth, exact),
            "prediction": _labels(view.mask, exact),
            "probability": _layer(
                _means(_displayed(view.foreground), soft), (soft, soft), 0, 1, quality.quality
            ),
            "attention": {},
        },
    }
    if view.attention is not None:
        num_stages = view.attention.shape[-1]
        case["stages"] = list(range(num_stages) if quality.all_stages else [num_stages - 1])
        case["layers"]["attention"] = {
            name: [_attention(view, m, stage, quality) for stage in case["stages"]]
            for m, name in enumerate(view.modalities)
        }
    return case


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def grey_range(image: np.ndarray) -> tuple[float, float, tuple[float, float]]:
    """Ends of what is kept of an image's intensities, and of the window first shown.

    The window goes from the 1st to the 99.5th percentile of what is inside the field of view; what
    is kept goes beyond it by half of its width, as far as there are intensities.
    """
    inside = image[image != 0]
    if not inside.size:
        return 0.0, 1.0, (0.0, 1.0)
    first, last = (float(end) for end in np.percentile(inside, (1, 99.5)))
    room = max(last - first, 1e-6) / 2
    least, most = min(float(inside.min()), 0.0), float(inside.max())
    return max(first - room, least), min(last + room, most), (first, max(last, first + 1e-6))


def _displayed(volume: np.ndarray) -> np.ndarray:
    """As radiologists look at it: anterior up, the patient's right on the left of the picture."""
    return volume[:, ::-1, ::-1]


def _padded(volume: np.ndarray, step: int) -> np.ndarray:
    """Repeats of the last row and column, to whole blocks of ``step`` x ``step``."""
    extra = [(0, -n % step) for n in volume.shape[1:3]]
    return np.pad(volume, [(0, 0), *extra], mode="edge")


def _means(volume: np.ndarray, step: int) -> np.ndarray:
    """Means over blocks of ``step`` x ``step`` voxels, float32."""
    volume = volume.astype(np.float32)
    if step == 1:
        return volume
    whole = _padded(volume, step)
    depth, height, width = whole.shape
    return whole.reshape(depth, height // step, step, width // step, step).mean((2, 4))


def _labels(labels: np.ndarray, step: int) -> Layer:
    """A mask, exact; the voxel in the middle of each block where it must be coarser."""
    shown = _displayed(labels)
    if step > 1:
        shown = _padded(shown, step)[:, step // 2 :: step, step // 2 :: step]
    return _layer(shown.astype(np.float32), (step, step), 0, 255, None)


def _attention(view: View, modality: int, stage: int, quality: Quality) -> Layer:
    assert view.attention is not None
    maps = _displayed(view.attention[..., modality, stage])
    finer = 2 if quality.step >= 2 and min(maps.shape[1:]) >= 32 else 1
    step = (view.attention_step[0] * finer, view.attention_step[1] * finer)
    return _layer(_means(maps, finer) / 255, step, 0, 1, quality.quality)


def _layer(
    volume: np.ndarray,
    step: tuple[float, float],
    low: float,
    high: float,
    quality: int | None,
) -> Layer:
    scaled = np.clip((volume - low) / max(high - low, 1e-12), 0, 1)
    return {
        "uri": sprite(np.round(255 * scaled).astype(np.uint8), quality),
        "rows": volume.shape[1],
        "columns": volume.shape[2],
        "step": [rounded(step[0]), rounded(step[1])],
        "low": rounded(low),
        "high": rounded(high),
        "exact": quality is None,
    }


def sprite(volume: np.ndarray, quality: int | None) -> str:
    """Data URI of uint8 ``d h w``, slices row by row in a grid; without loss if quality is None."""
    depth, height, width = volume.shape
    columns = columns_of(depth)
    rows = -(-depth // columns)
    grid = np.zeros((rows * columns, height, width), np.uint8)
    grid[:depth] = volume
    sheet = grid.reshape(rows, columns, height, width).swapaxes(1, 2)
    picture = PIL.Image.fromarray(
        np.ascontiguousarray(sheet).reshape(rows * height, columns * width)
    )
    buffer = io.BytesIO()
    if quality is None:
        picture.save(buffer, "png", compress_level=7)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    picture.convert("RGB").save(buffer, "webp", quality=quality, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def lookup(colormap: str) -> list[list[int]]:
    """256 colours."""
    return (
        np.round(255 * matplotlib.colormaps[colormap](np.arange(256))[:, :3]).astype(int).tolist()
    )


# A page's share of them ---------------------------------------------------------------------------


class Viewer(TypedDict):
    """What ``viewer.js`` reads, but for the cases, each of which is read when it is opened.

    ``names`` are the ids and titles of the cases, ``left_out`` those of the ones without room.
    """

    colormaps: dict[str, list[list[int]]]
    names: list[dict[str, str]]
    cases: list[ViewerCase]
    left_out: list[str]


LEAST_BYTES = 12_000
"""For which a case is worth reading: with less there is nothing to see in it."""


def share_out(
    views: Mapping[str, Callable[[], View]],
    units: str,
    limit_bytes: int,
    least_bytes: int = LEAST_BYTES,
) -> Viewer:
    """The cases of a page, which share ``limit_bytes`` evenly.

    Args:
        views: of each case by its name, the first ones first: where there is not room for all, the
            last are left out.
        units: what the intensities of the images are.
        limit_bytes: of the cases as JSON.
        least_bytes: for which a case is worth its time.
    """
    colormaps = {name: lookup(name) for name in ("magma", "viridis")}
    room = limit_bytes - json_bytes(colormaps)
    most = max(0, room) // least_bytes
    names: Sequence[str] = list(views)
    cases: list[ViewerCase] = []
    left_out, place = list(names[most:]), 0
    for position, name in enumerate(names[:most]):
        share = room // (min(len(names), most) - position)
        fitting = within(views[name](), name, units, share, max(place - 1, 0))
        if fitting is None:
            left_out.append(name)
            continue
        case, place = fitting
        cases.append(case)
        room -= json_bytes(case)
    return {
        "colormaps": colormaps,
        "names": [{"id": case["id"], "title": case["title"]} for case in cases],
        "cases": cases,
        "left_out": left_out,
    }
