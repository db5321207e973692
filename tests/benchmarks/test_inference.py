"""The promise on memory, kept by the benchmark that shows it."""

import pytest

from benchmarks import inference


@pytest.mark.slow
def test_memory_does_not_follow_the_volume():
    small, large = inference.memory_rows("small")
    assert large.device_mb <= 1.1 * small.device_mb
    assert large.bytes_per_additional_voxel is not None
    assert large.bytes_per_additional_voxel <= 40
