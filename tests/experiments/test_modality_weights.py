"""Weights of modalities, of a fusion that has them: kept with the pictured cases and told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax.modules import CMSAD, FusionConfig
from data_pipelines.preparing.preprocessing import preprocess_case
from experiments.reporting import figures, views
from experiments.training.programs import compile_programs
from tests.data_pipelines.fabricate import raw_case
from tests.experiments.untrained_run import tiny_config
from tests.networks import random_params


def test_weights_of_modalities_are_kept_and_told(tmp_path):
    """Those of the network, of the modalities that are there, in the viewer and under a picture."""
    config = tiny_config()
    network = dataclasses.replace(config.network, fusion=FusionConfig(kind="weighted", hidden=4))
    config = dataclasses.replace(config, network=network)
    programs = compile_programs(config, jax.devices()[:1])
    case = preprocess_case(raw_case("a"), config.data)
    params = random_params(CMSAD(network), jnp.zeros((1, *config.train.crop, 2)))
    figures.save_figure(config, programs, params, case, tmp_path / "a.npz")
    view = views.read_view(tmp_path / "a.npz", "a", "Dice 0.5", 1, None)
    assert [*view.modality_weights] == ["t2w", "adc"]
    assert sum(view.modality_weights.values()) == pytest.approx(1, abs=1e-5)
    first = view.modality_weights["t2w"]
    assert view.caption == (
        f"Dice 0.5; weights of the modalities: t2w {first:.2f}, adc {1 - first:.2f}"
    )

    without = dataclasses.replace(case, present=np.array([True, False]))
    without.image[..., 1] = 0
    figures.save_figure(config, programs, params, without, tmp_path / "b.npz")
    assert views.read_view(tmp_path / "b.npz", "b", "", 1, None).modality_weights == {
        "t2w": pytest.approx(1),
        "adc": 0,
    }
    plain = compile_programs(tiny_config(), jax.devices()[:1])
    assert plain.modality_weights is None
