"""What a CPU computes by another formulation: run with ``-m gpu`` where there is an accelerator."""

import pytest

from benchmarks import timing
from benchmarks.kernels import operations


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["small", "volume3d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_agrees_with_the_reference(preset, dtype):
    for operation in operations(preset, dtype):
        _, left_out = timing.agreeing(operation)
        assert left_out == []
