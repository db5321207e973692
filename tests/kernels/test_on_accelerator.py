"""What a CPU only interprets: run with ``-m gpu`` where there is an accelerator."""

import pytest

from benchmarks import timing
from benchmarks.kernels import compiled_kernels, operations


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["small", "volume3d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pallas_kernels_are_compiled_and_agree(preset, dtype):
    assert compiled_kernels() == ("pallas",)
    for operation in operations(preset, dtype, ("distillation", "correlation")):
        _, left_out = timing.agreeing(operation)
        assert [why for why in left_out if "by pallas" in why and "multiples of" not in why] == []
