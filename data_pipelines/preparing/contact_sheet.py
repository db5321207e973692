"""Every case of a data set on one picture: its modalities with the label outlined."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.case import STORED_UNIT, Case

HEIGHT = 128
"""Pixels of a picture's height."""

CASES_PER_SHEET = 240

_CAPTION = 14
_MARGIN = 4
_COLOURS = np.array([[255, 64, 64], [64, 200, 255], [255, 220, 64]], np.uint8)
_SHOWN_SD = 2.5


class Tile(NamedTuple):
    """One case: the slice with most of the label, uint8 ``h w 3``, modalities side by side."""

    case_id: str
    picture: np.ndarray


def make_tile(case: Case) -> Tile:
    """Draw the slice of a stored case that holds most of its label, else the middle one.

    Seen as radiologists do: anterior above, the patient's right on the left.
    """
    areas = (case.label > 0).sum((1, 2))
    index = int(areas.argmax()) if areas.any() else len(areas) // 2
    scale = HEIGHT / case.label.shape[1]
    label = _resized(case.label[index, ::-1, ::-1], scale)
    edge = _outline(label)
    pictures = []
    for channel in range(case.image.shape[-1]):
        values = case.image[index, ::-1, ::-1, channel] * STORED_UNIT
        grey = np.clip((values / _SHOWN_SD + 1) * 127.5, 0, 255).astype(np.uint8)
        picture = np.repeat(_resized(grey, scale)[..., None], 3, axis=-1)
        picture[edge > 0] = _COLOURS[(edge[edge > 0] - 1) % len(_COLOURS)]
        if not case.present[channel]:
            picture[:] = 0
        pictures.append(picture)
    return Tile(case.case_id, np.concatenate(pictures, axis=1))


def write_sheets(tiles: Sequence[Tile], folder: Path) -> list[Path]:
    """Write ``contact_sheet.png``, or several numbered ones, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [tiles[i : i + CASES_PER_SHEET] for i in range(0, len(tiles), CASES_PER_SHEET)]
    paths = []
    for number, part in enumerate(parts, 1):
        name = "contact_sheet.png" if len(parts) == 1 else f"contact_sheet_{number}.png"
        _sheet(part).save(folder / name)
        paths.append(folder / name)
    return paths


def _sheet(tiles: Sequence[Tile]) -> Image.Image:
    width = max(tile.picture.shape[1] for tile in tiles) + _MARGIN
    height = HEIGHT + _CAPTION + _MARGIN
    columns = max(round((len(tiles) * height / width) ** 0.5), 1)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN))
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x = _MARGIN + i % columns * width
        y = _MARGIN + i // columns * height
        draw.text((x, y), tile.case_id, fill=(255, 255, 255))
        sheet.paste(Image.fromarray(tile.picture), (x, y + _CAPTION))
    return sheet


def _resized(plane: np.ndarray, scale: float) -> np.ndarray:
    """Nearest neighbours at ``scale``, ``HEIGHT`` rows."""
    rows, columns = (
        np.minimum(((np.arange(max(round(n * scale), 1)) + 0.5) / scale).astype(int), n - 1)
        for n in plane.shape
    )
    return plane[np.ix_(rows, columns)]


def _outline(label: np.ndarray) -> np.ndarray:
    """The label's classes where a neighbour is of another class, 0 elsewhere."""
    padded = np.pad(label, 1)
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([neighbour != label for neighbour in neighbours], axis=0)
    return np.where(edge, label, 0)
