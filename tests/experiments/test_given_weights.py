"""Folds that start from weights of another run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax.named_weights import flatten_weights
from cmsad_jax.training import TrainState
from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig
from data_pipelines.serving.splits import Folds
from experiments.run_folder import RunFolder, training_cases
from experiments.settings.config import ALL, Config
from experiments.training import fold as fold_module
from experiments.training import given_weights
from experiments.training.fold import Fold, FoldInTraining
from experiments.training.given_weights import Given, start_from

OWN = {
    "encoder_t2w": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
    "encoder_adc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
    "head": {"kernel": jnp.zeros((2, 4))},
}


def state() -> TrainState:
    moments = {"m": jnp.ones(())}
    return TrainState(jnp.zeros((), jnp.int32), params=OWN, average=OWN, opt_state=moments)


def given(**arrays: tuple[int, ...]) -> Given:
    named = {name.replace("__", "/"): np.ones(shape, np.float32) for name, shape in arrays.items()}
    return Given(named, "fold 0 of runs/before")


def test_what_fits_in_name_and_shape_is_taken_and_the_rest_is_said():
    found, words = start_from(
        state(),
        given(
            encoder_t2w__kernel=(3, 2),
            encoder_t2w__bias=(2,),
            encoder_hbv__bias=(2,),
            head__kernel=(2, 1),
        ),
    )
    ones = {name for name, value in flatten_weights(found.params).items() if (value == 1).all()}
    assert ones == {"encoder_t2w/kernel", "encoder_t2w/bias"}
    jax.tree.map(np.testing.assert_array_equal, found.average, found.params)
    assert found.opt_state == {"m": jnp.ones(())}
    assert words == (
        "starts from fold 0 of runs/before: 2 of 5 arrays; drawn anew: encoder_adc/bias, "
        "encoder_adc/kernel, head/kernel (2 x 4, given 2 x 1); not used of it: encoder_hbv/bias"
    )


def test_average_is_a_copy_as_a_step_gives_up_both():
    found, _ = start_from(state(), given(head__kernel=(2, 4)))
    taken = found.params["head"]["kernel"], found.average["head"]["kernel"]
    assert taken[0].unsafe_buffer_pointer() != taken[1].unsafe_buffer_pointer()


def test_weights_of_which_nothing_fits_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"at least one array .* got encoder_dce/bias of fold 0 of runs/before for "
        r"encoder_adc/bias, .* Use the network and the modalities of that run",
    ):
        start_from(state(), given(encoder_dce__bias=(2,)))


def test_a_path_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"a run folder or an artifact; got nothing at no/such"):
        given_weights.given_weights(Path("no/such"), Config(), 0)


@pytest.fixture
def before(tmp_path, monkeypatch) -> RunFolder:
    """A run of three folds, two of them done, whose weights are their number."""
    folder = RunFolder(tmp_path / "before")
    folder.path.mkdir()
    Folds((("a",), ("b",), ("c",))).save(folder.folds)
    data = dataclasses.replace(DataConfig(), name="nifti_folder", path=Path("mine"))
    monkeypatch.setattr(RunFolder, "read_config", lambda self: Config(data=data, num_folds=3))
    monkeypatch.setattr(RunFolder, "is_done", lambda self, fold: fold in (1, 2))
    monkeypatch.setattr(
        given_weights, "load_params", lambda run, fold: {"head": {"kernel": np.full((2, 4), fold)}}
    )
    return folder


@pytest.mark.parametrize(("fold", "taken"), [(0, 1), (1, 1), (2, 2), (3, 1)])
def test_a_fold_starts_from_the_one_of_its_number_else_from_the_first(before, fold, taken):
    found = given_weights.given_weights(before.path, Config(), fold)
    assert found.whose == f"fold {taken} of {before.path}"
    assert (found.weights["head/kernel"] == taken).all()


def test_weights_learnt_from_cases_that_the_fold_validates_are_refused(before):
    data = RunFolder(before.path).read_config().data
    absolute = dataclasses.replace(data, path=Path("mine").absolute())
    for same in (Config(data=data), Config(data=absolute)):
        given_weights.given_weights(before.path, same, 1, ["b"])
        with pytest.raises(
            ConfigError,
            match=r"fold 1 starts from fold 1 of .* trained on a\. Take the folds of",
        ):
            given_weights.given_weights(before.path, same, 1, ["a", "b"])


def test_equal_names_in_another_data_set_are_said(before):
    found = given_weights.given_weights(before.path, Config(), 1, ["a", "b"])
    assert found.whose == (
        f"fold 1 of {before.path} (trained on a, names that this fold validates: see that they are "
        "other patients)"
    )


def test_the_network_of_all_cases_is_trained_on_every_case_of_the_folds():
    drawn = Folds((("a",), ("b", "c")))
    split = Folds((("c",),), trained=(("a", "b"),), test=("d",))
    assert training_cases(drawn, ALL) == training_cases(split, ALL) == ("a", "b", "c")
    assert training_cases(drawn, 0) == ("b", "c")
    assert training_cases(split, 0) == ("a", "b")


def test_only_a_fold_that_begins_takes_them(before, tmp_path, monkeypatch, capsys):
    config = Config(init=before.path)
    member = FoldInTraining(config, Fold(2, ["x"], ["y"], tmp_path / "fold_2"), "data")
    begun = member.resume(state())
    assert (begun.params["head"]["kernel"] == 2).all()
    words = f"starts from fold 2 of {before.path}: 1 of 5 arrays"
    assert f"fold 2 (3 of 5): {words}" in capsys.readouterr().out
    assert member.done.started_from.startswith(words)
    member.save(7, begun)
    member.close()

    monkeypatch.setattr(fold_module, "given_weights", None)  # would fail if it were called
    again = FoldInTraining(config, Fold(2, ["x"], ["y"], tmp_path / "fold_2"), "data")
    again.resume(state())
    assert again.start == 7
    assert again.done.started_from.startswith(words)
    again.close()
