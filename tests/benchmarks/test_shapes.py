"""Named shapes follow from the presets."""

import math

import pytest

from benchmarks.shapes import Convolution, convolutions, stages
from experiments.settings.presets import PRESETS


def test_output_of_a_strided_convolution():
    convolution = Convolution("", (2, 5, 8, 9, 4), (3, 3, 3, 4, 6), (2, 2, 1))
    assert convolution.output == (2, 3, 4, 9, 6)


@pytest.mark.parametrize("preset", PRESETS)
def test_stages_shrink_by_their_strides(preset):
    encoder = PRESETS[preset].network.encoder
    shapes = [stage.shape for stage in stages(preset)]
    assert [shape[-1] for shape in shapes] == list(encoder.channels)
    for before, after, strides in zip(shapes, shapes[1:], encoder.strides[1:], strict=False):
        steps = zip(before[1:-1], strides, strict=True)
        assert after[1:-1] == tuple(math.ceil(n / s) for n, s in steps)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_kernel_and_stride_in_use_occurs_once(preset):
    encoder = PRESETS[preset].network.encoder
    rank = encoder.rank
    found = [(c.kernel[:rank], c.strides) for c in convolutions(preset)]
    assert len(found) == len(set(found))
    entries = set(zip(encoder.kernels, encoder.strides, strict=True))
    inner = {(kernel, (1,) * rank) for kernel in encoder.kernels}
    shortcuts = {((1,) * rank, strides) for strides in encoder.strides}
    assert set(found) == entries | inner | shortcuts


def test_convolutions_of_one_name_are_one():
    names = [c.name for preset in PRESETS for c in convolutions(preset)]
    assert len(names) == len(set(names))
