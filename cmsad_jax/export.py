"""A trained model in one file that JAX runs alone: programs, weights, and what surrounds them.

An artifact (``model.cmsad``) is a zip archive, nothing in it compressed:

``manifest.json``
    format name and version, the ``Description``, and the size and SHA-256 of every other file.
``programs/<name>.stablehlo``
    ``jax.export`` programs for cpu, cuda and tpu with a symbolic batch size. ``predict`` maps
    ``(weights, windows, present)`` to probabilities ``b *window k``; ``attention`` to the attention
    energy ``b *window m``.
    Some models have ``modality_weights``, ``b *window m``, and ``drawn``, ``b *window k``: see
    ``Model.predict``.
``weights/<member>.safetensors``
    float32 weights of each member of the ensemble, named by their path in the network
    (``encoder_t2w/stage0_block0/...``).
``first.cmsad``
    of a cascade alone: the artifact of its first network.
``MODEL_CARD.md``, ``LICENSE``
    for people.

``load`` needs jax, jaxtyping and flatbuffers; neither Flax nor any code of the network. Nothing is
ever unpacked to disk, and nothing in an archive is executed as Python. All of it is taken for a
stranger's: sizes are bounded by the archive's own before anything is allocated, names can become
file names, texts hold no control characters, settings are in range, weights are finite, programs
are parsed and their shapes followed. What a program computes cannot be judged: run models of people
you trust.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import numbers
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxtyping import Array, Bool, Float

from cmsad_jax.inference import EnsemblePrediction, predict_ensemble
from cmsad_jax.named_weights import (
    Weights,
    check_weights,
    first_line,
    from_safetensors,
    to_safetensors,
)
from cmsad_jax.types import NAME, ConfigError, check_names, check_number

FORMAT = "cmsad-model"
VERSION = 1
"""Of the archive's layout. A reader takes its own version and older ones."""

PLATFORMS = ("cpu", "cuda", "tpu")
"""What programs are exported for."""

_ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""What zipfile raises of a damaged archive; the last two where it seems encrypted or of a later
version."""

_MAX_MANIFEST = 2**24
_MAX_TEXT = 2**20
"""Bytes of the manifest, and of each text for people."""

_MAX_DEPTH = 32
"""Of nested values in the manifest."""

_MAX_VOXELS = 2**31
"""Of the reference grid, and of the windows of a call, all modalities together."""

_MANIFEST = "manifest.json"
_CARD = "MODEL_CARD.md"
_LICENSE = "LICENSE"
_FIRST = "first.cmsad"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a model takes, gives, and where it comes from.

    Attributes:
        modalities: names of the channels ``m``, in order.
        target: what is segmented.
        classes: names of the foreground classes; one of them means ``k = 1`` (sigmoid), else
            ``k`` counts the background as well, first.
        window: spatial shape the programs take.
        preprocess: reference grid and intensity scaling, as
            ``data_pipelines.config.PreprocessConfig``.
        overlap, batch_size, flip: of the sliding window; ``flip`` averages over left and right.
        threshold: probability above which a voxel belongs to the target.
        allow_missing: whether the model was trained for the absence of modalities.
        members: name of each set of weights, such as ``fold_0``.
        provenance: configuration, versions, commit, fingerprint of the data.
        metrics: of the run, per class.
        license: terms of use of the weights.
        labels, lesions: of a target with classes of its own, which label values make each class,
            and which class is a lesion, as ``data_pipelines.config.DataConfig``; ``classes`` are
            then the parts that the network tells apart.
        operating_point: how confidences are to be read, as
            ``experiments.measuring.operating_point.OperatingPoint``; empty where it is not known.
        box: voxels ``d h w`` of the grid of ``preprocess`` that the model sees, around what the
            first network of its cascade found, whose probability is one channel more, the last;
            empty where it is in none.
        margin_mm: of a model in a cascade, distance from what its first network found beyond which
            all is background, as ``experiments.prediction.cascade.beyond_margin``; None if it
            counts in the whole box. Whoever calls the model applies it: the programs do not.
    """

    modalities: tuple[str, ...]
    target: str
    classes: tuple[str, ...]
    window: tuple[int, ...]
    preprocess: Mapping[str, Any]
    overlap: float
    batch_size: int
    flip: bool
    threshold: float
    allow_missing: bool
    members: tuple[str, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    license: str = "unspecified"
    labels: tuple[str, ...] = ()
    lesions: tuple[str, ...] = ()
    operating_point: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    box: tuple[int, ...] = ()
    margin_mm: float | None = None

    @property
    def num_channels(self) -> int:
        """Channels of the image: one for each modality, and in a cascade the first's result."""
        return len(self.modalities) + bool(self.box)

    @property
    def num_outputs(self) -> int:
        """``k``: probabilities for each voxel."""
        return 1 if len(self.classes) == 1 else len(self.classes) + 1


def export_program(
    function: Callable[[Weights, Array, Array], Array],
    weights: Weights,
    *,
    window: Sequence[int],
    num_modalities: int,
    num_channels: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Serialise ``function(weights, windows, present)`` for any batch size.

    Args:
        function: pure, of windows ``b *window m`` (float32) and ``present`` ``b m``.
        weights: an example; only its names and shapes count.
        window: spatial shape of the windows.
        num_modalities: ``m``.
        num_channels: of the windows, if not ``m``.
        platforms: what it shall run on.

    Raises:
        ConfigError: flatbuffers, which ``jax.export`` writes with, is not installed.
    """
    _require_flatbuffers()
    (b,) = jax_export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(w.shape, jnp.float32) for name, w in weights.items()}
    with _without_folders():
        exported = jax_export.export(jax.jit(function), platforms=tuple(platforms))(
            shapes,
            jax.ShapeDtypeStruct((b, *window, num_channels or num_modalities), jnp.float32),
            jax.ShapeDtypeStruct((b, num_modalities), jnp.bool_),
        )
        return bytes(exported.serialize())


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Inside, programs name the files that they come from without the folders of this machine."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, r".*[\\/]")
    try:
        yield
    finally:
        jax.config.update(name, before)


def save(
    target: Path | io.BytesIO,
    *,
    description: Description,
    programs: Mapping[str, bytes],
    weights: Sequence[Weights],
    card: str,
    license_text: str,
    first: bytes | None = None,
) -> None:
    """Write an artifact; a file appears whole or not at all.

    Args:
        target: path, or a buffer to write into.
        description: with one name in ``members`` for each of ``weights``.
        programs: ``predict``, and others by name.
        weights: of each member.
        card: the model card, Markdown.
        license_text: terms of use in full.
        first: of a cascade, the artifact of its first network.

    Raises:
        ConfigError: a description, weights or texts that ``load`` would refuse.
    """
    _check_description(description)
    files = {f"programs/{name}.stablehlo": program for name, program in programs.items()}
    for member, values in zip(description.members, weights, strict=True):
        check_weights(values, f"member {member}")
        files[f"weights/{member}.safetensors"] = to_safetensors(values)
    for name, text in ((_CARD, card), (_LICENSE, license_text)):
        if not _is_plain(text):
            raise ConfigError(
                f"{name} must be plain text; got control characters in it. Remove them."
            )
        files[name] = text.encode()
    if first is not None:
        files[_FIRST] = first
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "description": dataclasses.asdict(description),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    text = json.dumps(manifest, indent=1)
    if fault := _fault_of_json(json.loads(text)):
        raise ConfigError(
            "a description must be JSON that others can read; got "
            f"{fault}. Leave it out of provenance and metrics."
        )
    files = {_MANIFEST: text.encode(), **files}
    if not isinstance(target, Path):
        _write_archive(target, files)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            _write_archive(file, files)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load(source: Path | str | io.BytesIO) -> "Model":
    """Read an artifact; the weights go to the default device.

    Raises:
        ConfigError: no such file; not an artifact, damaged, or of a newer version, of the format or
            of JAX; anything in it that cannot be or is not safe; no program for the accelerator at
            hand; or flatbuffers is missing.
    """
    name = str(source) if isinstance(source, Path | str) else "the artifact"
    if isinstance(source, Path | str) and not Path(source).is_file():
        raise ConfigError(f"an artifact must be a file; got {source}. Check the path.")
    return _load(source, name)


def _load(source: Path | str | io.BytesIO, name: str, *, within: bool = False) -> "Model":
    """``load``; the first network of a cascade lies ``within`` the artifact of the second."""
    manifest, files = _read_archive(source, name)
    if within and _FIRST in files:
        raise _refusal(name, "a cascade within a cascade")
    _require_flatbuffers()
    description = _description(manifest, name)
    programs = {
        path.removeprefix("programs/").removesuffix(".stablehlo"): _program(content, path, name)
        for path, content in files.items()
        if path.startswith("programs/")
    }
    members = [f"weights/{member}.safetensors" for member in description.members]
    absent = [path for path in ("programs/predict.stablehlo", *members) if path not in files]
    if absent:
        raise ConfigError(
            f"{name} must hold a program and the weights of each member; got no {absent[0]}. "
            "Export the run again."
        )
    platform = jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    known = programs["predict"].platforms
    if platform not in known:
        raise ConfigError(
            f"the accelerator must be one that {name} was exported for; got {platform}, and "
            f"programs for {', '.join(known)}. Set JAX_PLATFORMS=cpu."
        )
    weights = tuple(from_safetensors(files[path], f"{name}: {path}") for path in members)
    for path, values in zip(members, weights, strict=True):
        check_weights(values, f"{name}: {path}")
    for key, program in programs.items():
        _check_fit(program, description, weights, f"{name}: programs/{key}.stablehlo")
        num_outputs = _num_outputs(description, key)
        _check_result(program, description, weights[0], num_outputs, f"{name}: {key}")
    first = _first(files.get(_FIRST), description, name)
    # On CPUs the full effort doubles the time to compile and gains no speed.
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return Model(
        description=description,
        programs={
            key: jax.jit(program.call, compiler_options=options)
            for key, program in programs.items()
        },
        weights=tuple(jax.device_put(dict(member)) for member in weights),
        card=files.get(_CARD, b"").decode(),
        license_text=files.get(_LICENSE, b"").decode(),
        digests=tuple(manifest["files"][path]["sha256"] for path in members),
        first=first,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded artifact.

    Attributes:
        description: what it takes and gives.
        programs: ``(weights, windows, present) -> b *window k`` by name, jitted.
        weights: of each member, on the device.
        card: model card, Markdown.
        license_text: terms of use in full.
        digests: SHA-256 of each member's weights file.
        first: the first network of its cascade; None if it is in none.
    """

    description: Description
    programs: Mapping[str, Callable[..., Array]]
    weights: tuple[Mapping[str, Array], ...]
    card: str
    license_text: str
    digests: tuple[str, ...]
    first: "Model | None" = None

    @property
    def sha256(self) -> str:
        """Identity: of the weights and of what they mean; not of settings such as the threshold."""
        facts = dataclasses.asdict(self.description)
        names = ("modalities", "target", "classes", "window", "preprocess", "members")
        meaning = [{name: facts[name] for name in names}, self.digests]
        if self.first is not None:
            meaning += [facts["box"], self.first.sha256]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def __call__(
        self,
        image: Float[np.ndarray, "*space c"],
        present: Bool[np.ndarray, " m"] | None = None,
    ) -> Float[np.ndarray, "*space k"]:
        """Probabilities of one preprocessed case: the mean over members, windows and flips."""
        return self.predict(image, present).probability

    def predict(
        self,
        image: Float[np.ndarray, "*space c"],
        present: Bool[np.ndarray, " m"] | None = None,
        *,
        program: str = "predict",
    ) -> EnsemblePrediction:
        """Run a program over a whole image, with every member of the ensemble.

        Args:
            image: one case on the reference grid, scaled, float32; 0 where there is nothing. In a
                cascade its box, with the probability of the first network as last channel.
            present: its modalities; None is all.
            program: ``predict``; ``attention`` for the energy of each modality;
                ``modality_weights`` for its weight, the same at every voxel of a window; ``drawn``
                for the standard deviation over draws of the attention across slices.

        Raises:
            ConfigError: channels that are not the model's modalities, a modality missing that the
                model was not trained to miss, or an unknown program.
        """
        facts = self.description
        num_modalities = len(facts.modalities)
        present = np.ones(num_modalities, bool) if present is None else np.asarray(present, bool)
        self._check(image, present, program)
        return predict_ensemble(
            [functools.partial(self.programs[program], weights) for weights in self.weights],
            image,
            present,
            window=facts.window,
            num_classes=_num_outputs(facts, program),
            overlap=facts.overlap,
            batch_size=facts.batch_size,
            flip_axes=(len(facts.window) - 1,) if facts.flip else (),
            prior=bool(facts.box),
        )

    def select(self, members: Sequence[str]) -> "Model":
        """The model with some of its members, by name.

        Raises:
            ConfigError: for a name that is not among the members, or none.
        """
        names = self.description.members
        if not members or not set(members) <= set(names):
            raise ConfigError(
                f"members must be among {', '.join(names)}; got {', '.join(members) or 'none'}. "
                "Leave them out for all."
            )
        return dataclasses.replace(
            self,
            description=dataclasses.replace(self.description, members=tuple(members)),
            weights=tuple(self.weights[names.index(name)] for name in members),
            digests=tuple(self.digests[names.index(name)] for name in members),
            first=None if self.first is None else self.first.select(members),
        )

    def compile(self, program: str = "predict") -> None:
        """Compile a program now rather than at the first image."""
        facts = self.description
        windows = np.zeros((facts.batch_size, *facts.window, facts.num_channels), np.float32)
        present = np.ones((facts.batch_size, len(facts.modalities)), bool)
        jax.block_until_ready(self.programs[program](self.weights[0], windows, present))

    def _check(self, image: Any, present: np.ndarray, program: str) -> None:
        names = self.description.modalities
        shape = getattr(image, "shape", ())
        if shape[-1:] != (self.description.num_channels,) or present.shape != (len(names),):
            more = ", and of a cascade a channel of the first's result" if self.first else ""
            raise ConfigError(
                "the image must have one channel, and present one entry, for each of "
                f"{names}{more}; "
                f"got {f'shapes {shape}' if shape else type(image).__name__} and {present.shape}. "
                "Stack the modalities on the last axis."
            )
        missing = [name for name, there in zip(names, present, strict=True) if not there]
        if missing and (not self.description.allow_missing or len(missing) == len(names)):
            raise ConfigError(
                f"the model needs every one of {', '.join(names)}; got none for "
                f"{', '.join(missing)}. Add the missing modality, or use a model trained with "
                "--train.modality-dropout."
            )
        if program not in self.programs:
            raise ConfigError(
                f"the program must be one of {', '.join(self.programs)}; got {program!r}. "
                "Export the run again for others."
            )


def _num_outputs(description: Description, program: str) -> int:
    """Last axis of what a program returns."""
    of_modalities = program in ("attention", "modality_weights")
    return len(description.modalities) if of_modalities else description.num_outputs


def _write_archive(file: io.BytesIO | io.BufferedWriter, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            # The earliest time a zip can hold: equal contents give equal archives.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)


def _read_archive(
    source: Path | str | io.BytesIO, name: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and the files it lists, each verified. Entries that it does not list are refused."""
    try:
        if isinstance(source, io.BytesIO):
            archive_size = source.getbuffer().nbytes
        else:
            archive_size = Path(source).stat().st_size
        with zipfile.ZipFile(source) as archive:
            sizes = _entry_sizes(archive, archive_size, name)
            manifest = _manifest(archive, name)
            files = _listed_files(archive, sizes, manifest.get("files"), name)
    except ConfigError:
        raise
    except (*_ZIP_FAULTS, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise _refusal(name, first_line(error)) from error
    return manifest, files


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{name} must be an undamaged artifact of python -m experiments.export; got {reason}. "
        "Copy or export it again."
    )


def _entry_sizes(archive: zipfile.ZipFile, archive_size: int, name: str) -> dict[str, int]:
    """Bytes of each entry, before any is read: they fit into the archive, texts into bounds."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()) or any(
        entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
        for entry in entries.values()
    ):
        raise _refusal(name, "compressed or repeated entries")
    sizes = {path: entry.file_size for path, entry in entries.items()}
    if sum(sizes.values()) > archive_size:
        raise _refusal(name, f"entries of more bytes than the {archive_size} of the archive")
    for path in entries:
        if not all(NAME.fullmatch(part) for part in path.split("/")):
            raise _refusal(name, f"an entry that cannot be a file's name, {path!r:.80}")
    for path, largest in ((_MANIFEST, _MAX_MANIFEST), (_CARD, _MAX_TEXT), (_LICENSE, _MAX_TEXT)):
        if sizes.get(path, 0) > largest:
            raise _refusal(name, f"{path} of {sizes[path]} bytes, more than {largest}")
    if _MANIFEST not in entries:
        raise _refusal(name, f"an archive without {_MANIFEST}")
    return sizes


def _manifest(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    """The manifest: of this format, of a version that is known, and nothing odd in it."""
    manifest = json.loads(archive.read(_MANIFEST))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _refusal(name, f"a manifest that is not of format {FORMAT}")
    if fault := _fault_of_json(manifest):
        raise _refusal(name, f"{fault} in {_MANIFEST}")
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ConfigError(
            f"the format version must be 1 to {VERSION}; got {version!r:.80} in {name}. "
            "Install a newer cmsad-jax: pip install --upgrade cmsad-jax."
        )
    return manifest


def _listed_files(
    archive: zipfile.ZipFile, sizes: Mapping[str, int], listed: Any, name: str
) -> dict[str, bytes]:
    """The files that the manifest lists, which are all there are, each of its size and checksum."""
    if not isinstance(listed, dict):
        raise _refusal(name, f"no list of files in {_MANIFEST}")
    if {*sizes} != {_MANIFEST, *listed}:
        odd = sorted({*sizes} ^ {_MANIFEST, *listed})
        raise _refusal(name, f"entries that differ from the manifest: {', '.join(odd[:3])}")
    files = {}
    for path, expected in listed.items():
        if not isinstance(expected, dict) or expected.get("bytes") != sizes[path]:
            raise _refusal(name, f"another size of {path} than the manifest has")
        content = archive.read(path)
        if hashlib.sha256(content).hexdigest() != expected.get("sha256"):
            raise _refusal(name, f"a wrong checksum of {path}")
        if path in (_CARD, _LICENSE) and not _is_plain(content.decode()):
            raise _refusal(name, f"control characters in {path}")
        files[path] = content
    return files


def _is_plain(text: str) -> bool:
    """Whether a terminal shows a text as it is: no control characters, no reversed direction."""
    return all(
        character in "\n\t"
        or not (
            unicodedata.category(character) in ("Cc", "Cs")
            or unicodedata.bidirectional(character) in _DIRECTIONS
        )
        for character in text
    )


_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Classes of the characters that make text run otherwise than it is written."""


def _fault_of_json(value: Any) -> str:
    """What should not be in a manifest, or nothing."""
    rest = [(value, 1)]
    while rest:
        node, depth = rest.pop()
        if depth > _MAX_DEPTH:
            return f"values nested deeper than {_MAX_DEPTH}"
        if isinstance(node, dict | list):
            rest += [(child, depth + 1) for child in node]
        if isinstance(node, dict):
            rest += [(child, depth + 1) for child in node.values()]
        if isinstance(node, str) and not _is_plain(node):
            return f"control characters, {node!r:.80},"
        if isinstance(node, float) and not math.isfinite(node):
            return f"the number {node}"
    return ""


def _program(content: bytes, path: str, name: str) -> jax_export.Exported:
    """A program that this JAX can run: its format, its calls and its every operation are known."""
    oldest = jax_export.minimum_supported_calling_convention_version
    newest = jax_export.maximum_supported_calling_convention_version
    try:
        program = jax_export.deserialize(bytearray(content))
        version = program.calling_convention_version
        if not oldest <= version <= newest:
            raise ValueError(f"calling convention {version}, known are {oldest} to {newest}")
        if program.disabled_safety_checks:
            raise ValueError("a program exported without JAX's checks of safety")
        program.mlir_module()  # else an unknown operation would come to light at the first image
    except Exception as error:  # jax.export promises no type
        raise ConfigError(
            f"{name} must hold programs that this JAX can read; got in {path}: "
            f"{first_line(error):.200} (JAX {jax.__version__}). Install the JAX it was exported "
            "with or a newer one, or export the run again."
        ) from error
    return program


def _description(manifest: Mapping[str, Any], name: str) -> Description:
    """The description in a manifest; fields that this version does not know are passed over."""
    values = manifest.get("description")
    values = values if isinstance(values, dict) else {}
    fields = dataclasses.fields(Description)
    absent = [
        field.name
        for field in fields
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ConfigError(
            f"{name} must describe its model; got no {', '.join(absent)}. Export the run again."
        )
    known: dict[str, Any] = {
        field.name: tuple(values[field.name])
        if isinstance(values[field.name], list)
        else values[field.name]
        for field in fields
        if field.name in values
    }
    description = Description(**known)
    try:
        _check_description(description)
    except ConfigError as error:
        raise ConfigError(f"{name} must describe its model: {error}") from error
    return description


def _check_description(facts: Description) -> None:
    """Types and ranges of every field: it may be a stranger's."""
    for name in ("modalities", "classes", "members"):
        check_names(name, getattr(facts, name))
    check_names("target", (facts.target,))
    for name in ("flip", "allow_missing"):
        if not isinstance(getattr(facts, name), bool):
            raise _odd(name, "true or false", getattr(facts, name))
    for name in ("preprocess", "provenance", "metrics", "operating_point"):
        if not isinstance(getattr(facts, name), Mapping):
            raise _odd(name, "a table of values by name", getattr(facts, name))
    for name in ("labels", "lesions"):
        lines = getattr(facts, name)
        if not isinstance(lines, tuple) or not all(
            isinstance(line, str) and len(line) <= 200 and _is_plain(line) for line in lines
        ):
            raise _odd(name, "lines of plain text, of at most 200 characters", lines)
    if not isinstance(facts.license, str) or "\n" in facts.license or not _is_plain(facts.license):
        raise _odd("license", "one line of plain text", facts.license)
    if not _is_number(facts.overlap) or not 0 <= facts.overlap < 1:
        raise _odd("overlap", "a number of at least 0 and below 1", facts.overlap)
    if not _is_number(facts.threshold) or not 0 < facts.threshold < 1:
        raise _odd("threshold", "a number between 0 and 1", facts.threshold)
    check_number("batch_size", facts.batch_size, least=1, usual=1, whole=True)
    window = facts.window
    if not isinstance(window, tuple) or len(window) not in (2, 3) or not _are_sizes(window):
        raise _odd("window", "2 or 3 numbers of voxels", window)
    if math.prod(window) * facts.batch_size * facts.num_channels > _MAX_VOXELS:
        raise _odd("window", f"at most {_MAX_VOXELS} voxels in all windows of a call", window)
    grid = facts.preprocess
    size, spacing = grid.get("size", (1, 1, 1)), grid.get("spacing_mm", (1, 1, 1))
    if not isinstance(size, list | tuple) or len(size) != 3 or not _are_sizes(size):
        raise _odd("size of preprocess", "3 numbers of voxels", size)
    if math.prod(size) * facts.num_channels > _MAX_VOXELS:
        raise _odd("size of preprocess", f"at most {_MAX_VOXELS} voxels", size)
    box = facts.box
    if not isinstance(box, tuple) or not _are_sizes(box) or len(box) not in (0, 3):
        raise _odd("box", "3 numbers of voxels, or none", box)
    if any(n > limit for n, limit in zip(box, size, strict=False)):
        raise _odd("box", f"no larger than the grid of {tuple(size)} voxels", box)
    margin = facts.margin_mm
    if margin is not None and not (box and _is_number(margin) and 0 <= margin < math.inf):
        raise _odd("margin_mm", "a number of at least 0 beside a box, or nothing", margin)
    if (
        not isinstance(spacing, list | tuple)
        or len(spacing) != 3
        or not all(_is_number(n) and 0 < n <= 1000 for n in spacing)
    ):
        raise _odd("spacing_mm of preprocess", "3 numbers above 0 and at most 1000", spacing)


def _first(content: bytes | None, description: Description, name: str) -> "Model | None":
    """The first network of a cascade, which must go with the second."""
    if (content is None) != (not description.box):
        raise ConfigError(
            f"{name} must hold the first network of a cascade, and be one if it does; got "
            f"{'a box and none' if content is None else 'one and no box'}. Export the run again."
        )
    if content is None:
        return None
    first = _load(io.BytesIO(content), f"{name}: {_FIRST}", within=True)
    mine, others = description, first.description
    if (mine.modalities, mine.members) != (others.modalities, others.members):
        raise ConfigError(
            f"{name}: {_FIRST} must have the modalities {', '.join(mine.modalities)} and the "
            f"members {', '.join(mine.members)} of the second network; got "
            f"{', '.join(others.modalities)} and {', '.join(others.members)}. "
            "Export the run again."
        )
    return first


def _odd(name: str, rule: str, value: Any) -> ConfigError:
    return ConfigError(f"{name} must be {rule}; got {value!r:.80}. Export the run again.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_sizes(values: Sequence[Any]) -> bool:
    return all(
        isinstance(n, numbers.Integral) and not isinstance(n, bool) and 1 <= int(n) <= 2**20
        for n in values
    )


def _check_fit(
    program: jax_export.Exported,
    description: Description,
    weights: Sequence[Mapping[str, np.ndarray]],
    name: str,
) -> None:
    """The program must take what is described, and every member's weights."""
    try:
        (expected, windows, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        shapes = {key: value.shape for key, value in expected.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{name} must take weights, windows and present; got: {first_line(error):.200}. "
            "Export the run again."
        ) from error
    space = (*description.window, description.num_channels)
    if windows.shape[1:] != space:
        raise ConfigError(
            f"{name} must hold a program for what it describes, windows of shape {space}; got one "
            f"for {windows.shape[1:]}. Export the run again."
        )
    for member in weights:
        if {key: value.shape for key, value in member.items()} != shapes:
            raise ConfigError(
                f"{name} must hold the weights its program takes; got other names or shapes. "
                "Export the run again."
            )


def _check_result(
    program: jax_export.Exported,
    description: Description,
    weights: Mapping[str, np.ndarray],
    num_outputs: int,
    name: str,
) -> None:
    """The program must give a probability for each voxel and output, at any batch size."""
    space, num_modalities = description.window, len(description.modalities)
    given = {key: jax.ShapeDtypeStruct(value.shape, jnp.float32) for key, value in weights.items()}
    for batch in (1, description.batch_size):
        wanted = f"float32{[batch, *space, num_outputs]}"
        try:
            result = jax.eval_shape(
                program.call,
                given,
                jax.ShapeDtypeStruct((batch, *space, description.num_channels), jnp.float32),
                jax.ShapeDtypeStruct((batch, num_modalities), jnp.bool_),
            )
            found = f"{result.dtype}{list(result.shape)}"
        except Exception as error:  # of jax.export, or what result is no array for
            found = f"{first_line(error):.200}"
        if found != wanted:
            raise ConfigError(
                f"{name} must hold a program that gives {wanted} for {batch} windows; got {found}. "
                "Export the run again."
            )


def _require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "artifacts need the package flatbuffers, which jax.export reads and writes with; got "
            "none. pip install flatbuffers."
        )
