"""The nonlinearity of blocks: its values, and that it is that of all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cmsad_jax.modules import CMSAD
from cmsad_jax.modules.blocks import Activation
from cmsad_jax.modules.network import apply
from cmsad_jax.types import ConfigError
from tests.networks import TINY_3D, random_params, tiny_batch, tiny_config

EXPECTED = {
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "gelu": lambda x: x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_values_are_those_of_the_equations(kind):
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(Activation(kind)(jnp.asarray(x)), EXPECTED[kind](x), atol=1e-6)
    assert Activation(kind)(jnp.zeros(1)) == 0, "an absent modality stays absent"


def logits(**encoder):
    """Of a network with these fields of its encoder, the same weights for all."""
    config = tiny_config(fusion="concat", deep_supervision=1)
    network = CMSAD(
        dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **encoder))
    )
    batch = tiny_batch()
    params = random_params(CMSAD(config), jnp.asarray(batch["image"]))
    return np.asarray(
        jax.jit(lambda p, x: apply(network, p, x).logits)(params, jnp.asarray(batch["image"]))
    )


def test_a_network_takes_its_activation_everywhere():
    assert np.abs(logits(activation="relu") - logits()).max() > 1e-3
    np.testing.assert_allclose(logits(negative_slope=0.0), logits(activation="relu"), atol=1e-5)
    np.testing.assert_array_equal(logits(activation="leaky_relu"), logits())
    text = jax.jit(CMSAD(tiny_config()).init).trace(jax.random.key(0), jnp.zeros((1, 4, 16, 16, 3)))
    relu = dataclasses.replace(TINY_3D, activation="silu")
    other = jax.jit(CMSAD(dataclasses.replace(tiny_config(), encoder=relu)).init).trace(
        jax.random.key(0), jnp.zeros((1, 4, 16, 16, 3))
    )
    assert "leaky_relu" in str(text.jaxpr)
    assert "leaky_relu" not in str(other.jaxpr), "those of the decoder too"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swish"}, "activation of EncoderConfig must be one of leaky_relu, relu, e"),
        ({"negative_slope": 1.0}, r"negative_slope must lie in \[0, 1\); got 1.0. Use 0.01."),
        ({"negative_slope": -0.1}, r"negative_slope must lie in \[0, 1\); got -0.1."),
        ({"negative_slope": float("nan")}, r"negative_slope must lie in \[0, 1\); got nan."),
        (
            {"activation": "relu", "negative_slope": 0.2},
            "a negative slope is that of leaky_relu; got 0.2 and relu. Leave one of the two out.",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields, message, without_type_checks):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY_3D, **fields)
