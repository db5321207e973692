import json

import numpy as np
import pytest

from benchmarks import input_pipeline, label_round_trip


def ellipsoid(radii_mm) -> np.ndarray:
    """A mask of 12 x 60 x 60 voxels of 3 x 1 x 1 mm."""
    d, h, w = np.ogrid[-5.5:6, -29.5:30, -29.5:30]
    a, b, c = radii_mm
    return (d * 3 / a) ** 2 + (h / b) ** 2 + (w / c) ** 2 < 1


def test_a_drawn_shape_keeps_its_volume():
    mask = ellipsoid((9, 8, 6))
    label = label_round_trip.draw(mask, np.random.default_rng(0))
    assert label.spacing_mm == (3.0, 0.4, 0.4)
    volume_mm3 = label.array.sum() * 3 * 0.4**2
    assert volume_mm3 == pytest.approx(mask.sum() * 3, rel=1e-3)


def test_round_trip_on_the_same_grid_is_exact_and_a_shift_is_not():
    label = label_round_trip.draw(ellipsoid((9, 8, 6)), np.random.default_rng(0))
    same = label_round_trip.round_trip(label, label.shape, label.affine, "linear")
    assert same == 1.0
    rows = label_round_trip.measure([ellipsoid((9, 8, 6)), ellipsoid((6, 5, 5))], seed=0)
    dice = {(kind, sampling): float(mean) for kind, sampling, _, mean, _, _ in rows}
    assert dice["in plane", "linear"] > 0.98
    assert dice["tilt 20 degrees", "linear"] < dice["in plane", "linear"]
    assert len(rows) == 2 * len(label_round_trip.KINDS)


@pytest.mark.slow
def test_input_pipeline_command(tmp_path, capsys):
    file = tmp_path / "rows.json"
    input_pipeline.main(["--num-cases=3", "--num-workers", "1", f"--json={file}"])
    printed = capsys.readouterr().out
    assert "| build phantom " in printed
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert rows[0]["cases"] == 3
    assert 50 < rows[0]["peak_mib"] < 2048
    assert all(row["per_s"] > 0 for row in rows)
