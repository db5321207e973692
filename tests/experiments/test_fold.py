"""What a fold makes of the metrics of its steps."""

import dataclasses

import numpy as np
import pytest

from experiments.training.feed import hidden_labels
from experiments.training.fold import Fold, FoldInTraining, Progress, Step, train_batches
from tests.experiments.test_feed import Source
from tests.experiments.tiny_run import tiny


def step(number, distance):
    metrics = {"loss": 1.0, "skipped": 0.0, "map_distance": distance}
    return Step(number, ["a", "b"], {}, metrics)


@pytest.fixture
def member(tmp_path):
    config = tiny(tmp_path / "run", tmp_path / "cache")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=40))
    made = FoldInTraining(config, Fold(0, (), (), tmp_path / "run" / "fold_0"), "abc")
    yield made
    made.close()


def test_maps_that_stop_to_depend_on_the_case_are_warned_of_once(member, capsys):
    distances = [0.8] * 10 + [0.8] * 5 + [0.1] * 25
    member.count(step(i + 1, distance) for i, distance in enumerate(distances))
    printed = capsys.readouterr().out
    assert printed.count("the distilled attention maps have collapsed") == 1
    # the last 20 rows: two of 0.8, 18 of 0.1
    assert (
        "step 33: the distilled attention maps have collapsed: two cases differ by 21%" in printed
    )
    assert "Add label to --loss.teachers" in printed
    member.count([step(41, 0.0)])
    assert "collapsed" not in capsys.readouterr().out
    assert Progress(**dataclasses.asdict(member.done)).collapse_said  # nor by a resumed run


def test_maps_that_depend_on_the_case_are_not_warned_of(member, capsys):
    member.count(step(i + 1, 0.8 if i < 10 else 0.3) for i in range(40))
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ((0.3, None, 0.5), "validation Dice still rose, by 0.200 to 0.500 at its last look"),
        ((0.3, 0.5, 0.51), None),
        ((0.6, 0.3, 0.5), None),
        ((0.5,), None),
        ((None, None), None),
    ],
)
def test_a_schedule_that_ends_while_dice_still_rises_is_said_with_its_cost(
    looks, said, member, capsys
):
    member.done.history = [{"validation_dice": score} for score in looks]
    member.done.train_s = 90.0
    member.say_if_still_rising()
    printed = capsys.readouterr().out
    assert (said in printed) if said else not printed
    if said:
        assert "for about 1.5 minutes more a fold: --train.steps=80 with a new --output" in printed


def test_row_is_the_mean_of_what_was_measured():
    done = Progress()
    for i, distance in enumerate((0.2, np.nan, 0.4)):
        done.count(step(i + 1, distance), "fold")
    assert done.add_row(step=3)["map_distance"] == pytest.approx(0.3)
    done.count(step(4, np.nan), "fold")
    assert done.add_row(step=4)["map_distance"] is None
    assert done.kept_map_distance() is None


def test_hidden_labels_are_said_and_marked_in_the_batches(tmp_path, capsys):
    config = tiny(tmp_path / "run", tmp_path / "cache")
    train = dataclasses.replace(config.train, crop=(4, 8, 8), unlabelled=0.5, steps=8)
    source = Source(num_cases=6)
    training = source.case_ids[:4]
    batches = list(
        train_batches(
            dataclasses.replace(config, train=train), source, Fold(1, training, (), tmp_path)
        )
    )
    assert "fold 1: 2 training cases with a label, 2 without" in capsys.readouterr().out
    hidden = hidden_labels(source, training, share=0.5, seed=config.seed * 1000 + 1)
    for batch in batches:
        names = [training[i] for i in batch["case_index"]]
        assert batch["labelled"].tolist() == [name not in hidden for name in names]
    assert {bool(of) for batch in batches for of in batch["labelled"]} == {True, False}
