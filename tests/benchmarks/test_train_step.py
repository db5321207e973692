"""The training steps that are timed: the preset, parts of it taken away, systems around it."""

import pytest

from benchmarks import train_step
from experiments.settings.presets import PRESETS
from experiments.settings.systems import SYSTEMS

VARIANTS = train_step.variants(PRESETS["small"])
FULL = train_step.operations_of(VARIANTS["full"])


def test_systems_are_among_what_is_timed():
    assert {"full", train_step.PEER, *SYSTEMS} <= {*VARIANTS}


@pytest.mark.parametrize("name", ["slice2d", "csam", "cascade"])
def test_operations_are_those_of_the_variants_own_crops(name):
    """Slices, and crops of some, are other windows than the preset's."""
    operations = train_step.operations_of(VARIANTS[name])
    assert 0 < operations < 4 * FULL
