"""Which crop is trained on when: a plan in NumPy, made from the seed alone.

Crop ``i`` of a run is a function of (seed, i) and of the list of cases: neither the batch size nor
threads, devices or where a run was resumed change it. Every random number is a word of
``numpy.random.SeedSequence``, whose values NumPy promises to keep, so runs can be repeated under
later versions.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_pipelines.faults import DataError

_RANDOM, _FOREGROUND, _CROP = range(3)
"""What a word is drawn for; part of its seed."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is drawn for the steps of a run, and which part of it is read here.

    Attributes:
        crop: size of the crops, ``d h w``.
        batch_size: examples in a batch.
        num_steps: of the whole run.
        seed: at least 0; other seeds give other crops.
        foreground_share: of the crops, drawn to hold foreground, balanced over positive cases;
            taken as the nearest fraction with a denominator of at most 1000.
        unlabelled: cases whose labels are not to be used: no crop is drawn by them, and a batch has
            ``labelled``, bool ``b``, by which the train step leaves them out.
        start_step: steps that were made before.
        part: ``(i, n)`` is part ``i`` of the ``n`` equal ones of each batch: that of one of several
            processes.
        num_threads: that read; 0 reads in the calling thread. Changes nothing of what is drawn.

    Raises:
        DataError: a batch has no such parts.
    """

    crop: tuple[int, int, int]
    batch_size: int
    num_steps: int
    seed: int
    foreground_share: float = 1 / 3
    unlabelled: frozenset[str] = frozenset()
    start_step: int = 0
    part: tuple[int, int] = (0, 1)
    num_threads: int = 2

    def __post_init__(self):
        count = self.part[1]
        if self.batch_size < 1:
            raise DataError(
                f"batch size must be 1 or more; got {self.batch_size}. Use --train.batch-size 2."
            )
        if self.batch_size % count:
            raise DataError(
                "batch size must be divisible by the number of processes that read it; "
                f"got {self.batch_size} and {count}. Use --train.batch-size {2 * count}."
            )

    @property
    def rows(self) -> range:
        """Examples of each batch that belong to ``part``."""
        index, count = self.part
        size = self.batch_size // count
        return range(index * size, (index + 1) * size)

    def crops(self, step: int) -> list[int]:
        """Numbers of the plan's crops that ``part`` reads for a step, from 0."""
        return [step * self.batch_size + row for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Crop:
    """One example of the plan.

    Attributes:
        case_index: which of the plan's cases.
        offset: ``d h w`` index of the crop's first voxel.
        foreground: whether the crop was drawn to hold foreground.
        key: two uint32 words that seed the example's augmentation.
    """

    case_index: int
    offset: tuple[int, int, int]
    foreground: bool
    key: np.ndarray


class SamplingPlan:
    """Endless sequence of crops; ``plan[i]`` is crop ``i``.

    Two streams are interleaved. *Random* crops lie anywhere, uniformly; *foreground* crops hold a
    voxel that is drawn uniformly from the foreground of their case, and lie uniformly among the
    positions that hold it. Each stream goes through its cases (all of them, or those with
    foreground) in a new order every time, so within a stream no two cases differ by more than one
    crop. Of the first ``n`` crops exactly ``floor(n * foreground_share)`` are foreground crops.
    """

    def __init__(
        self,
        foreground: Sequence[np.ndarray],
        shape: tuple[int, int, int],
        sampling: Sampling,
    ):
        """Check the settings.

        Args:
            foreground: for each case, the flat indices of its foreground voxels.
            shape: size of all cases' volumes, ``d h w``.
            sampling: of which crop, seed and share of foreground count: the plan is that of all
                steps and processes.

        Raises:
            DataError: the crop does not fit, a setting is out of range, there is no case, or
                foreground is asked for and no case has any.
        """
        _check(foreground, shape, sampling)
        self._foreground = foreground
        self._positive = [i for i, voxels in enumerate(foreground) if voxels.size]
        self._shape = shape
        self._crop = sampling.crop
        self._seed = sampling.seed
        self._share = Fraction(sampling.foreground_share).limit_denominator(1000)

    def __getitem__(self, index: int) -> Crop:
        before = self._share.numerator * index // self._share.denominator
        upto = self._share.numerator * (index + 1) // self._share.denominator
        words = [int(word) for word in self._words(_CROP, index, count=6)]
        if upto > before:
            case_index = self._positive[self._turn(_FOREGROUND, before, len(self._positive))]
            voxels = self._foreground[case_index]
            voxel = np.unravel_index(voxels[_below(voxels.size, words[0])], self._shape)
            first = [max(0, int(v) - c + 1) for v, c in zip(voxel, self._crop, strict=True)]
            last = [
                min(int(v), s - c) for v, s, c in zip(voxel, self._shape, self._crop, strict=True)
            ]
        else:
            case_index = self._turn(_RANDOM, index - before, len(self._foreground))
            first = [0, 0, 0]
            last = [s - c for s, c in zip(self._shape, self._crop, strict=True)]
        d, h, w = (
            low + _below(high - low + 1, word)
            for low, high, word in zip(first, last, words[1:4], strict=True)
        )
        return Crop(case_index, (d, h, w), upto > before, np.array(words[4:], np.uint32))

    def _turn(self, stream: int, number: int, num_cases: int) -> int:
        """Whose turn it is at draw ``number`` of a stream: a new permutation every round."""
        cycle, position = divmod(number, num_cases)
        order = np.argsort(self._words(stream, cycle, count=num_cases), kind="stable")
        return int(order[position])

    def _words(self, purpose: int, index: int, *, count: int) -> np.ndarray:
        return np.random.SeedSequence((self._seed, purpose, index)).generate_state(count)


def _below(bound: int, word: int) -> int:
    """A number in ``[0, bound)`` from a uint32 word; uneven by less than ``bound / 2**32``."""
    return word * bound >> 32


def _check(
    foreground: Sequence[np.ndarray], shape: tuple[int, int, int], sampling: Sampling
) -> None:
    crop, seed, foreground_share = sampling.crop, sampling.seed, sampling.foreground_share
    if not foreground:
        raise DataError("there must be a case to train on; got none. Use fewer folds.")
    if any(not 1 <= c <= s for c, s in zip(crop, shape, strict=True)):
        fitting = " ".join(str(max(1, min(c, s))) for c, s in zip(crop, shape, strict=True))
        raise DataError(
            f"crop must fit into the volume; got crop {crop} and volume {shape}. "
            f"Use --train.crop {fitting}."
        )
    if seed < 0:
        raise DataError(f"seed must be 0 or more; got {seed}. Use --seed 0.")
    if not 0 <= foreground_share <= 1:
        raise DataError(
            f"foreground share must be between 0 and 1; got {foreground_share}. "
            "Use --train.foreground-share 0.33."
        )
    if foreground_share and not any(voxels.size for voxels in foreground):
        raise DataError(
            f"foreground crops need a training case with foreground; got {len(foreground)} cases "
            "without any. Add positive cases, or use --train.foreground-share 0."
        )
