"""Which batches fit: by a made-up account of memory, and by XLA's of a tiny network."""

import dataclasses

import jax
import pytest

from cmsad_jax.types import ConfigError
from experiments import fit, plan
from experiments.planning import fits
from experiments.settings.command_line import complete, parse
from experiments.settings.presets import PRESETS
from experiments.training.memory import GIB
from tests.experiments.untrained_run import tiny_config


@pytest.fixture
def account(monkeypatch):
    """1 GiB, and 1 GiB for 27,648 voxels: one crop 12 x 48 x 48 of the preset small."""
    asked = []

    def step_bytes(config, devices):
        asked.append(config.train.batch_size)
        each = config.train.batch_size // len(devices)
        return GIB * (1 + each * config.train.crop[1] * config.train.crop[2] / 48**2)

    monkeypatch.setattr(fits, "step_bytes", step_bytes)
    return asked


def test_largest_batches_by_hand(account, capsys):
    rows = fits.run(fits.FitCommand(10, 0.5), parse(["--accelerator=cpu"]))
    assert rows == [
        fits.Fit((12, 24, 24), 16, 5 * GIB),
        fits.Fit((12, 32, 32), 9, 5 * GIB),
        fits.Fit((12, 48, 48), 4, 5 * GIB),
    ]
    assert account == [1, 2, 4]
    printed = capsys.readouterr().out
    assert "small, float32, 1 x cpu: a step may take 5.00 of 10.00 GiB" in printed
    assert "| 12 32 32 | 9 | 5.00 |" in printed
    assert printed.endswith("--train.batch-size=4 takes 5.00 GiB (compiled).\n")


def test_several_devices_share_a_batch(account):
    devices = [jax.devices("cpu")[0]] * 4
    assert fits.table(complete(PRESETS["small"]), devices, 3 * GIB)[-1].batch_size == 8
    assert account == [4, 8]


def test_accumulated_steps_take_batches_in_whole_parts(monkeypatch):
    def step_bytes(config, devices):
        assert config.train.batch_size % config.train.accumulation == 0
        return GIB * (1 + config.train.batch_size // config.train.accumulation)

    monkeypatch.setattr(fits, "step_bytes", step_bytes)
    config = complete(PRESETS["small"])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    assert fits.table(config, jax.devices("cpu")[:1], 4.5 * GIB)[-1].batch_size == 6


def test_where_no_example_fits_it_is_said(account, capsys):
    rows = fits.run(fits.FitCommand(1.5, 1.0), parse(["--accelerator=cpu"]))
    assert [row.batch_size for row in rows] == [2, 1, 0]
    assert "| 12 48 48 | none | 2.00 |\nNo example of 12 48 48 fits. Use" in capsys.readouterr().out


def test_batch_that_compiles_to_more_than_the_line_told_is_reduced(monkeypatch, capsys):
    account = {1: 2 * GIB, 2: 3 * GIB, 9: 12 * GIB, 7: 9 * GIB}
    monkeypatch.setattr(
        fits, "step_bytes", lambda config, devices: account[config.train.batch_size]
    )
    rows = fits.run(fits.FitCommand(10, 1.0), parse(["--accelerator=cpu"]))
    assert rows[-1].batch_size == 7
    assert "--train.batch-size=7 takes 9.00 GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_batch_is_on_the_line_through_two_smaller_ones():
    config = tiny_config()
    devices = jax.devices("cpu")[:1]
    of_batch = {}
    for batch_size in (1, 2, 5):
        # Crops as here would need less than the optimizer, which is not of the batch.
        crop = tuple(2 * size for size in config.train.crop)
        train = dataclasses.replace(config.train, batch_size=batch_size, crop=crop)
        of_batch[batch_size] = fits.step_bytes(dataclasses.replace(config, train=train), devices)
    assert of_batch[1] < of_batch[2] < of_batch[5]
    line = of_batch[1] + 4 * (of_batch[2] - of_batch[1])
    # Of some megabytes; that of the preset small at 44 examples was 0.6 % from the line.
    assert of_batch[5] == pytest.approx(line, rel=0.1)


def test_what_cannot_be_told_is_refused(monkeypatch):
    with (
        pytest.raises(ConfigError, match="memory of a device must be known; cpu has no limit"),
        pytest.warns(FutureWarning, match="experiments.plan --table=True"),
    ):
        fit.main(["--accelerator=cpu"])
    with pytest.raises(ConfigError, match=r"share must be above 0 and at most 1; got 1\.5"):
        fits.run(fits.FitCommand(share=1.5), parse([]))
    monkeypatch.setattr(fits.memory, "estimate", lambda *_: None)
    pmap = dataclasses.replace(tiny_config(), parallel="pmap")
    with pytest.raises(ConfigError, match="under jit alone; got --parallel=pmap"):
        fits.step_bytes(pmap, jax.devices("cpu")[:1])


def test_plan_prints_the_table_of_a_preset(account, capsys):
    plan.main(["--table=True", "--preset=small", "--accelerator=cpu", "--memory-gib=10"])
    assert "| 12 48 48 | 8 | 9.00 |" in capsys.readouterr().out
