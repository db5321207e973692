import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cmsad_jax import kernels
from cmsad_jax.losses import (
    AttentionConfig,
    average_distillation_loss,
    cross_modal_distillation_loss,
    fused_distillation_loss,
    label_distillation_loss,
    map_distance,
    output_distillation_loss,
    parse_pairs,
    self_distillation_loss,
)
from cmsad_jax.types import ConfigError
from tests import oracles

MODALITIES = ("t2w", "adc", "hbv")
L2 = AttentionConfig()
SOFTMAX = AttentionConfig(normalization="softmax", temperature=2.0)
DISTANCES = [("l2", L2), ("l2", SOFTMAX), ("kl", SOFTMAX)]
STATIC = ("attention", "stages", "pairs", "distance", "reduction", "stop_gradient", "modalities")
CROSS = jax.jit(cross_modal_distillation_loss, static_argnames=STATIC)
SELF = jax.jit(self_distillation_loss, static_argnames=set(STATIC) - {"pairs"})
LABEL, FUSED, AVERAGE = (
    jax.jit(loss, static_argnames={*STATIC} & {*inspect.signature(loss).parameters})
    for loss in (label_distillation_loss, fused_distillation_loss, average_distillation_loss)
)
BOTH = pytest.mark.parametrize("loss", [CROSS, SELF], ids=["cross", "self"])
PRESENT = jnp.array([[True, True, True], [True, False, True], [False, True, False]])


def features(modalities=MODALITIES, rank=3):
    shapes = [(3, 8, 8, 4), (3, 4, 4, 6), (2, 2, 2, 8)]
    rng = np.random.default_rng(0)
    return {
        name: tuple(
            jnp.asarray(rng.normal(size=(3, *shape[3 - rank :])), jnp.float32) for shape in shapes
        )
        for name in modalities
    }


def settings(attention):
    return {
        name: getattr(attention, name)
        for name in ("kind", "exponent", "normalization", "temperature")
    }


def test_orthogonal_and_equal_maps_by_hand():
    a = jnp.array([[[1.0, 0.0]]]).reshape(1, 1, 2, 1)
    b = a[:, :, ::-1]
    between = {"stages": (0,), "pairs": ("a->b",)}
    assert cross_modal_distillation_loss({"a": (a,), "b": (b,)}, **between)[0] == pytest.approx(2)
    assert cross_modal_distillation_loss({"a": (a,), "b": (a,)}, **between)[0] == 0
    # Softmax of (1, 0) / T against (0, 1) / T: KL = (p - q) (1 - 0) / T, times T^2.
    found = cross_modal_distillation_loss(
        {"a": (a,), "b": (b,)}, attention=SOFTMAX, distance="kl", **between
    )
    p = 1 / (1 + np.exp(-1 / 2))
    assert found[0] == pytest.approx((2 * p - 1) / 2 * 4, rel=1e-5)


def test_equals_the_published_attention_transfer(shared_data):
    published = np.load(shared_data / "oracles/attention_transfer.npz")
    maps = {name: (jnp.asarray(published[name].transpose(0, 2, 3, 1)),) for name in "AB"}
    found = cross_modal_distillation_loss(maps, stages=(0,), pairs=("A->B",))
    # Theirs is the mean over examples and voxels, ours the sum over the voxels of each example.
    np.testing.assert_allclose(found.mean() / (16 * 16), published["at_loss_AB"], rtol=1e-5)


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
@pytest.mark.parametrize("pairs", ["mutual", ("adc->t2w", "hbv->adc")])
def test_cross_modal_equals_the_oracle(distance, attention, pairs):
    x = features()
    found = CROSS(
        x,
        attention=attention,
        stages=(0, 2),
        pairs=pairs,
        distance=distance,
        present=PRESENT,
        modalities=MODALITIES,
    )
    expected = oracles.cross_modal_distillation_loss(
        x, (0, 2), parse_pairs(pairs, MODALITIES), distance, PRESENT, **settings(attention)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found[2] == 0  # a single modality: nobody to learn from


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
def test_self_distillation_equals_the_oracle(distance, attention):
    # Constant deeper maps resize to constant maps, so that no oracle of resizing is needed.
    shallow = features()["t2w"][0]
    deep = jnp.ones((3, 2, 2, 2, 4)) * jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1, 1)
    found = SELF({"t2w": (shallow, deep)}, attention=attention, stages=(0, 1), distance=distance)
    of_map = settings(attention)
    student = oracles.normalize_map(
        oracles.attention_energy(shallow), of_map["normalization"], of_map["temperature"]
    )
    num_voxels = student[0].size
    even = num_voxels**-0.5 if attention.normalization == "l2" else 1 / num_voxels
    expected = [
        oracles.distance(np.full(q.shape, even), q, distance, attention.temperature)
        for q in student
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_self_distillation_resizes_the_teacher_before_normalising():
    shallow, deep = jnp.ones((1, 1, 4, 1)), jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1)
    # Energy (0, 4) on four points: (0, 1, 3, 4).
    teacher = np.array([0, 1, 3, 4]) / np.sqrt(26)
    expected = ((teacher - 0.5) ** 2).sum()
    found = SELF({"t2w": (shallow, deep)}, stages=(0,))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_self_distillation_takes_the_stages_asked_for():
    x = features(("t2w",))
    first, second, both, all_three, deepest = jax.jit(
        lambda x: [
            self_distillation_loss(x, stages=stages)
            for stages in ((0,), (1,), (0, 1), (0, 1, 2), (2,))
        ]
    )(x)
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5)
    np.testing.assert_allclose(all_three, both, rtol=1e-6)  # the deepest has no teacher
    np.testing.assert_array_equal(deepest, 0)


@BOTH
def test_who_attends_to_the_target_more_teaches_the_other(loss):
    sees = jnp.array([3.0, 0.0, 0.0, 0.0]).reshape(1, 1, 4, 1)
    blind = jnp.array([1.0, 1.0, 1.0, 1.0]).reshape(1, 1, 4, 1)
    target = jnp.array([[[1, 0, 0, 0]]])
    between = 2 - 2 * 0.5  # unit maps of cosine 1/2

    def found(first, second, foreground):
        if loss is CROSS:
            x, settings = {"a": (first,), "b": (second,)}, {"pairs": ("a->b",)}
        else:
            x, settings = {"a": (second, first)}, {}
        value = loss(x, stages=(0,), foreground=foreground, **settings)[0]
        return pytest.approx(float(value), abs=1e-6)

    assert found(sees, blind, target) == between
    assert found(blind, sees, target) == 0
    assert found(blind, sees, 1 - target) == between  # another target, another teacher
    assert found(sees, blind, 0 * target) == 0  # no target: nobody is known to see it
    assert found(sees, sees, target) == 0
    assert found(blind, sees, None) == between


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
def test_informed_teachers_equal_the_oracle(distance, attention):
    x = features()
    target = np.zeros((3, 8, 8), bool)
    target[0, 2:6, :4], target[1] = True, np.random.default_rng(1).random((8, 8)) < 0.3
    stages = (0, 1)  # 8 x 8 and 4 x 4; the finer volume has one slice for each target here
    x = {name: tuple(f[:, 0] for f in of_stage) for name, of_stage in x.items()}
    pairs = ("t2w->adc", "adc->hbv", "hbv->t2w")
    common = {"attention": attention, "stages": stages, "pairs": pairs, "distance": distance}
    found = CROSS(x, foreground=target, **common)
    on_stage = [target, np.asarray(kernels.resize_map(jnp.asarray(target, jnp.float32), (4, 4)))]
    expected = oracles.cross_modal_distillation_loss(
        x,
        stages,
        parse_pairs(pairs, MODALITIES),
        distance,
        np.ones((3, 3), bool),
        on_stage,
        **settings(attention),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found[2] == 0
    assert np.all(np.asarray(found[:2]) > 0)
    assert np.all(np.asarray(CROSS(x, **common)) != np.asarray(found))


@BOTH
def test_foreground_of_another_shape_is_refused(loss):
    with pytest.raises(ConfigError, match=re.escape("foreground must have the features' examples")):
        loss(features(), stages=(0,), foreground=jnp.ones((3, 8, 8, 4, 1)))


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
def test_no_gradient_reaches_a_teacher(distance, attention):
    common = {"attention": attention, "stages": (1,), "distance": distance}
    pairs = tuple(itertools.permutations(MODALITIES, 2))

    @jax.jit
    def gradients(x):
        by_pair = [
            jax.grad(
                lambda x, pair=pair: cross_modal_distillation_loss(
                    x, pairs=("->".join(pair),), **common
                ).sum()
            )(x)
            for pair in pairs
        ]
        return by_pair, jax.grad(lambda x: self_distillation_loss(x, **common).sum())(x)

    by_pair, of_self = gradients(features())
    for (teacher, student), gradient in zip(pairs, by_pair, strict=True):
        np.testing.assert_array_equal(gradient[teacher][1], 0)
        assert np.any(np.asarray(gradient[student][1]) != 0)
    for name in MODALITIES:
        np.testing.assert_array_equal(of_self[name][2], 0)
        assert np.any(np.asarray(of_self[name][1]) != 0)


def of_stages(seed, rank=3):
    """A feature for each stage, as a fusion gives them."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(rng.normal(size=f.shape), jnp.float32) for f in features(rank=rank)["t2w"]
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
def test_label_fused_and_average_equal_the_oracle(distance, attention, reduction):
    x, fused, teacher = features(), of_stages(1), of_stages(2)
    options = settings(attention)
    stages, given = (0, 1), {"attention": attention, "distance": distance, "reduction": reduction}
    given |= {"stages": stages, "present": PRESENT, "modalities": MODALITIES}
    there = {name: np.asarray(PRESENT)[:, m] for m, name in enumerate(MODALITIES)}

    target = np.zeros((3, 3, 8, 8), np.float32)
    target[0, 1, 2:5, 3:6] = 1
    target[1, :, 6:, :2] = 1
    on_stage = [
        np.asarray(kernels.resize_map(jnp.asarray(target), x["t2w"][stage].shape[1:-1]))
        for stage in stages
    ]
    holds = np.array([True, True, False])
    found = LABEL(x, target, **given)
    expected = oracles.taught_by_one(
        x,
        on_stage,
        stages,
        distance,
        {name: of & holds for name, of in there.items()},
        reduction,
        **options,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found[2] == 0 < min(found[:2])  # no target, nobody to learn from

    def energy(of):
        return [oracles.attention_energy(f, options["kind"], options["exponent"]) for f in of]

    found = FUSED(x, fused, **given)
    expected = oracles.taught_by_one(
        x, energy(fused), stages, distance, there, reduction, **options
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(found) > 0)

    withheld = np.array([False, True, True])
    found = AVERAGE(x, fused, teacher, withheld=withheld, **given)
    students = {**x, "fused": fused}
    valid = {"fused": withheld} | {name: of & withheld for name, of in there.items()}
    expected = oracles.taught_by_one(
        students, energy(teacher), stages, distance, valid, reduction, **options
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found[0] == 0 < min(found[1:])  # nothing withheld, nothing to teach
    # Where no feature is of one modality, the path that predicts is taught alone.
    early = {"attention": attention, "distance": distance, "reduction": reduction, "stages": stages}
    found = AVERAGE({}, fused, teacher, withheld=withheld, **early)
    expected = oracles.taught_by_one(
        {"fused": fused}, energy(teacher), stages, distance, valid, reduction, **options
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_output_distillation_equals_the_oracle(num_classes, monkeypatch):
    rng = np.random.default_rng(0)
    logits, teacher = (
        jnp.asarray(4 * rng.normal(size=(3, 2, 4, 4, num_classes)), jnp.float32) for _ in range(2)
    )
    withheld = np.array([True, False, True])
    found = output_distillation_loss(logits, teacher, withheld=withheld)
    expected = oracles.output_distillation_loss(logits, teacher, withheld)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    same = output_distillation_loss(teacher, teacher, withheld=withheld)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    large = output_distillation_loss(1e4 * logits, -1e4 * logits, withheld=withheld)
    assert np.all(np.isfinite(large))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=r"must have one shape; got \(3, 2, .* Give both"):
        output_distillation_loss(logits, teacher[..., :1, :], withheld=withheld)


def gradients_of_teachers(stop_gradient=True):
    """Gradient of each loss with respect to its teacher, and to its students."""
    x, fused, teacher = features(), of_stages(1), of_stages(2)
    withheld = jnp.ones(3, bool)
    target = jnp.zeros((3, 3, 8, 8)).at[:, 1, 2:5, 3:6].set(1)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 1)), jnp.float32)
    learning = {"stop_gradient": stop_gradient}
    losses = {
        "label": lambda t, x: label_distillation_loss(x, t, stages=(0, 1)),
        "fused": lambda t, x: fused_distillation_loss(x, t, stages=(0, 1), **learning),
        "average": lambda t, x: average_distillation_loss(
            x, fused, t, withheld=withheld, stages=(0, 1)
        ),
        "output": lambda t, x: output_distillation_loss(x, t, withheld=withheld),
        "cross": lambda t, x: cross_modal_distillation_loss(
            {**x, "adc": t}, pairs=("adc->t2w",), stages=(0, 1), **learning
        ),
        "self": lambda t, x: self_distillation_loss(
            {"t2w": (x["t2w"][0], *t[1:2])}, stages=(0,), **learning
        ),
    }
    given = {
        "label": (target, x),
        "fused": (fused, x),
        "average": (teacher, x),
        "output": (logits, 1 - logits),
        "cross": (x["adc"], x),
        "self": (x["t2w"], x),
    }

    @jax.jit
    def gradients(given):
        return {
            name: jax.grad(lambda t, x, name=name: losses[name](t, x).sum(), (0, 1))(*given[name])
            for name in losses
        }

    return gradients(given)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_no_gradient_reaches_any_kind_of_teacher():
    for name, (of_teacher, of_students) in gradients_of_teachers().items():
        if name != "label":  # a target has no weights behind it
            assert largest(of_teacher) == 0, name
        assert largest(of_students) > 0, name


@pytest.mark.slow
def test_teachers_learn_too_where_they_are_let():
    found = gradients_of_teachers(stop_gradient=False)
    for name in ("fused", "cross", "self"):
        assert largest(found[name][0]) > 0, name
    for name in ("average", "output"):
        assert largest(found[name][0]) == 0, name


def test_withheld_and_dead_features_have_finite_gradients_under_every_teacher():
    x = features()
    x["adc"] = tuple(jnp.zeros_like(f) for f in x["adc"])
    dead = tuple(jnp.zeros_like(f) for f in of_stages(1))
    present = jnp.array([[True, False, True]] * 3)
    given = {"stages": (0, 1), "present": present, "modalities": MODALITIES}
    target = jnp.zeros((3, 3, 8, 8)).at[0, 1, 2, 3].set(1)

    @jax.jit
    def gradients(x):
        def total(x, fused):
            return (
                label_distillation_loss(x, target, **given)
                + fused_distillation_loss(x, fused, **given)
                + average_distillation_loss(
                    x, fused, of_stages(2), withheld=jnp.ones(3, bool), **given
                )
            ).sum()

        return jax.grad(total, (0, 1))(x, dead)

    of_modalities, of_fused = gradients(x)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((of_modalities, of_fused)))
    assert largest(of_modalities["adc"]) == 0
    assert largest(of_modalities["t2w"]) > 0


def test_map_distance_equals_the_oracle():
    x = features()
    given = {"stages": (0, 2), "present": PRESENT, "modalities": MODALITIES}
    found = map_distance(x, **given)
    expected = oracles.map_distance(x, (0, 2), np.asarray(PRESENT))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    pattern = {name: tuple(f[:1] * jnp.ones((3, 1, 1, 1, 1)) for f in x[name]) for name in x}
    assert float(map_distance(pattern, **given)) == pytest.approx(0, abs=1e-5)
    alone = jnp.eye(3, dtype=bool)
    assert np.isnan(map_distance(x, stages=(0,), present=alone, modalities=MODALITIES))
    gradient = jax.grad(lambda x: map_distance(x, stages=(0,)))(x)
    assert largest(gradient) == 0


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
@BOTH
def test_absent_modalities_take_no_part(loss, distance, attention):
    common = {"attention": attention, "stages": (0, 1), "distance": distance}
    x = features()
    x["adc"] = tuple(jnp.zeros_like(f) for f in x["adc"])

    @jax.jit
    def evaluate(x, present):
        with_mask = {"present": present, "modalities": MODALITIES}
        two = {name: x[name] for name in ("t2w", "hbv")}
        return (
            *jax.value_and_grad(lambda x: loss(x, **with_mask, **common).sum())(x),
            loss(two, **common).sum(),
        )

    found, gradient, without = evaluate(x, jnp.array([[True, False, True]] * 3))
    # The weight of what is left is the same as if there were no third modality.
    np.testing.assert_allclose(found, without, rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    for g in gradient["adc"]:
        np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize(("distance", "attention"), DISTANCES)
@BOTH
def test_dead_features_have_finite_gradients(loss, distance, attention):
    gradient_of = jax.jit(
        jax.value_and_grad(
            lambda x: loss(x, attention=attention, stages=(0, 1), distance=distance).sum()
        )
    )
    for size in (0.0, 1e-20):
        x = features()  # all alive but two
        for name in ("t2w", "adc"):
            x[name] = tuple(jnp.full(f.shape, size) for f in x[name])
        value, gradient = gradient_of(x)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("rank", [2, 3])
@BOTH
def test_per_example(loss, rank):
    common = {"stages": (0, 1), "modalities": MODALITIES}

    @jax.jit
    def evaluate(x):
        rounded = jax.tree.map(lambda f: f.astype(jnp.bfloat16), x)
        exact = jax.tree.map(lambda f: f.astype(jnp.float32), rounded)
        return (
            loss(x, present=PRESENT, **common),
            loss(jax.tree.map(lambda f: f[::-1], x), present=PRESENT[::-1], **common),
            loss(jax.tree.map(lambda f: f[1:2], x), present=PRESENT[1:2], **common),
            loss(rounded, present=PRESENT, **common),
            loss(exact, present=PRESENT, **common),
        )

    found, flipped, alone, of_rounded, of_exact = evaluate(features(rank=rank))
    assert found.shape == (3,)
    np.testing.assert_allclose(flipped, found[::-1], rtol=1e-5)
    np.testing.assert_allclose(alone[0], found[1], rtol=1e-5)
    assert of_rounded.dtype == jnp.float32
    np.testing.assert_allclose(of_rounded, of_exact, rtol=1e-5)


@BOTH
def test_order_of_the_modalities_does_not_matter(loss):
    order = np.array([2, 0, 1])
    reordered = tuple(MODALITIES[m] for m in order)

    @jax.jit
    def evaluate(x):  # JAX hands the dictionary over sorted by key
        by_order = {name: x[name] for name in reordered}
        return (
            loss(x, stages=(0,), present=PRESENT, modalities=MODALITIES),
            loss(x, stages=(0,), present=PRESENT[:, order], modalities=reordered),
            loss(by_order, stages=(0,), present=PRESENT[:, order], modalities=reordered),
        )

    expected, named, reordered_too = evaluate(features())
    np.testing.assert_allclose(named, expected, rtol=1e-5)
    np.testing.assert_allclose(reordered_too, expected, rtol=1e-5)


def test_maps_of_different_sizes_are_compared_on_the_students_grid():
    x = features()
    mixed = {"t2w": x["t2w"][:1], "adc": x["adc"][1:2]}
    found = CROSS(mixed, stages=(0,), pairs=("adc->t2w",))
    # The same by hand, through the oracle of the norm and JAX's own resize.
    energy = [oracles.attention_energy(mixed[name][0]) for name in ("adc", "t2w")]
    resized = jax.image.resize(jnp.asarray(energy[0], jnp.float32), energy[1].shape, "linear")
    target, q = oracles.normalize_map(np.asarray(resized)), oracles.normalize_map(energy[1])
    np.testing.assert_allclose(found, ((target - q) ** 2).sum((1, 2, 3)), rtol=1e-4)


def test_one_modality_has_nobody_to_learn_from():
    x = features(("t2w",))
    np.testing.assert_array_equal(CROSS(x, stages=(0,)), np.zeros(3))


def test_pairs():
    assert parse_pairs("mutual", ("a", "b")) == (("a", "b"), ("b", "a"))
    assert parse_pairs("mutual", ("a",)) == ()
    assert parse_pairs(("b->a", "a -> b"), ("a", "b")) == (("b", "a"), ("a", "b"))


@pytest.mark.parametrize(
    "entry",
    ["adc", "adc->adc", "adc->t2w->hbv", "adc>t2w", "->t2w", ("adc", "t2w"), 7],
)
def test_malformed_pairs(entry, without_type_checks):
    with pytest.raises(
        ConfigError, match=re.escape(f"two different modalities; got {entry!r}. Use for example")
    ):
        parse_pairs(("hbv->t2w", entry), MODALITIES)


def test_pairs_of_unknown_modalities():
    with pytest.raises(
        ConfigError, match=re.escape("modalities of t2w, adc, hbv; got 'adc->dwi'. Use 'mutual'")
    ):
        parse_pairs(("hbv->t2w", "adc->dwi"), MODALITIES)


@pytest.mark.parametrize("pairs", ["adc->t2w", ()])
def test_pairs_are_a_list(pairs):
    with pytest.raises(ConfigError, match=r"'mutual' or a list of teacher->student; got .*Use for"):
        parse_pairs(pairs, MODALITIES)


def test_repeated_pairs():
    with pytest.raises(ConfigError, match=r"pairs must differ; got .*Name each pair once"):
        parse_pairs(("adc->t2w", "adc->t2w"), MODALITIES)


@BOTH
def test_bad_arguments(loss):
    x = features()
    with pytest.raises(ConfigError, match=r"distance must be one of l2, kl; got 'l1'. Use 'l2'"):
        loss(x, stages=(0,), distance="l1")
    with pytest.raises(ConfigError, match=r"reduction must be one of sum, mean; got 'max'. Use"):
        loss(x, stages=(0,), reduction="max")
    with pytest.raises(ConfigError, match=r"kl compares softmax maps; got .*'l2'. Set it to"):
        loss(x, stages=(0,), distance="kl")
    with pytest.raises(ConfigError, match=r"encoder's 0 to 2; got \(1, 3\). Name existing"):
        loss(x, stages=(1, 3))
    with pytest.raises(ConfigError, match=r"of shape \(3, 2\). Use shape \(3, 3\)"):
        loss(x, stages=(0,), present=PRESENT[:, :2], modalities=MODALITIES)
    with pytest.raises(
        ConfigError, match=r"present needs modalities, .*and no modalities. Pass mo"
    ):
        loss(x, stages=(0,), present=PRESENT)
    with pytest.raises(
        ConfigError, match=r"those of the features, each once; got \('t2w',\) and .*Give the"
    ):
        loss(x, stages=(0,), present=PRESENT[:, :1], modalities=("t2w",))


def test_bad_attention():
    with pytest.raises(
        ConfigError, match=r"exponent must be a finite number of at least 1; got 0\.5"
    ):
        AttentionConfig(exponent=0.5)
    with pytest.raises(ConfigError, match=r"temperature must be a finite number above 0; got 0\.0"):
        AttentionConfig(temperature=0.0)


def test_temporaries_of_the_gradient_are_at_most_two_maps_for_each_feature():
    shapes = [(1, 8, 48, 48, 8), (1, 8, 24, 24, 16)]
    features = {name: [jnp.ones(shape) for shape in shapes] for name in ("t2w", "adc", "hbv")}

    def loss(features):
        return cross_modal_distillation_loss(features, stages=(0, 1)).sum()

    program = jax.jit(jax.value_and_grad(loss)).lower(features).compile()
    maps = sum(4 * np.prod(shape[:-1]) for shape in shapes) * len(features)
    assert program.memory_analysis().temp_size_in_bytes <= 2 * maps
