"""The promise on memory, kept by the benchmark that shows it, and what it says of speed."""

import dataclasses

import pytest

from benchmarks import inference
from experiments.settings.presets import PRESETS


@pytest.mark.slow
def test_memory_does_not_follow_the_volume():
    small, large = inference.memory_rows("small")
    assert large.device_mb <= 1.1 * small.device_mb
    assert large.bytes_per_additional_voxel is not None
    assert large.bytes_per_additional_voxel <= 40


@pytest.mark.slow
def test_shares_of_the_speed_are_shares(monkeypatch):
    monkeypatch.setattr(inference, "NUM_MEMBERS", 1)
    quick = PRESETS["small"]
    sliding = dataclasses.replace(quick.predict, flip=False, overlap=0.0)
    encoder = dataclasses.replace(quick.network.encoder, channels=(2, 2, 2, 2))
    fusion = dataclasses.replace(quick.network.fusion, kind="mean")
    network = dataclasses.replace(quick.network, encoder=encoder, fusion=fusion)
    tiny = dataclasses.replace(quick, predict=sliding, network=network)
    monkeypatch.setitem(PRESETS, "small", tiny)
    row = inference.speed_row("small", 2)
    assert 0 < row.compute_share < 1
    assert 0 < row.processor_share < 1
    assert row.whole_s > row.wall_s
    assert f"{row.processor_share:.1%}" in inference.speed_table([row])
