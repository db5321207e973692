"""The artifact: what it computes, that it needs no Flax, and what it refuses."""

import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
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
    check_weights,
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


def edit(source, target, change, *, replace=None, add=None, text=None):
    """Copy an artifact with another manifest, contents (checksums made to fit) or entries.

    ``text`` turns the manifest's text into another one.
    """
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    files |= replace or {}
    for name, content in (replace or {}).items():
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    change(manifest)
    written = json.dumps(manifest)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("manifest.json", text(written) if text else written)
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
        (lambda m: m["files"]["LICENSE"].update(bytes=10**12), "another size of LICENSE"),
        (lambda m: m["files"]["LICENSE"].pop("bytes"), "another size of LICENSE"),
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
        export.load(edit(path, tmp_path / "unlisted", nothing, add={"evil": b"x"}))
    for name, content in evil.items():
        for place in ({"add": {name: content}}, {"replace": {name: content}}):
            with pytest.raises(ConfigError, match=f"cannot be a file's name, '{name}'. Copy or"):
                export.load(edit(path, tmp_path / "evil.cmsad", nothing, **place))
    assert list(home.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/cmsad_evil").exists()

    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"0" * 10**7)
    with pytest.raises(ConfigError, match="compressed or repeated entries"):
        export.load(tmp_path / "bomb")


def describing(**changes):
    """A trick: these fields in the description."""
    return {"change": lambda m: m["description"].update(changes)}


def holding(name, content):
    """A trick: this file, listed as it is."""
    return {"replace": {name: content}}


def nested(depth):
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


def spoilt_weights(value):
    """Weights of the last member, of the right names and shapes, one of them of this value."""

    def replacement(path):
        with zipfile.ZipFile(path) as archive:
            member = max(entry for entry in archive.namelist() if entry.startswith("weights/"))
            weights = dict(from_safetensors(archive.read(member)))
        name = "encoder_t2w/stage0_block0/Conv_0/kernel"
        weights[name] = weights[name].copy()
        weights[name].flat[5] = value
        return {"replace": {member: to_safetensors(weights)}}

    return replacement


def spoilt_program(change):
    """A program changed by its bytes, or by its ``jax_export.Exported``."""

    def replacement(path):
        with zipfile.ZipFile(path) as archive:
            content = archive.read("programs/predict.stablehlo")
        return {"replace": {"programs/predict.stablehlo": change(content)}}

    return replacement


def of_newer_bytecode(content):
    start = content.index(b"ML\xefR") + 4
    return content[:start] + bytes([2 * 40 + 1]) + content[start + 1 :]


def with_unknown_operation(content):
    start = content.index(b"reduce_v") + len(b"reduce_v")
    return content[:start] + b"9" + content[start + 1 :]


def of_newer_calls(content):
    program = jax_export.deserialize(bytearray(content))
    return bytes(dataclasses.replace(program, calling_convention_version=99).serialize())


def program_of(function, *shapes, **options):
    return bytes(jax_export.export(jax.jit(function), **options)(*shapes).serialize())


SHAPES = (
    {"a": jax.ShapeDtypeStruct((), jnp.float32)},
    jax.ShapeDtypeStruct((2, *WINDOW, 2), jnp.float32),
    jax.ShapeDtypeStruct((2, 2), jnp.bool_),
)
ALIASED = json.dumps(
    {str(i): {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(9)}
).encode()

TRICKS = {
    # names that become files' names, or reach a terminal or a page
    "class outside": (describing(classes=["../x"]), "classes must be names of .*; got '../x'. Re"),
    "class with escapes": (describing(classes=["a\x1b[2J"]), "control characters, .* in manifest"),
    "class of markup": (
        describing(classes=["<script>"]),
        "classes must be names .* got '<script>'",
    ),
    "no class": (describing(classes=[]), r"classes must be a tuple of one or more names; got \(\)"),
    "class twice": (describing(classes=["A", "a"]), "classes must be distinct names, in more than"),
    "modality is a path": (describing(modalities=["a/b", "adc"]), "modalities must be names of"),
    "modality is a number": (describing(modalities=[1, 2]), "modalities must be names .*; got 1"),
    "modalities are text": (describing(modalities="t2"), "modalities must be a tuple .*; got 't2'"),
    "member outside": (
        describing(members=["../fold_0"]),
        "members must be names .* got '../fold_0'",
    ),
    "target outside": (describing(target="/tmp/x"), "target must be names .*; got '/tmp/x'"),
    "target is a list": (describing(target=["a"]), "target must be names of"),
    # texts
    "licence of lines": (describing(license="a\nb"), "license must be one line of plain text"),
    "licence that runs backwards": (describing(license="a\u202eb"), "control characters, "),
    "half a character": (describing(provenance={"a": "\ud800"}), "control characters, "),
    "key with escapes": (describing(metrics={"\x1b[2J": 1}), "control characters, "),
    "card with escapes": (
        holding("MODEL_CARD.md", b"a\x1b[2Jb"),
        "control characters in MODEL_CARD",
    ),
    "card of other bytes": (holding("MODEL_CARD.md", b"\xff\xfe"), "undamaged .*can't decode byte"),
    "licence of many bytes": (
        holding("LICENSE", b"a" * (2**20 + 1)),
        "LICENSE of 1048577 bytes, mo",
    ),
    # odd types and numbers
    "window is a number": (describing(window=4), "window must be 2 or 3 numbers of voxels; got 4"),
    "window of fractions": (describing(window=[4.0, 16, 16]), "window must be 2 or 3 numbers of v"),
    "window without end": (describing(window=[10**5] * 3), "window must be at most 2147483648 vox"),
    "batch without end": (describing(batch_size=10**9), "window must be at most 2147483648 voxels"),
    "batch of none": (describing(batch_size=0), "batch_size must be a whole number of at least 1"),
    "grid without end": (
        describing(preprocess={"size": [2**20] * 3}),
        "size of preprocess must be at most 2147483648 voxels",
    ),
    "grid of text": (
        describing(preprocess={"size": "big"}),
        "size of preprocess must be 3 numbers",
    ),
    "spacing below 0": (
        describing(preprocess={"spacing_mm": [3, -1, 1]}),
        "spacing_mm of preprocess must be 3 numbers above 0 and at most 1000; got .3, -1, 1",
    ),
    "overlap of all": (describing(overlap=1), "overlap must be a number of at least 0 and below 1"),
    "threshold is text": (describing(threshold="x"), "threshold must be a number between 0 and 1"),
    "flip is a number": (describing(flip=3), "flip must be true or false; got 3"),
    "provenance is a list": (describing(provenance=[1]), "provenance must be a table of values"),
    "description is a list": ({"change": lambda m: m.update(description=[])}, "got no modalities"),
    "version is true": (
        {"change": lambda m: m.update(version=True)},
        "version must be 1 to 1; got T",
    ),
    "version is text": (
        {"change": lambda m: m.update(version="1")},
        "version must be 1 to 1; got '1",
    ),
    "files are a list": (
        {"change": lambda m: m.update(files=list(m["files"]))},
        "no list of files in manifest.json",
    ),
    "file is a number": (
        {"change": lambda m: m["files"].update(LICENSE=3)},
        "another size of LICENSE",
    ),
    "number that is none": (describing(metrics={"a": float("nan")}), "the number nan in manifest"),
    "number without end": (
        {
            "change": nothing,
            "text": lambda text: text.replace('"overlap": 0.5', '"overlap": 1e999'),
        },
        "the number inf in manifest",
    ),
    # depth and size
    "deep": (describing(metrics={"a": nested(40)}), "values nested deeper than 32 in manifest"),
    "deeper than Python": (
        {"change": nothing, "text": lambda text: "[" * 10**5 + "]" * 10**5},
        "recursion|manifest that is not of format",
    ),
    "long manifest": (
        {"change": nothing, "text": lambda text: text + " " * 2**24},
        "manifest.json of .* bytes, more than 16777216",
    ),
    "long number": (
        {
            "change": nothing,
            "text": lambda text: text.replace('"overlap": 0.5', '"a": ' + "9" * 5000),
        },
        "must be an undamaged artifact",
    ),
    # weights
    "weight is no number": (
        spoilt_weights(np.nan),
        r"at most 1e\+06 in size; got nan in encoder_t2w/stage0_block0/Conv_0/kernel of .*"
        r"weights/fold_3.safetensors \(1 of 36 values\). The training diverged",
    ),
    "weight without end": (spoilt_weights(-np.inf), "got -inf in encoder_t2w/stage0_block0/Conv_0"),
    "absurd weight": (
        spoilt_weights(1e38),
        r"got 1e\+38 in encoder_t2w/stage0_block0/Conv_0/kernel",
    ),
    "header without end": (
        holding("weights/fold_0.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "with: a header of 4611686018427387904 bytes in a file of 10",
    ),
    "header that is deep": (
        holding("weights/fold_0.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5),
        "safetensors format; got .*recursion",
    ),
    "weights over each other": (
        holding(
            "weights/fold_0.safetensors", len(ALIASED).to_bytes(8, "little") + ALIASED + bytes(8)
        ),
        "with: arrays that overlap, 2 among them",
    ),
    # programs
    "newer bytecode": (
        spoilt_program(of_newer_bytecode),
        "programs that this JAX can read; got in",
    ),
    "unknown operation": (
        spoilt_program(with_unknown_operation),
        "programs that this JAX can read",
    ),
    "newer calls": (spoilt_program(of_newer_calls), "got in .*: calling convention 99, known are"),
    "program of half": (
        spoilt_program(lambda content: content[:-99]),
        "programs that this JAX can",
    ),
    "program of another thing": (
        holding("programs/predict.stablehlo", program_of(jnp.tanh, SHAPES[1])),
        "predict.stablehlo must take weights, windows and present; got",
    ),
    "program of one batch": (
        spoilt_program(lambda _: export_of_shapes(lambda w, x, p: x[..., :1])),
        "must hold a program that gives .* for 1 windows; got",
    ),
    "program of other outputs": (
        spoilt_program(lambda _: export_of_shapes(lambda w, x, p: x, symbolic=True)),
        r"gives float32\[1, 4, 16, 16, 1\] for 1 windows; got float32\[1, 4, 16, 16, 2\]. Export",
    ),
    "program without checks": (
        spoilt_program(
            lambda content: bytes(
                dataclasses.replace(
                    jax_export.deserialize(bytearray(content)),
                    disabled_safety_checks=(jax_export.DisabledSafetyCheck.platform(),),
                ).serialize()
            )
        ),
        "a program exported without JAX's checks of safety",
    ),
}


def export_of_shapes(function, *, symbolic=False):
    """A program of the right arguments, for two windows or for any number."""
    shapes = jax.eval_shape(lambda: random_params_shapes())
    batch = jax_export.symbolic_shape("b")[0] if symbolic else 2
    return program_of(
        function,
        shapes,
        jax.ShapeDtypeStruct((batch, *WINDOW, 2), jnp.float32),
        jax.ShapeDtypeStruct((batch, 2), jnp.bool_),
        platforms=export.PLATFORMS,
    )


def random_params_shapes():
    """Names and shapes of the weights."""
    return flatten_weights(NETWORK.init(jax.random.key(0), jnp.zeros((1, *WINDOW, 2)))["params"])


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_of_strangers_are_refused_and_named(
    name, path, tmp_path, monkeypatch, without_type_checks
):
    trick, message = TRICKS[name]
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    options = trick(path) if callable(trick) else dict(trick)
    change = options.pop("change", nothing)
    file = edit(path, tmp_path / "model.cmsad", change, **options)
    with pytest.raises(ConfigError, match=message) as refused:
        export.load(file)
    text = str(refused.value)
    assert text.isprintable()  # whatever the trick was, the terminal is not told it
    assert len(text) < 1000
    assert [*home.iterdir()] == []
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "model.cmsad"}


def test_entries_of_more_bytes_than_the_archive_are_refused(path, tmp_path):
    """Several names in the directory for one place in the file: a bomb without compression."""
    file = edit(path, tmp_path / "bomb", nothing, add={f"copy_{i}": b"x" * 10**5 for i in range(3)})
    content = file.read_bytes()
    first = content.index(b"copy_0" + b"x" * 10)
    second = content.index(b"copy_1" + b"x" * 10)
    third = content.index(b"copy_2" + b"x" * 10)
    # The same three entries with two of the three contents cut out of the file.
    cut = content[: second - 30] + content[third + 6 + 10**5 :]
    place = cut.rindex(b"PK\x05\x06") + 16
    removed = len(content) - len(cut)
    start = int.from_bytes(cut[place : place + 4], "little") - removed
    cut = bytearray(cut)
    cut[place : place + 4] = start.to_bytes(4, "little")
    for name in (b"copy_1", b"copy_2"):
        at = cut.index(name, start) - 4
        cut[at : at + 4] = (first - 30).to_bytes(4, "little")
    with pytest.raises(ConfigError, match=r"entries of more bytes than the|Overlapped entries"):
        export.load(io.BytesIO(bytes(cut)))


def test_what_load_would_refuse_is_not_saved(path, params):
    weights = [flatten_weights(tree) for tree in params]
    good = {
        "description": DESCRIPTION,
        "programs": {},
        "weights": weights,
        "card": "card",
        "license_text": "text",
    }
    spoilt = [weights[0], {**weights[1], "decoder/head0/bias": np.array([np.nan])}]
    for change, message in (
        (
            {"description": dataclasses.replace(DESCRIPTION, classes=("../x",))},
            "got '../x'. Rename",
        ),
        (
            {"description": dataclasses.replace(DESCRIPTION, metrics={"dice": float("nan")})},
            "JSON that others can read; got the number nan. Leave it out",
        ),
        ({"card": "a\x1bb"}, "MODEL_CARD.md must be plain text; got control characters in it."),
        ({"weights": spoilt}, r"got nan in decoder/head0/bias of member fold_3 \(1 of 1 values\)"),
    ):
        target = io.BytesIO()
        with pytest.raises(ConfigError, match=message):
            export.save(target, **{**good, **change})
        assert not target.getvalue()


def test_weights_are_checked_as_trees_and_flat(params):
    check_weights(params[0])
    check_weights(flatten_weights(params[0]))
    check_weights({"a": np.array([1e6, -1e6]), "none": np.zeros((0, 3))})
    for value, said in ((1.1e6, r"1.1e\+06"), (np.nan, "nan"), (np.inf, "inf"), (-1e38, "-1e.38")):
        tree = {"a": np.zeros(2), "b": {"c": np.array([[0.0, value]])}}
        with pytest.raises(ConfigError, match=rf"got {said} in b/c of my model \(1 of 2 values\)"):
            check_weights(tree, "my model")
    with pytest.raises(ValueError, match="got nan in a of the weights"):
        check_weights({"a": jnp.array([jnp.nan], jnp.bfloat16)})


def noticed(content: bytes, sha256: str, damages: Iterable[tuple[int, int]]) -> int:
    """How many of the damages ``(position, bits)`` are refused; the others must change nothing."""
    count = 0
    for position, bits in damages:
        damaged = bytearray(content)
        damaged[position] ^= bits
        try:
            assert export.load(io.BytesIO(damaged)).sha256 == sha256
        except ConfigError:
            count += 1
    return count


def test_programs_do_not_name_the_folders_of_the_machine_that_they_were_made_on(path):
    files = {*re.findall(rb"[\w./-]+\.py\b", path.read_bytes())}
    assert b"network.py" in files, "where an operation comes from is kept"
    assert not [name for name in files if b"/" in name]


def test_damage_is_noticed_or_harmless(path, model):
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="must be an undamaged artifact"):
        export.load(io.BytesIO(content[:-1000]))
    anywhere = np.random.default_rng(0).integers(0, len(content), 30)
    assert noticed(content, model.sha256, ((position, 0x10) for position in anywhere)) >= 25


def test_damage_of_the_directory_is_noticed_or_harmless(tmp_path):
    """Of an artifact with a program of one line, as reading one takes most of the time."""
    weights = {"scale": np.ones(1, np.float32)}
    program = export.export_program(
        lambda flat, windows, present: jax.nn.sigmoid(flat["scale"] * windows[..., :1]),
        weights,
        window=WINDOW,
        num_modalities=2,
    )
    file = tmp_path / "small.cmsad"
    export.save(
        file,
        description=DESCRIPTION,
        programs={"predict": program},
        weights=[weights, weights],
        card="# Card\n",
        license_text="Apache-2.0\n",
    )
    content = file.read_bytes()
    last = range(content.rindex(b"PK\x01\x02"), len(content))  # entry, and the end of the directory
    damages = [(at, 1 << at % 8) for at in last] + [(at, 1 << (at + 4) % 8) for at in last]
    assert 0 < noticed(content, export.load(file).sha256, damages) < len(damages)


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
    with pytest.raises(ConfigError, match=r"got list and \(2,\). Stack the modalities"):
        model.predict.__wrapped__(model, [image])
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
