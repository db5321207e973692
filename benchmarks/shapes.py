"""Shapes that occur in training, by name: those of the presets. Benchmarks and tests share them."""

import dataclasses
import math

from experiments.settings.config import window
from experiments.settings.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Stage:
    """Feature of one encoder stage and one modality.

    Attributes:
        name: preset and number, as in ``small/2``.
        shape: ``b *space c``.
    """

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of an encoder; padding is ``k // 2`` on both sides.

    Attributes:
        name: preset, kernel, strides and channels, as in ``small 1x3x3/1x2x2 8>16``.
        input: ``b *space c``.
        kernel: ``*k c o``.
        strides: step along each axis of space.
    """

    name: str
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of the result, ``b *space o``."""
        space = (-(-n // s) for n, s in zip(self.input[1:-1], self.strides, strict=True))
        return (self.input[0], *space, self.kernel[-1])

    @property
    def operations(self) -> int:
        """Multiplications and additions of a forward pass; those with padding do not count."""
        taps = [
            sum(
                0 <= place * step + tap - size // 2 < length
                for place in range(-(-length // step))
                for tap in range(size)
            )
            for length, size, step in zip(self.input[1:-1], self.kernel, self.strides, strict=False)
        ]
        return 2 * self.input[0] * math.prod(taps) * self.kernel[-2] * self.kernel[-1]


def stages(preset: str) -> tuple[Stage, ...]:
    """Features of every encoder stage of a training step, shallowest first."""
    config = PRESETS[preset]
    encoder = config.network.encoder
    return tuple(
        Stage(f"{preset}/{i}", (config.train.batch_size, *space, channels))
        for i, (space, channels) in enumerate(
            zip(encoder.stage_shapes(window(config)), encoder.channels, strict=True)
        )
    )


def convolutions(preset: str) -> tuple[Convolution, ...]:
    """One convolution for each distinct kernel and stride of a preset's encoders.

    Where several stages share both, it is the one with most multiplications.
    """
    encoder = PRESETS[preset].network.encoder
    largest: dict[tuple[tuple[int, ...], tuple[int, ...]], Convolution] = {}
    before = (PRESETS[preset].train.batch_size, *window(PRESETS[preset]), 1)
    for stage, kernel, strides in zip(
        stages(preset), encoder.kernels, encoder.strides, strict=True
    ):
        channels, ones = stage.shape[-1], (1,) * len(kernel)
        for shape, size, step in (
            (before, kernel, strides),
            (before, ones, strides),
            (stage.shape, kernel, ones),
        ):
            found = Convolution(
                f"{preset} {_by(size)}/{_by(step)} {shape[-1]}>{channels}",
                shape,
                (*size, shape[-1], channels),
                step,
            )
            held = largest.get((size, step))
            if held is None or _products(found) > _products(held):
                largest[size, step] = found
        before = stage.shape
    return tuple(largest.values())


def _products(convolution: Convolution) -> int:
    return math.prod(convolution.output[:-1]) * math.prod(convolution.kernel)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
