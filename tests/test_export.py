"""The artifact: what it computes, that it needs no Flax, and what it refuses."""

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import export as jax_export

from cmsad_jax import export, kernels
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules import CMSAD, EncoderConfig, FusionConfig, NetworkConfig
from cmsad_jax.modules.network import apply, probabilities
from cmsad_jax.named_weights import (
    flatten_weights,
    from_safetensors,
    to_safetensors,
    unflatten_weights,
)
from cmsad_jax.types import ConfigError
from tests.networks import random_params

WINDOW = (4, 16, 16)
NETWORK = CMSAD(
    NetworkConfig(
        modalities=("t2w", "adc"),
        encoder=EncoderConfig(
            channels=(4, 6),
            kernels=((1, 3, 3), (3, 3, 3)),
            strides=((1, 1, 1), (2, 2, 2)),
            blocks=(1, 1),
        ),
        fusion=FusionConfig(hidden=4),
    )
)
DESCRIPTION = export.Description(
    modalities=("t2w", "adc"),
    target="lesion",
    classes=("lesion",),
    window=WINDOW,
    preprocess={"spacing_mm": [3, 1, 1], "size": [6, 20, 20], "clip_percentiles": [0.5, 99.5]},
    overlap=0.5,
    batch_size=2,
    flip=True,
    threshold=0.5,
    allow_missing=True,
    members=("fold_0", "fold_3"),
)


def predict(flat, windows, present):
    output = apply(NETWORK, unflatten_weights(flat), windows, present)
    return probabilities(output.logits)


def attention(flat, windows, present):
    features = apply(NETWORK, unflatten_weights(flat), windows, present).features
    maps = [kernels.attention_energy(features[name][1]) for name in DESCRIPTION.modalities]
    return jnp.stack([kernels.resize_map(q, WINDOW) for q in maps], -1)


@pytest.fixture(scope="module")
def params():
    image = jnp.zeros((1, *WINDOW, 2))
    return [random_params(NETWORK, image, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def path(tmp_path_factory, params):
    weights = [flatten_weights(tree) for tree in params]
    programs = {
        function.__name__: export.export_program(
            function, weights[0], window=WINDOW, num_modalities=2
        )
        for function in (predict, attention)
    }
    file = tmp_path_factory.mktemp("artifact") / "model.cmsad"
    export.save(
        file,
        description=DESCRIPTION,
        programs=programs,
        weights=weights,
        card="# Card\n",
        license_text="Apache-2.0\n",
    )
    return file


@pytest.fixture(scope="module")
def model(path):
    return export.load(path)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(6, 20, 20, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(params, image):
    """What the network itself says, member by member."""
    program = jax.jit(lambda tree, x, p: probabilities(apply(NETWORK, tree, x, p).logits))
    return [
        sliding_window(
            lambda x, p, tree=tree: np.asarray(program(tree, x, p)),
            image,
            np.array([True, False]),
            window=WINDOW,
            num_classes=1,
            flip_axes=(2,),
        )
        for tree in params
    ]


def test_artifact_predicts_what_the_network_predicts(model, image, expected):
    prediction = model.predict(image, np.array([True, False]))
    np.testing.assert_allclose(prediction.probability, np.mean(expected, 0), atol=1e-5)
    np.testing.assert_allclose(prediction.disagreement, np.std(expected, 0), atol=1e-5)
    assert prediction.disagreement.max() > 1e-3
    one = model.select(["fold_3"]).predict(image, np.array([True, False]))
    np.testing.assert_allclose(one.probability, expected[1], atol=1e-5)
    assert not one.disagreement.any()


def test_attention_of_an_absent_modality_is_zero(model, image):
    energy = model.predict(image, np.array([True, False]), program="attention").probability
    assert energy.shape == (6, 20, 20, 2)
    assert (energy.max((0, 1, 2)) > 0).tolist() == [True, False]


def test_artifact_needs_neither_flax_nor_the_network(path, image, expected, tmp_path):
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax", "orbax") or name.startswith((
            "cmsad_jax.modules", "cmsad_jax.kernels", "cmsad_jax.training", "cmsad_jax.losses")):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import numpy as np
import cmsad_jax.export
model = cmsad_jax.export.load({str(path)!r})
image = np.load({str(tmp_path / "image.npy")!r})
np.save({str(tmp_path / "result.npy")!r}, model(image, np.array([True, False])))
"""
    np.save(tmp_path / "image.npy", image)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    result = np.load(tmp_path / "result.npy")
    np.testing.assert_allclose(result, np.mean(expected, 0), atol=1e-5)


def test_program_takes_any_batch_size_and_is_for_every_platform(path, model):
    with zipfile.ZipFile(path) as archive:
        content = archive.read("programs/predict.stablehlo")
    assert set(jax_export.deserialize(bytearray(content)).platforms) == {"cpu", "cuda", "tpu"}
    windows = np.zeros((1, *WINDOW, 2), np.float32)  # elsewhere in this file it is 2
    result = model.programs["predict"](model.weights[0], windows, np.ones((1, 2), bool))
    assert result.shape == (1, *WINDOW, 1)


def test_weights_are_safetensors_for_others(path, params):
    with zipfile.ZipFile(path) as archive:
        weights = safetensors.numpy.load(archive.read("weights/fold_3.safetensors"))
    flat = flatten_weights(params[1])
    assert weights.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(weights[name], value)


def test_safetensors_of_others_are_read():
    arrays = {
        "b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    content = safetensors.numpy.save(arrays, metadata={"note": "x"})
    read = from_safetensors(content)
    assert read.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(read[name], value)


def test_names_of_the_weights_are_stable():
    """Published weights are found by these names: a change needs a new ``export.VERSION``."""
    stages = {
        "channels": (8, 16, 32),
        "kernels": ((1, 3, 3), (1, 3, 3), (3, 3, 3)),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "blocks": (1, 1, 1),
    }
    network = CMSAD(NetworkConfig(encoder=EncoderConfig(**stages)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 12, 48, 48, 3)))
    names = flatten_weights(shapes["params"])
    assert "encoder_t2w/stage1_block0/Conv_0/kernel" in names
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert (export.VERSION, len(names), digest[:16]) == (1, 149, "b7e686d49979c64f")


def test_flattened_weights_become_the_tree_again(params):
    again = unflatten_weights(flatten_weights(params[0]))
    assert jax.tree.structure(again) == jax.tree.structure(params[0])


def test_equal_contents_give_equal_files(path, params, tmp_path):
    with zipfile.ZipFile(path) as archive:
        programs = {n: archive.read(f"programs/{n}.stablehlo") for n in ("predict", "attention")}
    export.save(
        tmp_path / "again.cmsad",
        description=DESCRIPTION,
        programs=programs,
        weights=[flatten_weights(tree) for tree in params],
        card="# Card\n",
        license_text="Apache-2.0\n",
    )
    assert (tmp_path / "again.cmsad").read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.cmsad"]


def test_identity_is_of_the_weights_and_what_they_mean(path, model, tmp_path):
    def sha256(**changes):
        edit(path, tmp_path / "edited", lambda m: m["description"].update(changes))
        return export.load(tmp_path / "edited").sha256

    assert sha256(license="MIT", threshold=0.4) == model.sha256
    assert sha256(target="gland") != model.sha256
    assert model.select(["fold_0"]).sha256 != model.sha256


def edit(source, target, change, *, replace=None, add=None):
    """Copy an artifact with another manifest, contents (checksums made to fit) or entries."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    files |= replace or {}
    for name, content in (replace or {}).items():
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, content in {**files, **(add or {})}.items():
            archive.writestr(name, content)
    return target


def nothing(manifest):
    """Leave the manifest as it is."""


def test_unknown_facts_of_a_later_writer_are_passed_over(path, tmp_path, model):
    file = edit(path, tmp_path / "m", lambda m: m["description"].update(colour="blue"))
    assert export.load(file).description == model.description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), r"format version must be 1 to 1; got 2"),
        (lambda m: m.update(format="zip"), "a manifest that is not of format cmsad-model"),
        (lambda m: m.pop("files"), "must be an undamaged artifact"),
        (lambda m: m["files"].pop("LICENSE"), "entries that differ from the manifest: LICENSE"),
        (lambda m: m["description"].pop("window"), "must describe its model; got no window"),
        (lambda m: m["description"].update(window=[4, 8, 8]), "must hold a program for what it"),
        (lambda m: m["description"].update(members=["fold_9"]), r"got no weights/fold_9"),
        (lambda m: m["files"]["LICENSE"].update(sha256="0"), "a wrong checksum of LICENSE"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(path, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        export.load(edit(path, tmp_path / "m", change))


def test_contents_that_do_not_fit_are_refused(path, tmp_path):
    weights = "weights/fold_0.safetensors"
    half = safetensors.numpy.save({"a": np.zeros(3, np.float16)})
    for replace, message in (
        ({"programs/predict.stablehlo": b"nonsense"}, "programs that this JAX can read"),
        ({weights: b"nonsense"}, "weights must be float32 in the safetensors format"),
        ({weights: half}, "weights must be float32 .* got .*fold_0.safetensors with: a is F16"),
        ({weights: to_safetensors({"a": np.zeros(3)})}, "other names or shapes"),
    ):
        with pytest.raises(ConfigError, match=message):
            export.load(edit(path, tmp_path / "m", nothing, replace=replace))


def test_hostile_archives_write_nothing_and_are_refused(path, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    evil = {"../evil": b"x", "/tmp/cmsad_evil": b"x"}
    with pytest.raises(ConfigError, match="entries that differ from the manifest"):
        export.load(edit(path, tmp_path / "unlisted", nothing, add=evil))
    # listed in the manifest they are read, into memory, and used for nothing
    export.load(edit(path, tmp_path / "listed", nothing, replace=evil))
    assert list(home.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/cmsad_evil").exists()

    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"0" * 10**7)
    with pytest.raises(ConfigError, match="compressed or repeated entries"):
        export.load(tmp_path / "bomb")


def test_damage_is_noticed_or_harmless(path, model):
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="must be an undamaged artifact"):
        export.load(io.BytesIO(content[:-1000]))
    rng = np.random.default_rng(0)
    noticed = 0
    directory = range(content.rindex(b"PK\x01\x02"), len(content))  # of the last entry
    anywhere = [(position, 0x10) for position in rng.integers(0, len(content), 30)]
    for position, bits in anywhere + [(at, 1 << bit) for at in directory for bit in range(8)]:
        damaged = bytearray(content)
        damaged[position] ^= bits
        try:
            assert export.load(io.BytesIO(damaged)).sha256 == model.sha256
        except ConfigError:
            noticed += 1
    assert noticed >= 25


def test_other_accelerators_are_refused(path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "rocm")
    with pytest.raises(ConfigError, match=r"got rocm, and programs for cpu, cuda, tpu. Set JAX_PL"):
        export.load(path)


def test_lack_of_flatbuffers_is_said(path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install flatbuffers"):
        export.load(path)


def test_no_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"an artifact must be a file; got .*nowhere"):
        export.load(tmp_path / "nowhere")


def test_inputs_that_do_not_fit_are_refused(model, image):
    with pytest.raises(ConfigError, match="one channel, and present one entry"):
        model(image[..., :1])
    strict = dataclasses.replace(
        model, description=dataclasses.replace(model.description, allow_missing=False)
    )
    with pytest.raises(ConfigError, match=r"got none for adc. Add the missing modality"):
        strict(image, np.array([True, False]))
    with pytest.raises(ConfigError, match="got none for t2w, adc"):
        model(image, np.zeros(2, bool))
    with pytest.raises(ConfigError, match=r"program must be one of .*; got 'gates'"):
        model.predict(image, program="gates")
    with pytest.raises(ConfigError, match="members must be among fold_0, fold_3; got fold_1"):
        model.select(["fold_1"])
