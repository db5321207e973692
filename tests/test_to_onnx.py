"""An exported model as ONNX: what is converted, and what onnxruntime makes of it."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import export, to_onnx
from cmsad_jax.modules import CMSAD, NetworkConfig
from cmsad_jax.modules.network import apply, probabilities
from cmsad_jax.named_weights import flatten_weights, unflatten_weights
from cmsad_jax.types import ConfigError
from tests.networks import random_params, tiny_config

WINDOW = (4, 16, 16)


def model_of(config: NetworkConfig, *, members: int = 1, window=WINDOW, **description):
    """A model of random weights that says what its network is."""
    network = CMSAD(config)
    image = jnp.zeros((1, *window, len(config.modalities)))
    weights = tuple(
        flatten_weights(random_params(network, image, seed=seed)) for seed in range(members)
    )

    @jax.jit
    def predict(weights, windows, present):
        return probabilities(apply(network, unflatten_weights(weights), windows, present).logits)

    facts = export.Description(
        modalities=config.modalities,
        target="lesion",
        classes=("lesion",),
        window=window,
        preprocess={"spacing_mm": [3, 1, 1]},
        overlap=0.5,
        batch_size=1,
        flip=True,
        threshold=0.5,
        allow_missing=True,
        members=tuple(f"fold_{n}" for n in range(members)),
        provenance={"config": {"network": json.loads(json.dumps(dataclasses.asdict(config)))}},
    )
    facts = dataclasses.replace(facts, **description)
    return export.Model(facts, {"predict": predict}, weights, "a card", "", ("0",) * members)


def primitives_of(jaxpr) -> set[str]:
    """Names of all operations, those of inner programs too."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= primitives_of(inner)
    return found


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(deep_supervision=1),
        pytest.param(tiny_config(rank=2, fusion="weighted"), marks=pytest.mark.slow),
    ],
)
def test_what_is_converted_computes_the_same_with_plain_operations(config):
    window = WINDOW[-len(config.encoder.strides[0]) :]
    model = model_of(config, members=2, window=window)
    windows = np.random.default_rng(0).normal(size=(1, *window, 3)).astype(np.float32)
    function = to_onnx.mean_of_members(model)
    flat = to_onnx.plain(function, (windows, np.ones((1, 3), bool)))
    for present in ([[True] * 3], [[True, False, True]]):
        present = np.array(present)
        given = windows * present.reshape(1, *[1] * len(window), 3)
        expected = np.mean([model.programs["predict"](w, given, present) for w in model.weights], 0)
        assert expected.std() > 1e-3
        np.testing.assert_allclose(flat(given, present), expected, atol=2e-6)
    names = primitives_of(jax.make_jaxpr(flat)(windows, present).jaxpr)
    odd = ("platform_index", "cond", "scan", "while", "jit", "pjit", "reduce", "custom_vjp_call")
    assert not names & {*odd, "custom_jvp_call", "stop_gradient", "checkpoint"}, names
    assert "conv_general_dilated" in names


@pytest.mark.parametrize("axes", [(1,), (0, 2), (0, 1, 2)])
def test_sums_in_parts_are_sums(axes):
    value = np.random.default_rng(0).integers(-9, 9, (7, 12, 1)).astype(np.float32)
    np.testing.assert_array_equal(
        to_onnx.plain(lambda x: jnp.sum(x, axes), (value,))(value), value.sum(axes)
    )


def test_a_long_sum_is_made_of_short_ones():
    """Added one after the other, the rounding errors of 64 thousand numbers add up as well."""
    flat = to_onnx.plain(lambda x: jnp.sum(x, -1), (np.zeros(2**16, np.float32),))
    jaxpr = jax.make_jaxpr(flat)(np.zeros(2**16, np.float32)).jaxpr
    summed = [e for e in jaxpr.eqns if e.primitive.name == "reduce_sum"]
    lengths = [e.invars[0].aval.shape[e.params["axes"][0]] for e in summed]
    assert lengths == [2**8, 2**8]


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({}, "a model must say what its network is; got none"),
        ({"config": 3}, "a model must say what its network is; got none"),
        (
            {"config": {"network": {}, "predict": {"mask_from": "distance"}}},
            "got one whose masks come from the distance",
        ),
        ({"config": {"network": {"colour": 1}}}, "the fields of this version; got 'colour'"),
    ],
)
def test_models_that_cannot_be_written_are_refused(provenance, message):
    model = model_of(tiny_config(), provenance=provenance)
    with pytest.raises(ConfigError, match=message):
        to_onnx.mean_of_members(model)


def test_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setattr(export, "load", lambda _: model_of(tiny_config()))
    with pytest.raises(SystemExit) as stopped:
        to_onnx.main(["model.cmsad", str(tmp_path / "model.onnx")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "error: ONNX needs the packages jax2onnx and onnxruntime; got no jax2onnx" in said
    assert 'pip install "cmsad-jax[onnx]"' in said
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.onnx
def test_onnxruntime_gives_the_probabilities_of_jax(tmp_path, monkeypatch, capsys):
    import onnx
    import onnxruntime

    model = model_of(tiny_config())
    monkeypatch.setattr(export, "load", lambda _: model)
    file = tmp_path / "new/model.onnx"
    to_onnx.main(["model.cmsad", str(file)])
    assert f"{file}: " in (said := capsys.readouterr().out)
    assert float(said.split("within ")[1].split()[0]) < 1e-5

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("windows", [1, *WINDOW, 3]),
        ("present", [1, 3]),
    ]
    (output,) = session.get_outputs()
    assert (output.name, output.shape) == ("probability", [1, *WINDOW, 1])
    windows = np.random.default_rng(7).normal(size=(1, *WINDOW, 3)).astype(np.float32)
    windows[..., 1] = 0
    present = np.array([[True, False, True]])
    (found,) = session.run(None, {"windows": windows, "present": present})
    expected = np.mean([model.programs["predict"](w, windows, present) for w in model.weights], 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    program = onnx.load(file)
    assert "ConstantOfShape" in {node.op_type for node in program.graph.node}
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer]
    assert not [c.shape for c in constants if c.size >= 1024 and (c == c.flat[0]).all()]
    facts = {entry.key: entry.value for entry in program.metadata_props}
    assert facts["model_card"] == "a card"
    assert json.loads(facts["description"])["preprocess"] == {"spacing_mm": [3, 1, 1]}

    monkeypatch.setattr(to_onnx, "convert", lambda _: file.read_bytes())
    monkeypatch.setattr(to_onnx, "TOLERANCE", 0.0)
    with pytest.raises(ConfigError, match="must give the probabilities of JAX within 0; got a"):
        to_onnx.write_onnx(model, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
