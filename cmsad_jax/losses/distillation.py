"""Attention distillation between modalities and between stages (docs/method.md, sections 2 and 3).

In every term the teacher's map is under a stop-gradient. Each loss is a value per example: the mean
over its valid (stage, pair) terms, so that a weight means the same for any number of modalities.

Where everyone teaches everyone and nobody else teaches, the maps agree soonest by becoming one
pattern, the same for every modality and for every patient. With ``foreground`` a term counts only
in the examples in which its teacher attends to the target more than its student does. The other
teachers tie the maps to the image: the target itself, the fused feature, which has seen every
modality, and the averaged network, which sees those that are withheld from the student.
``map_distance`` tells whether the maps depend on the image.
"""

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from cmsad_jax import kernels
from cmsad_jax.kernels.api import check_energy, check_normalization
from cmsad_jax.types import (
    AttentionMap,
    ConfigError,
    Feature,
    Features,
    Logits,
    PerExample,
    Present,
    check_number,
    check_present,
)

Foreground = Shaped[Array | np.ndarray, "b *grid"]
"""Where the target is: booleans, or shares of voxels."""


COLLAPSED = 0.25
"""Attention has collapsed where the maps of two examples have kept less than this share of the
distance (``map_distance``) that they had before training.

Of the untrained network the distance says how much the images themselves make maps differ, on that
grid, at that size of stage: an absolute bound would not know it. On the phantom, networks of 200
steps kept half of it or more where only the task taught them, and 5 to 40 % at distilled stages
where the modalities taught one another and nobody else did.
"""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How the attention map of a stage is made from its features (docs/method.md, section 2).

    Examples:
        >>> AttentionConfig(kind="max").exponent
        2.0
    """

    kind: Literal["mean", "sum", "max"] = "mean"
    """How the channels' abs(feature) ** exponent become one value."""
    exponent: float = 2.0
    """Of the features' absolute values; at least 1, larger favours the strongest channels."""
    normalization: Literal["l2", "softmax"] = "l2"
    """Maps are brought to unit norm, or through a softmax, over the voxels of one example."""
    temperature: float = 1.0
    """Of the softmax; raise it where a softmax of raw squares saturates."""

    def __post_init__(self):
        check_number("attention exponent", self.exponent, least=1, usual=2)
        check_number("attention temperature", self.temperature, least=0, usual=1, above=True)
        check_energy(self.kind, self.exponent)
        check_normalization(self.normalization, self.temperature)


def cross_modal_distillation_loss(
    features: Features,
    *,
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    pairs: str | Sequence[str] = "mutual",
    distance: str = "l2",
    reduction: str = "sum",
    stop_gradient: bool = True,
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
    foreground: Foreground | None = None,
) -> PerExample:
    """Attention of one modality teaches that of another at the same stage, float32.

    ``distance(stop_gradient(Q[teacher][s]), Q[student][s])`` averaged over ``stages`` and over
    the pairs of which both are present; 0 where there are none.

    Args:
        features: activations of each modality and stage, ``features[modality][stage]``, each
            ``b *space c`` of its stage's size.
        attention: how maps are made.
        stages: which stages, from 0.
        pairs: ``mutual``: every modality teaches every other one; or a list of teacher->student,
            such as ``("adc->t2w", "hbv->t2w")``.
        distance: ``l2``: squared differences summed over voxels, for unit maps ``2 - 2 cos``.
            ``kl``: ``temperature^2 KL(teacher || student)`` of softmax maps. Neither shrinks as
            maps grow, as ``l2`` does between softmax maps.
        reduction: ``sum`` over the voxels, or their ``mean``, which shrinks as maps grow (public
            code of attention transfer has it).
        stop_gradient: whether teachers learn nothing of their students.
        present: which modalities each example has, bool ``b m``; None is all. Whatever an absent
            one holds, NaN and inf included, changes neither the loss nor a gradient.
        modalities: names of the columns of ``present``, needed with it. The keys of ``features``
            cannot tell: JAX sorts the dictionaries that go through its transformations by key.
        foreground: where the target is, on any grid over the same field of view. A term then counts
            in the examples alone in which a larger share of the teacher's attention than of the
            student's lies there; so in none without target. None: every term counts.

    Raises:
        ConfigError: if features, stages, pairs, distance, reduction, ``foreground``, or ``present``
            and its columns do not fit.

    Examples:
        >>> features = {name: [jnp.ones((1, 2, 2, 3))] for name in ("t2w", "adc")}
        >>> cross_modal_distillation_loss(features, stages=(0,), pairs=("adc->t2w",))
        Array([0.], dtype=float32)
    """
    _check_features(features)
    check_distance(distance, attention, reduction)
    _check_stages(stages, features)
    there = _presence(features, present, modalities)
    parsed = parse_pairs(pairs, tuple(features))
    _check_foreground(foreground, features)

    def loss(features: Features) -> PerExample:
        if present is not None:
            features = _without_absent(features, there)
        attention_of = _attention(features, attention, distance)
        terms = []
        for (teacher, student), stage in itertools.product(parsed, stages):
            space = features[student][stage].shape[1:-1]
            target, q = (attention_of(name, stage, space) for name in (teacher, student))
            value = _distance(target, q, attention, distance, reduction, stop_gradient)
            valid = there[teacher] & there[student] & _informed(target, q, foreground, distance)
            terms.append((valid, value))
        return _mean_of_valid(terms, there)

    return _keeping_energies(loss)(dict(features))


def self_distillation_loss(
    features: Features,
    *,
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    distance: str = "l2",
    reduction: str = "sum",
    stop_gradient: bool = True,
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
    foreground: Foreground | None = None,
) -> PerExample:
    """Within each modality, the attention of a stage is taught by that of the next deeper one.

    ``distance(stop_gradient(resize(Q[m][s + 1])), Q[m][s])`` averaged over the modalities present
    and over those ``stages`` that have a deeper one; 0 where there are none (Hou et al., ICCV
    2019). Arguments and errors as in ``cross_modal_distillation_loss``.

    Examples:
        >>> features = {"t2w": [jnp.ones((1, 4, 4, 3)), jnp.ones((1, 2, 2, 6))]}
        >>> self_distillation_loss(features, stages=(0, 1)).shape
        (1,)
    """
    _check_features(features)
    check_distance(distance, attention, reduction)
    _check_stages(stages, features)
    there = _presence(features, present, modalities)
    _check_foreground(foreground, features)

    def loss(features: Features) -> PerExample:
        if present is not None:
            features = _without_absent(features, there)
        attention_of = _attention(features, attention, distance)
        terms = []
        for name, stage in itertools.product(features, stages):
            if stage + 1 < len(features[name]):
                space = features[name][stage].shape[1:-1]
                target, q = (attention_of(name, s, space) for s in (stage + 1, stage))
                valid = there[name] & _informed(target, q, foreground, distance)
                value = _distance(target, q, attention, distance, reduction, stop_gradient)
                terms.append((valid, value))
        return _mean_of_valid(terms, there)

    return _keeping_energies(loss)(dict(features))


def label_distillation_loss(
    features: Features,
    foreground: Foreground,
    *,
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    distance: str = "l2",
    reduction: str = "sum",
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
) -> PerExample:
    """The target, as if it were a map of attention, teaches every modality at each stage.

    ``foreground`` is resized to the stage and normalised as a map is; an example without target has
    no term. Arguments and errors as in ``cross_modal_distillation_loss``.

    Examples:
        >>> features = {name: [jnp.ones((1, 2, 2, 3))] for name in ("t2w", "adc")}
        >>> label_distillation_loss(features, jnp.ones((1, 2, 2)), stages=(0,)).round(3)
        Array([0.], dtype=float32)
    """
    _check_features(features)
    check_distance(distance, attention, reduction)
    _check_stages(stages, features)
    there = _presence(features, present, modalities)
    _check_foreground(foreground, features)
    target = jnp.asarray(foreground, jnp.float32)
    holds = target.sum(tuple(range(1, target.ndim))) > 0

    def map_of(stage: int, space: tuple[int, ...]) -> AttentionMap:
        del stage
        return _normalized(kernels.resize_map(target, space), attention, distance)

    valid = {name: of_modality & holds for name, of_modality in there.items()}
    if present is not None:
        features = _without_absent(features, there)
    return _taught_by_one(features, map_of, valid, attention, stages, distance, reduction, True)


def fused_distillation_loss(
    features: Features,
    fused: Sequence[Float[Array, "b ..."]],
    *,
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    distance: str = "l2",
    reduction: str = "sum",
    stop_gradient: bool = True,
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
) -> PerExample:
    """Attention of the fused feature of a stage teaches every modality there.

    It has seen all modalities, and its own map is taught by nothing but the task (fusion, then
    distillation: FtD++, arXiv 2410.19446). ``fused`` holds the fused feature of each stage; other
    arguments and errors as in ``cross_modal_distillation_loss``.

    Examples:
        >>> features = {name: [jnp.ones((1, 2, 2, 3))] for name in ("t2w", "adc")}
        >>> fused_distillation_loss(features, [jnp.ones((1, 2, 2, 3))], stages=(0,))
        Array([0.], dtype=float32)
    """
    _check_features({_FUSED: fused, **features})
    check_distance(distance, attention, reduction)
    _check_stages(stages, {_FUSED: fused, **features})
    there = _presence(features, present, modalities)
    if present is not None:
        features = _without_absent(features, there)
    map_of = _map_of(fused, attention, distance)
    return _taught_by_one(
        features, map_of, there, attention, stages, distance, reduction, stop_gradient
    )


def average_distillation_loss(
    features: Features,
    fused: Sequence[Float[Array, "b ..."]],
    teacher: Sequence[Float[Array, "b ..."]],
    *,
    withheld: Bool[Array | np.ndarray, " b"],
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    distance: str = "l2",
    reduction: str = "sum",
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
) -> PerExample:
    """Attention of a network that sees every modality teaches one that lacks some.

    The map of the teacher's fused feature of a stage is the target of the student's fused feature,
    so that the path that predicts without a modality is taught, and of each modality that is left
    (Tarvainen & Valpola, NeurIPS 2017, for an averaged network as the teacher).

    ``features`` are those of the student, empty for a network without encoders of one modality;
    ``fused`` are its fused features and ``teacher`` those of the teacher, which learns nothing, one
    for each stage. ``withheld`` says in which examples the student lacks a modality that the
    teacher sees; others have no term. Other arguments and errors as in
    ``cross_modal_distillation_loss``.

    Examples:
        >>> features = {name: [jnp.ones((1, 2, 2, 3))] for name in ("t2w", "adc")}
        >>> fused = [jnp.ones((1, 2, 2, 3))]
        >>> average_distillation_loss(
        ...     features, fused, fused, withheld=jnp.array([True]), stages=(0,)
        ... )
        Array([0.], dtype=float32)
    """
    known = {**features, _FUSED: fused, "(teacher)": teacher}
    _check_features(known)
    check_distance(distance, attention, reduction)
    _check_stages(stages, known)
    valid = {_FUSED: jnp.asarray(withheld)}
    if features:
        there = _presence(features, present, modalities)
        valid |= {name: of_modality & withheld for name, of_modality in there.items()}
        if present is not None:
            features = _without_absent(features, there)
    students = {**features, _FUSED: fused}
    map_of = _map_of(teacher, attention, distance)
    return _taught_by_one(students, map_of, valid, attention, stages, distance, reduction, True)


def output_distillation_loss(
    logits: Logits, teacher: Logits, *, withheld: Bool[Array | np.ndarray, " b"]
) -> PerExample:
    """``KL(teacher || student)`` of the classes' probabilities, mean over voxels, in float32.

    Args:
        logits: of the student; one is a sigmoid, several are a softmax.
        teacher: of a network that sees more; it learns nothing.
        withheld: in which examples it sees more; in others the value is 0.

    Raises:
        ConfigError: if the shapes differ.

    Examples:
        >>> logits = jnp.zeros((1, 4, 1))
        >>> output_distillation_loss(logits, logits, withheld=jnp.array([True])).round(2)
        Array([0.], dtype=float32)
    """
    if logits.shape != teacher.shape:
        raise ConfigError(
            "logits of student and teacher must have one shape; "
            f"got {logits.shape} and {teacher.shape}. Give both networks the same images."
        )
    logits = logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    if logits.shape[-1] == 1:
        logits, teacher = (jnp.concatenate([-x / 2, x / 2], -1) for x in (logits, teacher))
    expected, found = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    divergence = (jnp.exp(expected) * (expected - found)).sum(-1)
    return jnp.where(withheld, divergence.mean(tuple(range(1, divergence.ndim))), 0.0)


def map_distance(
    features: Features,
    *,
    attention: AttentionConfig = AttentionConfig(),
    stages: Sequence[int],
    present: Present | None = None,
    modalities: Sequence[str] | None = None,
) -> Float[Array, ""]:
    """How far the attention of one example lies from that of another, without gradient.

    Squared differences of maps of unit norm, summed over the voxels: 0 where they are one pattern
    whatever the image shows, 2 where they have nothing in common. The mean over all pairs of
    examples of the batch that have the modality, then over modalities and ``stages``; NaN where no
    modality is in two examples. Arguments and errors as in ``cross_modal_distillation_loss``.

    Examples:
        >>> flat, diagonal = jnp.ones((2, 2, 3)), jnp.eye(2)[..., None] * jnp.ones(3)
        >>> map_distance({"t2w": [jnp.stack([flat, diagonal])]}, stages=(0,)).round(2)
        Array(0.59, dtype=float32)
    """
    _check_features(features)
    _check_stages(stages, features)
    there = _presence(features, present, modalities)
    if present is not None:
        features = _without_absent(features, there)
    attention_of = _attention(
        jax.lax.stop_gradient(dict(features)),
        AttentionConfig(attention.kind, attention.exponent),
        "l2",
    )
    total, count = jnp.zeros(()), jnp.zeros(())
    for name, stage in itertools.product(features, stages):
        q = attention_of(name, stage, features[name][stage].shape[1:-1])
        num = there[name].sum()
        # Over all ordered pairs: 2 num sum_i |q_i|^2 - 2 |sum_i q_i|^2.
        both = 2 * num * jnp.square(q).sum() - 2 * jnp.square(q.sum(0)).sum()
        total += jnp.where(num > 1, both / jnp.maximum(num * (num - 1), 1), 0.0)
        count += num > 1
    return jnp.where(count > 0, jnp.maximum(total, 0.0) / jnp.maximum(count, 1), jnp.nan)


def check_stages(stages: Any) -> None:
    """Raise ``ConfigError`` unless ``stages`` are one or more distinct whole numbers from 0."""
    whole = isinstance(stages, Sequence) and all(
        isinstance(stage, numbers.Integral) and int(stage) >= 0 for stage in stages
    )
    if not whole or not stages or len(set(stages)) != len(stages):
        raise ConfigError(
            "stages must be a list of one or more distinct whole numbers from 0; "
            f"got {stages!r:.80}. Use for example (0, 1)."
        )


def parse_pairs(
    pairs: str | Sequence[str], modalities: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Names of (teacher, student): of each ``teacher->student``, or every ordered pair.

    Args:
        pairs: ``mutual`` for every ordered pair (none if there is one modality), or a list such
            as ``("adc->t2w", "hbv->t2w")``.
        modalities: names that exist.

    Raises:
        ConfigError: if an entry is malformed, names an unknown modality or the same one twice, is
            repeated, or if there is none.
    """
    check_pairs(pairs)
    if pairs == "mutual":
        return tuple(itertools.permutations(modalities, 2))
    parsed = []
    for entry in pairs:
        teacher, student = _names(entry)
        parsed.append((teacher, student))
        if not {teacher, student} <= set(modalities):
            raise ConfigError(
                "each pair must be teacher->student with two different modalities of "
                f"{', '.join(modalities)}; got {entry!r}. Use 'mutual' for every ordered pair."
            )
    return tuple(parsed)


def check_pairs(pairs: Any) -> None:
    """Raise ``ConfigError`` if ``pairs`` can be nobody's, whatever the modalities are."""
    if isinstance(pairs, str) and pairs == "mutual":
        return
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise ConfigError(
            "pairs must be 'mutual' or a list of teacher->student; "
            f"got {pairs!r}. Use for example ('adc->t2w',), or weight 0 for no distillation."
        )
    parsed = [_names(entry) for entry in pairs]
    for names, entry in zip(parsed, pairs, strict=True):
        if len(set(names)) != 2 or len(names) != 2 or not all(names):
            raise ConfigError(
                "each pair must be text, teacher->student, with two different modalities; "
                f"got {entry!r:.80}. Use for example 'adc->t2w'."
            )
    if len(set(parsed)) != len(parsed):
        raise ConfigError(f"pairs must differ; got {tuple(pairs)}. Name each pair once.")


def _names(entry: Any) -> tuple[str, ...]:
    return tuple(name.strip() for name in entry.split("->")) if isinstance(entry, str) else ()


_FUSED = "(fused)"
"""Stands for the fused feature among the students; no modality is named so."""

_ENERGY = "attention_energy"

_keeping_energies = functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_ENERGY)
)
"""Beside the features, the gradient keeps one float32 map for each: what follows from the maps is
computed again. Each feature is still read once forward and once backward."""


def _attention(
    features: Features, attention: AttentionConfig, distance: str
) -> Callable[[str, int, tuple[int, ...]], AttentionMap]:
    """Attention by modality, stage and grid, each computed once; its logarithm for ``kl``."""

    @functools.cache
    def attention_of(name, stage, space):
        energy = kernels.attention_energy(
            features[name][stage],
            kind=attention.kind,
            exponent=attention.exponent,
        )
        energy = kernels.resize_map(checkpoint_name(energy, _ENERGY), space)
        return _normalized(energy, attention, distance)

    return attention_of


def _normalized(energy: AttentionMap, attention: AttentionConfig, distance: str) -> AttentionMap:
    """The map of an energy; its logarithm for ``kl``."""
    if distance == "kl":
        scaled = energy / attention.temperature
        return jax.nn.log_softmax(scaled, axis=tuple(range(1, scaled.ndim)))
    return kernels.normalize_map(
        energy, normalization=attention.normalization, temperature=attention.temperature
    )


def _map_of(
    features: Sequence[Float[Array, "b ..."]], attention: AttentionConfig, distance: str
) -> Callable[[int, tuple[int, ...]], AttentionMap]:
    """Attention of one feature for each stage, by stage and grid."""
    attention_of = _attention({_FUSED: features}, attention, distance)
    return functools.partial(attention_of, _FUSED)


def _taught_by_one(
    students: Features,
    map_of: Callable[[int, tuple[int, ...]], AttentionMap],
    valid: dict[str, Bool[Array, " b"]],
    attention: AttentionConfig,
    stages: Sequence[int],
    distance: str,
    reduction: str,
    stop_gradient: bool,
) -> PerExample:
    """One map for each stage and grid teaches every student, in the examples that are valid."""

    def loss(students: Features) -> PerExample:
        attention_of = _attention(students, attention, distance)
        terms = []
        for name, stage in itertools.product(students, stages):
            space = students[name][stage].shape[1:-1]
            target, q = map_of(stage, space), attention_of(name, stage, space)
            value = _distance(target, q, attention, distance, reduction, stop_gradient)
            terms.append((valid[name], value))
        return _mean_of_valid(terms, valid)

    return _keeping_energies(loss)(dict(students))


def _distance(
    teacher: AttentionMap,
    student: AttentionMap,
    attention: AttentionConfig,
    distance: str,
    reduction: str,
    stop_gradient: bool,
) -> PerExample:
    """Distance of what ``_attention`` gives, over the voxels."""
    space = tuple(range(1, student.ndim))
    if stop_gradient:
        teacher = jax.lax.stop_gradient(teacher)
    if distance == "kl":
        of_voxel = jnp.exp(teacher) * (teacher - student)
        total = attention.temperature**2 * of_voxel.sum(space)
    else:
        total = jnp.square(teacher - student).sum(space)
    return total / (student[0].size if reduction == "mean" else 1)


def _informed(
    teacher: AttentionMap, student: AttentionMap, foreground: Foreground | None, distance: str
) -> Bool[Array, " b"]:
    """Whether more of the teacher's attention than of the student's lies in the foreground."""
    if foreground is None:
        return jnp.ones(student.shape[0], bool)
    target = kernels.resize_map(jnp.asarray(foreground, jnp.float32), student.shape[1:])
    space = tuple(range(1, student.ndim))

    def share(q: AttentionMap) -> PerExample:
        q = jnp.exp(q) if distance == "kl" else q
        total = q.sum(space)
        return (q * target).sum(space) / jnp.where(total > 0, total, 1.0)

    return share(teacher) > share(student)


def _mean_of_valid(
    terms: Sequence[tuple[Bool[Array, " b"], PerExample]], there: dict[str, Bool[Array, " b"]]
) -> PerExample:
    """Mean of each example's valid terms; 0, with gradient 0, where there is none."""
    batch = next(iter(there.values())).shape
    total, count = jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.float32)
    for valid, value in terms:
        total += jnp.where(valid, value, 0.0)
        count += valid
    return total / jnp.maximum(count, 1.0)


def _presence(
    features: Features, present: Present | None, modalities: Sequence[str] | None
) -> dict[str, Bool[Array, " b"]]:
    """Which examples have each modality."""
    if present is not None and modalities is None:
        raise ConfigError(
            "present needs modalities, the names of its columns in order, as JAX sorts "
            f"dictionaries by key; got features of {', '.join(features)} and no modalities. "
            "Pass modalities=('t2w', 'adc') or as your columns are."
        )
    names = tuple(features) if modalities is None else tuple(modalities)
    if sorted(names) != sorted(features):
        raise ConfigError(
            "modalities must name those of the features, each once; "
            f"got {names} and {tuple(features)}. Give the columns of present, in order."
        )
    batch = next(iter(features.values()))[0].shape[0]
    if present is None:
        present = jnp.ones((batch, len(names)), bool)
    check_present(present, batch, names)
    return {name: jnp.asarray(present[:, m]) for m, name in enumerate(names)}


def _without_absent(features: Features, there: Mapping[str, Bool[Array, " b"]]) -> Features:
    """Features with 0 where a modality is absent, so that no NaN or inf enters the arithmetic."""

    def masked(feature: Feature, mask: Bool[Array, " b"]) -> Feature:
        return jnp.where(mask.reshape(-1, *(1,) * (feature.ndim - 1)), feature, 0)

    return {
        name: tuple(masked(feature, there[name]) for feature in of_stage)
        for name, of_stage in features.items()
    }


def _check_features(features: Any) -> None:
    if not isinstance(features, Mapping) or not features:
        raise ConfigError(
            "features must be a dictionary with a list of stages for each modality; "
            f"got {'none' if isinstance(features, Mapping) else type(features).__name__}. "
            "Pass {'t2w': [stage_0, stage_1], 'adc': [...]}."
        )
    batches, ranks = set(), set()
    for name, of_stage in features.items():
        if not isinstance(name, str) or not isinstance(of_stage, list | tuple) or not of_stage:
            raise ConfigError(
                "features of a modality must be a list of arrays, one for each stage, under its "
                f"name; got {type(of_stage).__name__} under {name!r}. "
                "Put a single stage into a list: {'t2w': [stage_0]}."
            )
        for stage, feature in enumerate(of_stage):
            shape = getattr(feature, "shape", ())
            if len(shape) < 3:
                raise ConfigError(
                    "a feature must be an array b *space c; got "
                    f"{shape or type(feature).__name__} for {name}, stage {stage}. "
                    "Give it axes of batch, space and channels."
                )
            batches.add(shape[0])
            ranks.add(len(shape))
    if len(batches) != 1 or len(ranks) != 1:
        raise ConfigError(
            "features must have the same examples and axes of space in every modality and stage; "
            f"got batches {sorted(batches)} and {sorted(n - 2 for n in ranks)} axes of space. "
            "Pass all of one batch."
        )


def _check_foreground(foreground: Foreground | None, features: Features) -> None:
    feature = next(iter(features.values()))[0]
    if foreground is not None and (
        not hasattr(foreground, "ndim")
        or foreground.ndim != feature.ndim - 1
        or foreground.shape[0] != feature.shape[0]
    ):
        raise ConfigError(
            "foreground must have the features' examples and axes of space, without channels; got "
            f"{getattr(foreground, 'shape', type(foreground).__name__)} beside features "
            f"{feature.shape}. Give labels > 0."
        )


def check_distance(distance: str, attention: AttentionConfig, reduction: str = "sum") -> None:
    """Raise ``ConfigError`` if ``distance`` is unknown or not one of such maps."""
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"reduction must be one of sum, mean; got {reduction!r}. Use 'sum'.")
    if distance not in ("l2", "kl"):
        raise ConfigError(f"distance must be one of l2, kl; got {distance!r}. Use 'l2'.")
    if distance == "kl" and attention.normalization != "softmax":
        raise ConfigError(
            "distance kl compares softmax maps; "
            f"got attention normalization {attention.normalization!r}. "
            "Set it to 'softmax', or use distance 'l2'."
        )


def _check_stages(stages: Sequence[int], features: Features) -> None:
    num_stages = min(len(of_stage) for of_stage in features.values())
    check_stages(stages)
    if any(not 0 <= stage < num_stages for stage in stages):
        raise ConfigError(
            f"stages must be among the encoder's 0 to {num_stages - 1}; got {tuple(stages)}. "
            "Name existing stages."
        )
