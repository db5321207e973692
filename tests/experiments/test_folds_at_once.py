"""How many folds are trained side by side, which of them, and on which devices."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from cmsad_jax.types import ConfigError
from experiments.settings.command_line import complete
from experiments.settings.presets import PRESETS
from experiments.training import memory
from experiments.training.fold import Fold
from experiments.training.programs import compile_programs, devices_of, folds_at_once, groups

SMALL = PRESETS["small"]
GPUS = [SimpleNamespace(platform="gpu")] * 8
CPUS = [SimpleNamespace(platform="cpu")] * 8


@pytest.mark.parametrize(
    ("options", "devices", "count"),
    [
        ({}, CPUS, 1),
        ({}, GPUS[:1], 1),  # stacking them has to be measured first
        ({}, GPUS[:5], 5),
        ({}, GPUS[:4], 1),  # 5 folds and 4 devices
        ({"num_folds": 4}, GPUS, 4),
        ({"folds": (0, 3)}, GPUS[:4], 2),
        ({"num_folds": 4, "parallel": "pmap"}, GPUS, 1),
        ({"folds_at_once": 3}, CPUS[:1], 3),
        ({"folds_at_once": 1}, GPUS[:5], 1),
    ],
)
def test_auto_takes_one_fold_for_each_part_of_several_accelerators(options, devices, count):
    assert folds_at_once(dataclasses.replace(SMALL, **options), devices) == count


def test_folds_that_stand_at_the_same_step_go_together(monkeypatch):
    steps = {0: 9, 1: 0, 2: 9, 3: 0, 4: 0}
    monkeypatch.setattr(Fold, "standing", lambda fold: steps[fold.number])
    folds = [Fold(number, (), (), None) for number in steps]

    def numbers(at_once):
        return [[fold.number for fold in group] for group in groups(folds, at_once)]

    assert numbers(1) == [[0], [1], [2], [3], [4]]
    assert numbers(2) == [[0, 2], [1, 3], [4]]
    assert numbers(5) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize(
    ("num_folds", "batch_size", "num_devices", "used"),
    [(1, 8, 8, 8), (5, 2, 5, 5), (4, 2, 8, 8), (1, 2, 5, 1), (2, 3, 8, 2)],
)
def test_the_last_folds_use_what_their_batch_divides_by(num_folds, batch_size, num_devices, used):
    assert len(devices_of(num_folds, batch_size, GPUS[:num_devices])) == used


def test_a_batch_need_only_divide_by_the_devices_of_its_fold():
    devices = jax.devices("cpu")[:1] * 4
    assert SMALL.train.batch_size == 2
    for refused in (1, 3):  # 3 folds do not lie on parts of 4 devices
        config = dataclasses.replace(SMALL, folds_at_once=refused)
        with pytest.raises(ConfigError, match=r"number of devices; got 2 and 4\. Use"):
            compile_programs(config, devices)
    compile_programs(dataclasses.replace(SMALL, folds_at_once=2), devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds_at_once": 0}, r"must be auto or at least 1; got 0\. Use --folds-at-once=auto"),
        (
            {"folds_at_once": 2, "parallel": "pmap"},
            r"got --folds-at-once=2 and --parallel=pmap\. Use --parallel=jit",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        complete(dataclasses.replace(SMALL, **options))


def test_folds_go_in_turn_in_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert folds_at_once(SMALL, GPUS) == 1
    with pytest.raises(ConfigError, match=r"got --folds-at-once=2 and 2 processes\. Use"):
        folds_at_once(dataclasses.replace(SMALL, folds_at_once=2), GPUS)


def test_where_memory_lacks_folds_in_turn_are_the_first_remedy():
    config = dataclasses.replace(SMALL, folds_at_once=5)
    with (
        pytest.raises(
            memory.RunError,
            match=r"asked for: 5 folds at once, batches .* Use --folds-at-once=1 or",
        ),
        memory.explained(config),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
