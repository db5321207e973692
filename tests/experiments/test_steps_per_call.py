"""Which steps go into one call: several, unless a checkpoint or a look lies between them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cmsad_jax.parallel import ParallelStep
from cmsad_jax.types import ConfigError
from experiments.settings.command_line import complete
from experiments.settings.config import TrainConfig
from experiments.settings.presets import PRESETS
from experiments.training.feed import Feed
from experiments.training.loop import next_call
from experiments.training.programs import Programs, steps_per_call, validation_steps


def configured(**options):
    return dataclasses.replace(PRESETS["small"], train=TrainConfig(**options))


@pytest.mark.parametrize(
    ("options", "platform", "count"),
    [
        ({}, "cpu", 1),
        ({"steps": 20_000, "validations": 20, "checkpoint_every": 500}, "gpu", 10),
        ({"steps": 250, "validations": 2, "checkpoint_every": 100}, "gpu", 5),
        ({"steps": 7, "validations": 1, "checkpoint_every": 100}, "tpu", 1),
        ({"steps": 12, "validations": 3, "checkpoint_every": 12}, "tpu", 4),
        ({"steps": 7, "steps_per_call": 3}, "cpu", 3),
    ],
)
def test_number_of_steps_divides_the_steps_between_savings(options, platform, count):
    assert steps_per_call(configured(**options), platform) == count


def test_less_than_one_is_refused():
    with pytest.raises(ConfigError, match=r"steps-per-call must be at least 1; got 0. Use"):
        complete(configured(steps_per_call=0))


def test_calls_end_where_something_is_saved():
    config = configured(steps=11, validations=1, steps_per_call=4)
    fake: Any = ParallelStep(*[lambda given: given] * 4)
    programs = Programs(fake, fake, fake, 4, fake, fake, fake)
    given = ({"case_index": np.array([i]), "image": np.full((1, 2, 3, 4, 1), i)} for i in range(11))
    feed, number, sizes, images = Feed(given), 0, [], []
    while number < 11:
        (call,), batch, _ = next_call(
            config, programs, [feed], number, lambda n: n in (6, 11), [["a"] * 11]
        )
        sizes.append(len(call.batches))
        assert call.first == number + 1
        assert batch["image"].shape == (sizes[-1],) * (sizes[-1] > 1) + (1, 2, 3, 4, 1)
        images.append(batch["image"].reshape(sizes[-1], -1)[:, 0])
        number += sizes[-1]
    assert sizes == [4, 1, 1, 4, 1]
    np.testing.assert_array_equal(np.concatenate(images), np.arange(11))
    assert validation_steps(config) == {11}
