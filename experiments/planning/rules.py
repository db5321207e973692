"""The rules by which a run is planned: what each setting follows from, why, and whose rule it is.

Each rule is a function of what is ``Known`` - facts of the data, the device, and what the rules
before it chose - and gives a ``Decision``: value, reason, and the fact it came from. ``RULES`` has
them in their order. Where "nnU-Net" is named, the rule is that of Isensee et al., Nature Methods
2021, and of its public planner (default_experiment_planner, network_topology); the code is our own.
The other rules say what was measured, or that nothing was.

Statistics of intensities and of where targets lie would tell a network of the patients it is judged
by. They are taken of each fold's training patients alone, and count only if all folds agree, so
that each fold gets what its own training patients would have given it; where they do not agree, the
rule goes by geometry, which is taken of all cases: it is known of a new patient before anything is
predicted.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipelines.preparing.fingerprint import CaseFacts
from experiments.planning.chips import Target

T = TypeVar("T")

ANISOTROPIC = 3.0
"""Slices count as thick from this ratio of spacings on (nnU-Net's ANISO_THRESHOLD)."""

LADDER_MM = (8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048)
"""Sides that a grid may have: steps so wide that one patient more or less seldom changes them."""

MARGIN = 1.5
"""Side of the grid over that of the smallest one, centred like the image, that holds the targets of
the training patients. Ours: a third of the side is left to patients who are unlike them."""

CPU_SIDE = 48
"""Voxels that a side of the grid has on a CPU, or up to a third more: those of the preset small,
whose 250 steps take a minute a fold on two cores."""

CPU_CROP_VOXELS = 60_000
"""Voxels, times modalities over 3, of a crop on a CPU. Ours: twice those of the preset small."""

LEAST_FEATURES = 4
"""Voxels along an axis below which no stage strides further (nnU-Net's UNet_featuremap_min)."""

SHRINK = 6 / 7
"""Voxels of a crop that is tried over those of the one before."""

LEAST_CROP = 500
"""Voxels below which no crop is tried."""

MOST_OF_DATA = 0.05
"""Share of all voxels of the data set that a batch may hold (nnU-Net)."""

TISSUE_UNITS = {"adc": "adc=1200/500"}
"""Scaling of modalities with a unit: centre and width. ADC in 1e-6 mm2/s, of which prostates hold
800 (lesions) to 1700 (peripheral zone) and their surroundings more (PI-CAI, 1,500 patients)."""

ADC_TISSUE = (500.0, 3000.0)
"""Between these the median of an ADC map of tissue lies if its unit is 1e-6 mm2/s."""

SHIFT_MM = 8.0
"""Shift of the augmentation: that of the preset small, 4 voxels of 2 mm."""

MISALIGNED_MM = 4.0
"""Shift of a modality against the first: T2W and ADC of PI-CAI lie 2.3 mm apart in the median and
4.8 mm in the 90th percentile."""

ALL, TRAINING, DEVICE, FIXED = "all cases", "training patients", "device", "fixed"


class Decision(NamedTuple):
    """A value, and how it came about.

    Attributes:
        value: of the setting.
        rule: why, with its source.
        fact: of this data set or device, to which the rule was applied.
        basis: what the fact is of: all cases, training patients, the device, or nothing.
    """

    value: Any
    rule: str
    fact: str
    basis: str


@dataclasses.dataclass
class Known:
    """What a rule may go by.

    Attributes:
        cases: all cases: their geometry.
        training: the cases that each fold trains on.
        classes: names of the foreground classes.
        modalities: asked for.
        device: what is planned for.
        values: what was decided so far, by field.
    """

    cases: Sequence[CaseFacts]
    training: Sequence[Sequence[CaseFacts]]
    classes: Sequence[str]
    modalities: Sequence[str]
    device: Target
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, field: str) -> Any:
        return self.values[field]

    def agreed(self, statistic: Callable[[Sequence[CaseFacts]], T]) -> T | None:
        """What the training patients of every fold say, or None if the folds disagree."""
        said = [statistic(cases) for cases in self.training]
        return said[0] if all(one == said[0] for one in said) else None

    @property
    def planar(self) -> bool:
        """Whether the cases are single slices."""
        return max(case.size[0] for case in self.cases) == 1

    @property
    def spacing_mm(self) -> np.ndarray:
        """Median voxel size."""
        return np.median([case.spacing_mm for case in self.cases], axis=0)

    @property
    def extent_mm(self) -> np.ndarray:
        """Field of view that 95 % of the cases do not exceed, without empty margins."""
        content = [
            np.minimum(
                case.extent_mm,
                2 * np.array(case.content_mm if any(case.content_mm) else (np.inf,) * 3),
            )
            for case in self.cases
        ]
        return np.percentile(np.array(content), 95, axis=0, method="lower")


# Folds and modalities ---------------------------------------------------------------------------


def num_folds(known: Known) -> Decision:
    """Five, or as many as there are patients."""
    patients = len({case.patient_id for case in known.cases})
    return Decision(
        max(2, min(5, patients)),
        "five folds over patients (nnU-Net), fewer if there are fewer",
        f"{patients} patients",
        ALL,
    )


def allow_missing(known: Known) -> Decision:
    """Whether any case lacks a modality."""
    lacking = [case for case in known.cases if len(case.modalities) < len(known.modalities)]
    return Decision(
        bool(lacking),
        "cases that lack a modality are kept, and marked",
        f"{len(lacking)} of {len(known.cases)} cases lack one",
        ALL,
    )


def modality_dropout(known: Known) -> Decision:
    """Withhold modalities in training where they lack in the data."""
    lacking = sum(len(case.modalities) < len(known.modalities) for case in known.cases)
    return Decision(
        0.3 if lacking and len(known.modalities) > 1 else 0.0,
        "where modalities lack, withhold them in training (experiments/RESULTS.md: a third of the "
        "loss without T2W, at 0.046 of Dice with all)",
        f"{lacking} of {len(known.cases)} cases lack one",
        ALL,
    )


# The grid ---------------------------------------------------------------------------------------


def _side_mm(cases: Sequence[CaseFacts], axis: int) -> float:
    """The side of the ladder that holds the targets of these cases, with margin; 0 without any."""
    axes = (0,) if axis == 0 else (1, 2)  # square in plane, as it is turned there
    reach = max((case.reach_mm[a] for case in cases for a in axes), default=0.0)
    if not reach:
        return 0.0
    return float(next((s for s in LADDER_MM if s >= 2 * MARGIN * reach), LADDER_MM[-1]))


def _sides_mm(known: Known) -> tuple[np.ndarray, str, str]:
    """Sides of the grid, whence they came, and of whom that is."""
    view, said, basis, sides = known.extent_mm, [], ALL, []
    for axis, name in ((0, "through"), (1, "in")):
        wanted = known.agreed(lambda cases, axis=axis: _side_mm(cases, axis))
        limit = float(view[0] if axis == 0 else max(view[1:]))
        if wanted and wanted < limit:
            said.append(f"targets of every fold's training patients fit {wanted:g} mm {name} plane")
            sides.append(wanted)
            basis = TRAINING
        else:
            why = "" if wanted else " (the folds' training patients disagree on less)"
            said.append(f"field of view {limit:.0f} mm {name} plane{why}")
            sides.append(limit)
    return np.array([sides[0], sides[1], sides[1]]), "; ".join(said), basis


def spacing_mm(known: Known) -> Decision:
    """Median voxel size; coarser on a CPU, where not even the part with the target would fit."""
    spacing = known.spacing_mm
    thick = spacing[0] / spacing[1:].min() >= ANISOTROPIC or known.planar
    fact = f"median {_words(spacing)} mm of {len(known.cases)} cases"
    rule = "median of each axis (nnU-Net)"
    if thick:
        rule += "; thick slices are not interpolated: nnU-Net would take the 10th percentile there"
    basis = ALL
    if known.device.is_cpu:
        sides, said, basis = _sides_mm(known)
        finest = np.array([_nice(side / CPU_SIDE) for side in sides])
        if thick:
            finest[0] = 0
        if (finest > spacing).any():
            rule += f"; on a CPU about {CPU_SIDE} voxels a side (ours: the preset small)"
            fact += f"; {said}"
        spacing = np.maximum(spacing, finest)
    d, h, w = (round(float(mm), 3) for mm in spacing)
    return Decision((d, h, w), rule, fact, basis)


def size(known: Known) -> Decision:
    """Voxels that hold the targets with a margin, or the field of view."""
    sides, fact, basis = _sides_mm(known)
    voxels = np.maximum(np.round(sides / known["data.preprocess.spacing_mm"]), 1).astype(int)
    steps = [1 if known.planar else 4, *([8 if known.device.is_cpu else 32] * 2)]
    if voxels[0] > 2 * voxels[1] / 3:  # about isotropic: all axes stride alike
        steps[0] = steps[1]
    d, h, w = (
        int(math.ceil(n / step) * step) if n >= step else int(n)
        for n, step in zip(voxels, steps, strict=True)
    )
    return Decision(
        (d, h, w),
        f"ours: {MARGIN:g} times the smallest grid that holds the targets, in wide steps, within "
        f"the field of view; in multiples of {steps[0]} {steps[1]} {steps[2]}",
        fact,
        basis,
    )


def scales(known: Known) -> Decision:
    """Modalities with a unit keep it; others are standardised case by case."""
    facts, kept, basis = [], [], FIXED
    for name in known.modalities:
        if name not in TISSUE_UNITS:
            continue
        basis = TRAINING
        right = known.agreed(lambda cases, name=name: _unit_is_right(cases, name))
        if right:
            kept.append(TISSUE_UNITS[name])
        facts.append(
            f"the median of {name} lies within {ADC_TISSUE[0]:g} to {ADC_TISSUE[1]:g} in "
            + ("every fold's training cases" if right else "too few training cases")
        )
    return Decision(
        tuple(kept),
        "ours: ADC is quantitative, and keeps its unit where that is right; all others to mean 0 "
        "and sd 1 of the case (nnU-Net for MRI)",
        "; ".join(facts) or "no modality with a unit of its own",
        basis,
    )


def _unit_is_right(cases: Sequence[CaseFacts], name: str) -> bool:
    medians = [case.intensity[name][1] for case in cases if name in case.intensity]
    inside = sum(ADC_TISSUE[0] <= median <= ADC_TISSUE[1] for median in medians)
    return bool(medians) and inside >= 0.95 * len(medians)


# The network ------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """Kernels and strides of the encoder's stages."""

    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]


def stages_of(
    spacing_mm: Sequence[float], crop: Sequence[int] | np.ndarray, *, most: int, alike: float = 2.0
) -> Stages:
    """Stages by nnU-Net's rule (get_pool_and_conv_props).

    An axis strides where its voxels are less than ``alike`` times as large as the smallest, while
    ``LEAST_FEATURES`` voxels are left of it; its kernels are 3 from the stage on at which they are,
    before that 1, and 3 along all axes in the last stage.
    """
    spacing, left = np.array(spacing_mm, float), np.array(crop)
    wide = np.zeros(len(left), bool)
    kernels, strides = [], [(1,) * len(left)]
    while True:
        wide |= spacing / spacing.min() < alike
        kernels.append(tuple(3 if is_wide else 1 for is_wide in wide))
        able = left >= 2 * LEAST_FEATURES
        if len(strides) == most or not able.any():
            break
        able &= spacing / spacing[able].min() < alike
        if able.sum() == 1 and left[able][0] < 3 * LEAST_FEATURES:
            break
        step = np.where(able, 2, 1)
        strides.append(tuple(int(n) for n in step))
        spacing, left = spacing * step, -(-left // step)
    # An axis of one voxel has nothing to look at beside it.
    kernels[-1] = tuple(3 if n > 1 else 1 for n in crop)
    return Stages(tuple(kernels), tuple(strides))


def alike(device: Target) -> float:
    """From which ratio on an axis counts as coarser than the others."""
    return 1.4 if device.is_cpu else 2.0


def most_stages(device: Target) -> int:
    """Stages that a network may have."""
    return 4 if device.is_cpu else 6


def crops(known: Known, voxels: float) -> list[tuple[int, int, int]]:
    """Crops of at most so many voxels, from the largest on, each a seventh smaller than the last.

    As in nnU-Net, the first is all that there is of the grid. Ours: it is shortened where it is
    longest in millimetres.
    """
    spacing = np.array(known["data.preprocess.spacing_mm"])
    grid = np.array(known["data.preprocess.size"])
    step = np.array([1 if grid[0] < 16 else 2, 8, 8])
    least = np.minimum(grid, step * LEAST_FEATURES // 2)
    left, found = grid.copy(), []
    while True:
        while left.prod() > voxels and (left > least).any():
            axis = int(np.argmax(np.where(left > least, left * spacing, 0)))
            left[axis] = max((math.ceil(left[axis] / step[axis]) - 1) * step[axis], 1)
        found.append(_divisible(known, left))
        if left.prod() <= LEAST_CROP or not (left > least).any():
            return sorted(dict.fromkeys(found), key=math.prod, reverse=True)
        voxels = SHRINK * min(voxels, left.prod())


def _divisible(known: Known, found: np.ndarray) -> tuple[int, int, int]:
    """A crop whose sides the strides divide, unless it is the whole grid there."""
    grid = known["data.preprocess.size"]
    spacing = known["data.preprocess.spacing_mm"]
    strides = stages_of(
        spacing, found, most=most_stages(known.device), alike=alike(known.device)
    ).strides
    factors = np.prod(strides, axis=0)
    d, h, w = (
        int(n) if n == whole else max(int(n // factor * factor), min(int(factor), int(whole)))
        for n, factor, whole in zip(found, factors, grid, strict=True)
    )
    return d, h, w


def targets_fit(known: Known, crop: Sequence[int]) -> str:
    """What is to be said of targets that are larger than the crop; empty if there are none."""
    boxes = [case.box_mm for case in known.cases if case.positive]
    spacing = np.array(known["data.preprocess.spacing_mm"])
    sides = np.array(crop) * spacing
    if not boxes:
        return ""
    larger = sum(bool((np.array(box) > sides + spacing).any()) for box in boxes)
    if not larger:
        return ""
    return f"{larger} of {len(boxes)} targets are larger than the crop, and are seen in parts"


def widths(device: Target, num_stages: int) -> Decision:
    """Channels of each stage."""
    first, most = (8, 64) if device.is_cpu else (32, 320)
    channels = tuple(min(first * 2**stage, most) for stage in range(num_stages))
    rule = (
        "ours: the preset small, which two cores train in minutes"
        if device.is_cpu
        else "32 channels, doubled at each stage, at most 320 (nnU-Net)"
    )
    return Decision(channels, rule, f"{device.kind}, {device.lanes} lanes", DEVICE)


def blocks(device: Target, num_stages: int) -> Decision:
    """Blocks of each stage."""
    each = tuple(1 if device.is_cpu or stage < 2 else 2 for stage in range(num_stages))
    return Decision(
        each,
        "one block, on accelerators two from the third stage on (ours: the presets)",
        f"{num_stages} stages on {device.kind}",
        DEVICE,
    )


# Training ---------------------------------------------------------------------------------------


def batch_size(known: Known, crop: Sequence[int], fitting: int) -> Decision:
    """Two, and on accelerators more where memory is left."""
    voxels = math.prod(crop)
    total = len(known.cases) * math.prod(known["data.preprocess.size"])
    least = 2 * known.device.count
    if known.device.is_cpu:
        wanted = max(2, min(16, round(2 * CPU_CROP_VOXELS / 2 / voxels)))
        rule = "two, or as many slices as make up for their size (ours: time is what is scarce)"
    else:
        of_data = int(MOST_OF_DATA * total / voxels)
        wanted = max(least, min(fitting, of_data, 16 * known.device.count))
        rule = (
            f"what fits, up to {MOST_OF_DATA:.0%} of all voxels, at least two (nnU-Net), and at "
            "most 16 a device (ours, not measured)"
        )
    wanted = max(wanted // known.device.count, 1) * known.device.count
    return Decision(
        wanted,
        rule,
        f"{fitting} crops fit; {len(known.cases)} cases of {_words(known['data.preprocess.size'])}",
        DEVICE,
    )


def foreground_share(known: Known) -> Decision:
    """A third, if anything is to be found in every fold's training patients."""
    without = sum(not any(case.positive for case in cases) for cases in known.training)
    positives = sum(case.positive for case in known.cases)
    fact = f"{positives} of {len(known.cases)} cases are positive"
    if without and positives:
        fact += f", and {without} of {len(known.training)} folds train on none of them"
    return Decision(
        0.0 if without else 1 / 3,
        "a third of the crops hold target (nnU-Net), where there is some in every fold",
        fact,
        TRAINING,
    )


def flip_probability(known: Known) -> Decision:
    """Mirroring would turn a left structure into a right one."""
    sided = [name for name in known.classes if {"left", "right"} & {*_parts(name)}]
    return Decision(
        0.0 if sided else 0.5,
        "mirror left and right, unless a class has a side (ours)",
        f"classes {', '.join(known.classes)}",
        FIXED,
    )


def flip_in_prediction(known: Known) -> Decision:
    """As in training."""
    decision = flip_probability(known)
    return decision._replace(value=bool(decision.value))


def translation_voxels(known: Known) -> Decision:
    """A fixed length."""
    mm = known["data.preprocess.spacing_mm"][1]
    most = known["train.crop"][1] / 6
    return Decision(
        round(min(SHIFT_MM / mm, most), 2),
        f"{SHIFT_MM:g} mm, at most a sixth of the crop (ours)",
        f"{mm:g} mm in plane",
        ALL,
    )


def misalignment_probability(known: Known) -> Decision:
    """Only where modalities can lie apart."""
    apart = sum(not case.on_one_grid for case in known.cases)
    value = 0.3 if apart and len(known.modalities) > 1 else 0.0
    return Decision(
        value,
        "shift modalities against the first, unless all of all cases lie on one grid, as "
        "images that were registered do (ours)",
        f"{apart} of {len(known.cases)} cases hold several grids",
        ALL,
    )


def misalignment_voxels(known: Known) -> Decision:
    """A fixed length."""
    mm = known["data.preprocess.spacing_mm"][1]
    return Decision(
        round(MISALIGNED_MM / mm, 2),
        f"{MISALIGNED_MM:g} mm (ours: T2W and ADC of PI-CAI)",
        f"{mm:g} mm in plane",
        ALL,
    )


def steps(known: Known) -> Decision:
    """Those of the presets."""
    return Decision(
        250 if known.device.is_cpu else 20_000,
        "ours: those of the presets; a loss that still falls at the end asks for more",
        f"{known.device.kind}",
        DEVICE,
    )


def learning_rate(known: Known) -> Decision:
    """That of the presets."""
    return Decision(
        5e-3 if known.device.is_cpu else 1e-3,
        "ours: those of the presets, higher for narrow networks and few steps",
        f"{known.device.kind}",
        DEVICE,
    )


def dtype(known: Known) -> Decision:
    """What the device is fastest at."""
    return Decision(
        "float32" if known.device.is_cpu else "bfloat16",
        "bfloat16 on accelerators, losses and weights in float32 (ours: the presets)",
        f"{known.device.kind}",
        DEVICE,
    )


Rule = Callable[[Known], Decision]

OF_DATA: Mapping[str, Rule] = {
    "num_folds": num_folds,
    "data.allow_missing": allow_missing,
    "data.preprocess.spacing_mm": spacing_mm,
    "data.preprocess.size": size,
    "data.preprocess.scales": scales,
}
"""Settings of data and folds, in the order in which they are decided."""

OF_TRAINING: Mapping[str, Rule] = {
    "network.dtype": dtype,
    "train.steps": steps,
    "train.optimizer.learning_rate": learning_rate,
    "train.foreground_share": foreground_share,
    "train.modality_dropout": modality_dropout,
    "train.augmentation.flip_probability": flip_probability,
    "train.augmentation.translation_voxels": translation_voxels,
    "train.augmentation.misalignment_probability": misalignment_probability,
    "train.augmentation.misalignment_voxels": misalignment_voxels,
    "predict.flip": flip_in_prediction,
}
"""Settings of the training, once the crop is known. Between the two, the crop, the network and the
batch are found together, by memory: ``experiments.planning.planner``."""


def _nice(mm: float) -> float:
    """The largest of 1, 1.5, 2, 2.5, 3, 4, 5, 6 and 8, times a power of 10, that is no larger."""
    power = 10.0 ** math.floor(math.log10(mm))
    return round(max(n * power for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if n * power <= mm), 6)


def _words(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(f"{float(value):g}" for value in values)


def _parts(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(" ", "_").split("_")
