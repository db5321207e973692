"""What a caller may get wrong at the library's surface: refused with rule, what came and remedy.

And what a caller cannot help: an absent modality that holds NaN or inf spoils nothing.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmsad_jax
from cmsad_jax import (
    AttentionConfig,
    EncoderConfig,
    FusionConfig,
    LossConfig,
    NetworkConfig,
    cross_modal_distillation_loss,
    self_distillation_loss,
    sliding_window,
)
from cmsad_jax.types import ConfigError
from tests.networks import TINY_2D, TINY_3D, init, random_params, tiny_batch, tiny_config

NAMES = ("t2w", "adc", "hbv")
PRESENT = np.array([[True, False, True], [True, True, True]])
ABSENT = [np.nan, np.inf, -np.inf, 3e38]


def feature(*shape):
    return jnp.ones(shape or (2, 4, 4, 3))


def two(**stages):
    """Features of two modalities with one stage each."""
    return {"t2w": [feature()], "adc": [feature()], **stages}


def cross(features, **options):
    return cross_modal_distillation_loss(features, **{"stages": (0,), **options})


def windows(**changes):
    given = {
        "predict": lambda x, present: x[..., :1],
        "image": np.zeros((2, 8, 8, 3), np.float32),
        "present": np.ones(3, bool),
        "window": (2, 8, 8),
        "num_classes": 1,
        **changes,
    }
    return sliding_window(given.pop("predict"), given.pop("image"), given.pop("present"), **given)


def fuse(features, present=None, kind="scff", channels=4, modalities=("t2w", "adc")):
    module = cmsad_jax.Fusion(channels, modalities, FusionConfig(kind=kind))
    return jax.eval_shape(module.init, jax.random.key(0), features, present)


def segment(image, present=None):
    return jax.eval_shape(cmsad_jax.CMSAD(tiny_config()).init, jax.random.key(0), image, present)


IMAGE = jnp.zeros((2, 4, 16, 16, 3))
LOGITS, LABELS = jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 4, 4), jnp.int32)

WRONG = [
    # features: a dictionary of lists
    (
        lambda: cross([feature()]),
        "features must be a dictionary with a list of stages",
        "got list.",
    ),
    (lambda: cross({}), "features must be a dictionary with a list of stages", "got none. Pass {'"),
    (lambda: cross(feature()), "features must be a dictionary", "got ArrayImpl. Pass {'t2w'"),
    (
        lambda: cross(two(t2w=feature())),
        "must be a list of arrays, one for each",
        "under 't2w'. Put",
    ),
    (
        lambda: cross(two(t2w=[])),
        "must be a list of arrays, one for each stage",
        "got list under 't2w'",
    ),
    (
        lambda: cross(two(t2w=[1.0])),
        "a feature must be an array b *space c",
        "got float for t2w, st",
    ),
    (
        lambda: cross(two(t2w=[[feature()]])),
        "a feature must be an array",
        "got list for t2w, stage 0.",
    ),
    (lambda: cross(two(t2w=[feature(3, 4, 4, 3)])), "the same examples and axes", "batches [2, 3]"),
    (
        lambda: cross(two(t2w=[feature(2, 4, 3)])),
        "the same examples and axes",
        "[1, 2] axes of space.",
    ),
    (
        lambda: cross({1: [feature()]}),
        "must be a list of arrays, one for each stage, under its name",
        "",
    ),
    # stages, pairs, present
    (
        lambda: cross(two(), stages=0),
        "stages must be a list of one or more",
        "got 0. Use for example",
    ),
    (lambda: cross(two(), stages=()), "stages must be a list of one or more", "got (). Use for"),
    (lambda: cross(two(), stages=(0, 0)), "distinct whole numbers from 0", "got (0, 0). Use for"),
    (lambda: cross(two(), stages=("0",)), "distinct whole numbers from 0", "got ('0',). Use for"),
    (
        lambda: cross(two(), pairs=(("adc", "t2w"),)),
        "each pair must be text",
        "got ('adc', 't2w'). Use",
    ),
    (
        lambda: cross(two(), pairs={"adc": "t2w"}),
        "'mutual' or a list of teacher->student",
        "got {'adc",
    ),
    (
        lambda: cross(two(), pairs=None),
        "'mutual' or a list of teacher->student",
        "got None. Use for",
    ),
    (
        lambda: cross(two(), present=np.ones((2, 2), bool)),
        "present needs modalities, the names of its columns in order",
        "got features of t2w, adc and no modalities. Pass modalities=",
    ),
    (
        lambda: cross(two(), present=[[True]], modalities=("t2w", "adc")),
        "present must be a bool mask with one row for each example",
        "got list. Use shape (2, 2).",
    ),
    (
        lambda: cross(two(), present=np.ones((2, 2)), modalities=("t2w", "adc")),
        "present must be a bool mask",
        "got float64 of shape (2, 2). Use shape (2, 2).",
    ),
    (
        lambda: cross(two(), present=np.ones((2, 2), bool), modalities=("t2w", "adc", "adc")),
        "modalities must name those of the features, each once",
        "Give the columns of present, in order.",
    ),
    (
        lambda: cross(two(), foreground=[1]),
        "foreground must have the features' examples",
        "got list beside features (2, 4, 4, 3). Give labels > 0.",
    ),
    (
        lambda: self_distillation_loss([feature()], stages=(0,)),
        "features must be a dictionary",
        "list",
    ),
    # fusion: a dictionary of arrays
    (
        lambda: fuse([feature()] * 2),
        "features must be a dictionary with one array for each",
        "got list",
    ),
    (
        lambda: fuse({"t2w": feature()}),
        "one array for each modality of t2w, adc",
        "got t2w. Pass {'t",
    ),
    (
        lambda: fuse(two()),
        "arrays of the same batch and space",
        "got t2w list, adc list. Pass one stage",
    ),
    (
        lambda: fuse({"t2w": feature(), "adc": feature(2, 2, 2, 3)}),
        "features must be arrays of the same batch and space",
        "got t2w (2, 4, 4, 3), adc (2, 2, 2, 3). Pass one stage at a time",
    ),
    (
        lambda: fuse({"t2w": feature(), "adc": feature()}, np.ones((2, 3), bool)),
        "one column for each modality of t2w, adc",
        "got bool of shape (2, 3). Use shape (2, 2).",
    ),
    (
        lambda: fuse({"t2w": feature(), "adc": feature()}, np.ones((2, 2), np.uint8)),
        "present must be a bool mask",
        "got uint8 of shape (2, 2). Use",
    ),
    (
        lambda: fuse({"t2w": feature(), "adc": feature()}, kind="early"),
        "a fusion module fuses features of a stage",
        "got the kind early, which stacks the images before one encoder. Use CMSAD",
    ),
    (
        lambda: fuse({"t2w": feature(), "adc": feature()}, channels=0),
        "channels must be a whole number of at least 1",
        "got 0. Use 8.",
    ),
    # network and encoder
    (
        lambda: segment([IMAGE]),
        "the image must be one array with a channel for each",
        "got list. Stack",
    ),
    (
        lambda: segment(IMAGE, np.ones((2, 2), bool)),
        "each modality of t2w, adc, hbv",
        "shape (2, 2). Us",
    ),
    (
        lambda: segment(IMAGE, np.ones((1, 3), bool)),
        "one row for each example",
        "(1, 3). Use shape (2,",
    ),
    (
        lambda: segment(IMAGE, np.ones((2, 3), int)),
        "present must be a bool mask",
        "got int",
    ),
    (
        lambda: cmsad_jax.Encoder(TINY_2D).init(jax.random.key(0), [feature()]),
        "an encoder must be given one array of shape (batch, *space, channels)",
        "got list. Give each modality an encoder of its own.",
    ),
    (
        lambda: EncoderConfig(strides=1),
        "strides must be a tuple of tuples of whole numbers",
        "got 1. Use",
    ),
    (
        lambda: EncoderConfig(strides=(1, 2, 2, 2)),
        "strides must be a tuple of tuples",
        "got (1, 2, 2, 2)",
    ),
    (
        lambda: EncoderConfig(kernels=[[3, 3]] * 4),
        "kernels must be a tuple of tuples",
        "got [[3, 3],",
    ),
    (
        lambda: EncoderConfig(channels=8),
        "channels must be a tuple of whole numbers",
        "got 8. Use for",
    ),
    (
        lambda: EncoderConfig(channels=(8.0,) * 4),
        "channels must be a tuple of whole",
        "got (8.0, 8.0",
    ),
    (
        lambda: EncoderConfig(blocks=(True,) * 4),
        "blocks must be a tuple of whole numbers",
        "got (True",
    ),
    (
        lambda: EncoderConfig((), (), (), ()),
        "an encoder must have one or more stages",
        "got channels ()",
    ),
    (
        lambda: dataclasses.replace(TINY_3D, kernels=((-1, 3, 3),) * 2),
        "kernel sizes must be odd and at least 1",
        "got ((-1, 3, 3), (-1, 3, 3)). Use 1, 3 or 5",
    ),
    (
        lambda: NetworkConfig(modalities="t2w"),
        "modalities must be a tuple of one or more",
        "got 't2w'.",
    ),
    (
        lambda: NetworkConfig(modalities=()),
        "modalities must be a tuple of one or more",
        "got (). Use",
    ),
    (
        lambda: NetworkConfig(modalities=("a/b",)),
        "at most 64 letters a to z",
        "got 'a/b'. Rename it.",
    ),
    (
        lambda: NetworkConfig(modalities=("A", "a")),
        "distinct names, in more than upper",
        "Name each once",
    ),
    (
        lambda: NetworkConfig(encoder=8),
        "encoder must be a EncoderConfig",
        "got 8. Use encoder=EncoderC",
    ),
    (
        lambda: NetworkConfig(fusion="concat"),
        "fusion must be a FusionConfig",
        "got 'concat'. Use fusion=",
    ),
    (
        lambda: NetworkConfig(num_classes=1.0),
        "num_classes must be a whole number",
        "got 1.0. Use 1.",
    ),
    (
        lambda: NetworkConfig(decoder_blocks=0),
        "decoder_blocks must be a whole number",
        "got 0. Use 1.",
    ),
    (
        lambda: NetworkConfig(head_bias=np.nan),
        "head_bias must be a finite number",
        "got nan. Use -4.",
    ),
    (
        lambda: FusionConfig(gate_kernel=-1),
        "gate_kernel must be a whole number of at",
        "got -1. Use 3.",
    ),
    (
        lambda: FusionConfig(gate_kernel=3.0),
        "gate_kernel must be a whole number of at",
        "got 3.0. Use 3",
    ),
    (
        lambda: FusionConfig(hidden=0),
        "hidden must be a whole number of at least 1",
        "got 0. Use 16.",
    ),
    # windows
    (
        lambda: windows(num_classes=2),
        "predict must return probabilities b *window k, (1, 2, 8, 8, 2) for num_classes=2",
        "got (1, 2, 8, 8, 1). Pass the num_classes of the network",
    ),
    (
        lambda: windows(predict=lambda x, p: x[..., 0]),
        "predict must return probabilities b *window k",
        "got (1, 2, 8, 8). Pass",
    ),
    (
        lambda: windows(predict=lambda x, p: x[..., :1], window=(8, 8), num_classes=3),
        "(1, 1, 8, 8, 3) for num_classes=3",
        "got (1, 1, 8, 8, 1). Pass",
    ),
    (
        lambda: windows(num_classes=0),
        "num_classes must be a whole number of at least 1",
        "got 0. Use 1.",
    ),
    (
        lambda: windows(batch_size=0),
        "batch_size must be a whole number of at least 1",
        "got 0. Use 1.",
    ),
    (lambda: windows(overlap=np.nan), "overlap must be in [0, 1)", "got nan. Use 0.5."),
    (lambda: windows(overlap="half"), "overlap must be in [0, 1)", "got 'half'. Use 0.5."),
    (
        lambda: windows(window=8),
        "window must be the size the network takes",
        "got 8 for an image (2, 8",
    ),
    (
        lambda: windows(window=(8,)),
        "window must be the size the network takes",
        "got (8,) for an image",
    ),
    (
        lambda: windows(window=(2, 0, 8)),
        "window must be the size",
        "got (2, 0, 8) for an image (2, 8, 8",
    ),
    (
        lambda: windows(window=(1, 2, 8, 8)),
        "window must be the size",
        "got (1, 2, 8, 8) for an image",
    ),
    (
        lambda: windows(flip_axes=(3,)),
        "flip_axes must be distinct axes of the window, 0 to 2",
        "got (3,)",
    ),
    (
        lambda: windows(flip_axes=(2, 2)),
        "flip_axes must be distinct axes",
        "got (2, 2). Use (2,) for",
    ),
    (
        lambda: windows(flip_axes=2),
        "flip_axes must be distinct axes of the window",
        "got 2. Use (2,)",
    ),
    (
        lambda: windows(image=np.zeros((1, 2, 8, 8, 3))),
        "the image must be one case",
        "(1, 2, 8, 8, 3).",
    ),
    (
        lambda: windows(image=[0]),
        "the image must be one case, an array *space m",
        "got list. Predict",
    ),
    (
        lambda: windows(image=np.zeros((2, 0, 8, 3))),
        "the image must be one case",
        "got (2, 0, 8, 3).",
    ),
    (
        lambda: windows(present=np.ones((1, 3), bool)),
        "present must have one entry for each",
        "got (1, 3)",
    ),
    (
        lambda: windows(present=[True] * 3),
        "present must have one entry for each channel",
        "got list besi",
    ),
    # segmentation losses and metrics
    (
        lambda: cmsad_jax.dice_loss(LOGITS, LABELS + 0.5),
        "labels must be whole numbers",
        "of float32. Ro",
    ),
    (
        lambda: cmsad_jax.dice_loss([0.0], LABELS),
        "logits must be an array",
        "got list. Pass one array",
    ),
    (
        lambda: cmsad_jax.dice_loss(LOGITS, LABELS, smooth=np.nan),
        "smooth must be a finite",
        "got nan.",
    ),
    (
        lambda: cmsad_jax.tversky_loss(LOGITS, LABELS, beta=-1.0),
        "beta must be a finite number",
        "got -1.",
    ),
    (
        lambda: cmsad_jax.focal_loss(LOGITS, LABELS, gamma=-2.0),
        "gamma must be a finite",
        "got -2.0. Use",
    ),
    (
        lambda: cmsad_jax.focal_loss(LOGITS, LABELS, alpha=2.0),
        "1 - alpha must be a finite",
        "got -1.0. U",
    ),
    (
        lambda: cmsad_jax.dice_score(LABELS[..., None], LABELS),
        "prediction and labels must have one shape, b *space",
        "got (1, 4, 4, 1) and (1, 4, 4). Take logits[..., 0] > 0",
    ),
    # kernels
    (
        lambda: cmsad_jax.convolution(feature(), jnp.ones((1, 1, 3, 3)), strides=1),
        "kernel and strides must have one entry for each of 2 or 3 axes of space",
        "and strides (1,). Use 2 for slices, 3 for volumes.",
    ),
    # the objective
    (
        lambda: LossConfig(smooth=np.nan),
        "smooth must be a finite number above 0",
        "got nan. Use 0.01.",
    ),
    (
        lambda: LossConfig(smooth=0.0),
        "smooth must be a finite number above 0",
        "got 0.0. Use 0.01.",
    ),
    (
        lambda: LossConfig(region_weight=-1.0),
        "region_weight must be a finite number",
        "got -1.0. Use 1.",
    ),
    (
        lambda: LossConfig(voxel_weight=np.inf),
        "voxel_weight must be a finite number",
        "got inf. Use 1.",
    ),
    (
        lambda: LossConfig(self_weight=-0.1),
        "self_weight must be a finite number",
        "got -0.1. Use 0.1.",
    ),
    (
        lambda: LossConfig(deep_weight=np.nan),
        "deep_weight must be a finite number",
        "got nan. Use 0.5.",
    ),
    (
        lambda: LossConfig(tversky_beta=-1.0),
        "tversky_beta must be a finite number",
        "got -1.0. Use 0.7.",
    ),
    (
        lambda: LossConfig(focal_gamma=-1.0),
        "focal_gamma must be a finite number",
        "got -1.0. Use 2.",
    ),
    (
        lambda: LossConfig(focal_alpha=1.5),
        "1 - focal_alpha must be a finite number",
        "got -0.5. Use 0.75",
    ),
    (
        lambda: LossConfig(warmup_steps=-1),
        "warmup_steps must be a whole number of",
        "got -1. Use 100.",
    ),
    (
        lambda: LossConfig(warmup_steps=0.5),
        "warmup_steps must be a whole number of",
        "got 0.5. Use 100.",
    ),
    (
        lambda: LossConfig(distance="kl"),
        "distance kl compares softmax maps",
        "normalization 'l2'. Set it",
    ),
    (
        lambda: LossConfig(pairs=("adc>t2w",)),
        "each pair must be text, teacher->student",
        "got 'adc>t2w'.",
    ),
    (
        lambda: LossConfig(pairs="adc->t2w"),
        "'mutual' or a list of teacher->student",
        "got 'adc->t2w'. Us",
    ),
    (lambda: LossConfig(pairs=("a->b", "a->b")), "pairs must differ", "Name each pair once."),
    (
        lambda: LossConfig(stages=()),
        "stages must be a list of one or more distinct",
        "got (). Use for",
    ),
    (
        lambda: LossConfig(stages=(1, 1)),
        "stages must be a list of one or more distinct",
        "got (1, 1). U",
    ),
    (
        lambda: LossConfig(stages=(-1,)),
        "distinct whole numbers from 0",
        "got (-1,). Use for example",
    ),
    (
        lambda: LossConfig(attention="l2"),
        "attention must be an AttentionConfig",
        "got 'l2'. Use attenti",
    ),
    (
        lambda: LossConfig(region_weight=0.0, voxel_weight=0.0),
        "an objective must hold a segmentation loss",
        "got region_weight 0 and voxel_weight 0. Raise one of them.",
    ),
    (
        lambda: AttentionConfig(exponent=np.inf),
        "attention exponent must be a finite",
        "got inf. Use 2.",
    ),
    (
        lambda: AttentionConfig(exponent="2"),
        "attention exponent must be a finite",
        "got '2'. Use 2.",
    ),
    (
        lambda: AttentionConfig(temperature=np.nan),
        "temperature must be a finite number above 0",
        "nan",
    ),
]


@pytest.mark.parametrize(("call", "rule", "came"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_refused_with_rule_what_came_and_remedy(
    call, rule, came, without_type_checks
):
    with pytest.raises(ConfigError) as refused:
        call()
    text = str(refused.value)
    assert rule in text
    assert came in text[text.index(rule) :]
    assert re.search(r"\. [A-Z].*\.$", text)  # the remedy


TVERSKY_OF_DICE = {"region": "tversky", "tversky_alpha": 0.5, "tversky_beta": 0.5}
NO_DISTILLATION = {"cross_modal_weight": 0.0, "self_weight": 0.0, "label_weight": 0.0}

TOGETHER = [
    (
        "early",
        NAMES,
        {},
        "got the fusion early, .*Use --loss.cross-modal-weight=0 --loss.self-weight=0 "
        "--loss.label-weight=0, or another",
    ),
    (
        "early",
        NAMES,
        {"self_weight": 0.0, "label_weight": 0.0},
        "one for all. Use --loss.cross-modal-weight=0, or another",
    ),
    ("early", NAMES, NO_DISTILLATION, None),
    (
        "scff",
        NAMES,
        {"stages": (2,)},
        r"deeper one to learn from; got stages \(2,\) of 3. Use --loss.s",
    ),
    ("scff", NAMES, {"stages": (2,), "self_weight": 0.0}, None),
    ("scff", NAMES, {"stages": (1, 2)}, None),
    ("scff", NAMES, {"stages": (1, 3)}, "distilled stages must be among the encoder's 0 to 2"),
    (
        "scff",
        NAMES,
        {"pairs": ("adc->dce",)},
        "modalities of t2w, adc, hbv; got 'adc->dce'. Use 'mut",
    ),
    ("scff", ("t2w",), {"pairs": ("adc->t2w",)}, "modalities of t2w; got 'adc->t2w'. Use 'mutual'"),
    ("scff", NAMES, {"correlation_weight": 0.1}, None),
    (
        "concat",
        NAMES,
        {"correlation_weight": 0.1},
        "got concat of t2w, adc, hbv. Use --loss.correlatio",
    ),
    (
        "scff",
        ("t2w",),
        {"correlation_weight": 0.1},
        "the fusion scff of two or more .* got scff of t2w",
    ),
    ("scff", ("t2w",), {}, None),
    (
        "early",
        NAMES,
        {"cross_modal_weight": 0.0, "self_weight": 0.0, "teachers": ("label", "fused")},
        "Use --loss.label-weight=0 --loss.fused-weight=0, or another",
    ),
    ("early", NAMES, {**NO_DISTILLATION, "teachers": ("average",)}, None),
    ("scff", NAMES, {"teachers": ("label",), "pairs": ("x->y",)}, None),
    ("scff", NAMES, TVERSKY_OF_DICE, "is Dice; got tversky_alpha 0.5 .*Use --loss.region=dice, or"),
    ("scff", NAMES, {"region": "tversky"}, None),
]


THREE_STAGES = EncoderConfig(
    (4, 6, 8), ((3, 3, 3),) * 3, ((1, 1, 1), (1, 2, 2), (2, 2, 2)), (1,) * 3
)


@pytest.mark.parametrize(("fusion", "modalities", "settings", "message"), TOGETHER)
def test_settings_that_cannot_go_together_are_refused(fusion, modalities, settings, message):
    network = tiny_config(fusion=fusion, modalities=modalities)
    network = dataclasses.replace(network, encoder=THREE_STAGES)
    config = LossConfig(**settings)
    if message is None:
        config.check(network)
        return
    with pytest.raises(ConfigError, match=message):
        config.check(network)


SAID = [
    ({}, {}, []),
    ({}, {"stages": (1, 2), "pairs": ("adc->t2w",)}, []),
    ({}, {**NO_DISTILLATION}, []),
    (
        {},
        {**NO_DISTILLATION, "stages": (1, 2), "pairs": ("adc->t2w",), "teachers": ("informed",)},
        [
            "loss.stages has no effect, as nothing is distilled.",
            "loss.teachers has no effect, as nothing is distilled.",
            "loss.pairs has no effect, as no modality teaches another.",
        ],
    ),
    (
        {},
        {"cross_modal_weight": 0.0, "pairs": ("adc->t2w",), "stages": (1, 2)},
        ["loss.pairs has no effect, as no modality teaches another."],
    ),
    (
        {},
        {"teachers": ("fused",), "label_weight": 0.2, "average_weight": 0.0, "fused_weight": 0.2},
        ["loss.label_weight has no effect, as loss.teachers lacks label."],
    ),
    (
        {},
        {"voxel": "focal", "class_weights": (1.0, 2.0)},
        ["loss.class_weights has no effect, as loss.voxel is focal."],
    ),
    (
        {"fusion": FusionConfig(kind="max", stages=(1,), residual=False)},
        {},
        [
            "network.fusion.stages has no effect, as network.fusion.kind is max.",
            "network.fusion.residual has no effect, as network.fusion.kind is max.",
        ],
    ),
    (
        {"fusion": FusionConfig(correlation_direction="reverse")},
        {},
        ["network.fusion.correlation_direction has no effect, as loss.correlation_weight is 0."],
    ),
    (
        {},
        {"attention": AttentionConfig(temperature=2.0)},
        ["loss.attention.temperature has no effect, as loss.attention.normalization is l2."],
    ),
    ({}, {"tversky_beta": 0.9}, ["loss.tversky_beta has no effect, as loss.region is dice."]),
    ({}, {"region": "tversky", "tversky_beta": 0.9}, []),
    ({}, {"focal_gamma": 1.0}, ["loss.focal_gamma has no effect, as loss.voxel is cross_entropy."]),
    ({}, {"voxel": "focal", "focal_alpha": 0.5, "focal_gamma": 1.0}, []),
    (
        {"deep_supervision": 0},
        {"deep_weight": 0.3},
        ["loss.deep_weight has no effect, as network.deep_supervision is 0."],
    ),
    (
        {"fusion": FusionConfig(kind="concat", hidden=8, gate_kernel=5, expression="linear")},
        {},
        [
            "network.fusion.hidden has no effect, as network.fusion.kind is concat.",
            "network.fusion.expression has no effect, as network.fusion.kind is concat.",
            "network.fusion.gate_kernel has no effect, as network.fusion.kind is concat.",
        ],
    ),
    ({"fusion": FusionConfig(kind="attention", gate_kernel=5)}, {}, []),
    (
        {"fusion": FusionConfig(kind="early"), "share_encoders": True},
        NO_DISTILLATION,
        ["network.share_encoders has no effect, as network.fusion.kind is early."],
    ),
    (
        {"num_classes": 3, "head_bias": -2.0},
        {},
        ["network.head_bias has no effect, as there are several classes."],
    ),
    (
        {"modalities": ("adc",)},
        {},
        ["There is no cross-modal distillation, as adc is the only modality."],
    ),
]


@pytest.mark.parametrize(("network", "settings", "said"), SAID, ids=range(len(SAID)))
def test_settings_without_effect_are_said(network, settings, said):
    assert LossConfig(**settings).without_effect(NetworkConfig(**network)) == said


@pytest.mark.parametrize("value", ABSENT)
@pytest.mark.parametrize("fusion", ["scff", "concat", "mean", "max", "attention"])
def test_what_an_absent_modality_holds_spoils_no_fusion(fusion, value):
    rng = np.random.default_rng(0)
    clean = {name: jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for name in NAMES}
    spoilt = {**clean, "adc": clean["adc"].at[0].set(value)}
    module = cmsad_jax.Fusion(4, NAMES, FusionConfig(kind=fusion, hidden=4))
    params = random_params(module, clean)

    @jax.jit
    def run(params, features):
        def total(params, features):
            output = module.apply({"params": params}, features, PRESENT)
            return (output.fused**2).sum() + output.correlation_loss.sum()

        return jax.value_and_grad(total, argnums=(0, 1))(params, features)

    equal(run(params, spoilt), run(params, clean))


@pytest.mark.parametrize("fusion", ["scff", "early"])
def test_what_an_absent_modality_holds_spoils_no_network(fusion):
    batch = tiny_batch(rank=2)
    network, params = init(tiny_config(rank=2, fusion=fusion, modalities=NAMES), batch)

    @jax.jit
    def run(params, image):
        def total(params, image):
            output = network.apply({"params": params}, image, PRESENT)
            features = jax.tree.leaves(output.features)
            return (output.logits**2).sum() + sum((f**2).sum() for f in features), output.logits

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, image)

    clean = run(params, batch["image"])
    for value in ABSENT:
        spoilt = batch["image"].copy()
        spoilt[0, ..., 1] = value
        equal(run(params, spoilt), clean)


@pytest.mark.parametrize(
    ("distance", "attention"),
    [
        ("l2", AttentionConfig()),
        ("l2", AttentionConfig(kind="max", exponent=3.0)),
        ("kl", AttentionConfig(normalization="softmax")),
    ],
)
@pytest.mark.parametrize("loss", [cross_modal_distillation_loss, self_distillation_loss])
@pytest.mark.parametrize("informed", [False, True])
def test_what_an_absent_modality_holds_spoils_no_distillation(loss, distance, attention, informed):
    rng = np.random.default_rng(0)
    shapes = [(2, 4, 4, 3), (2, 2, 2, 5)]
    clean = {
        name: [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
        for name in NAMES
    }

    @jax.jit
    def run(features):
        def total(features):
            return loss(
                features,
                stages=(0, 1),
                attention=attention,
                distance=distance,
                present=PRESENT,
                modalities=NAMES,
                foreground=jnp.ones((2, 4, 4)).at[:, 2:].set(0) if informed else None,
            ).sum()

        return jax.value_and_grad(total)(features)

    wanted = run(clean)
    assert wanted[0] > 0
    for value in ABSENT:
        equal(run({**clean, "adc": [f.at[0].set(value) for f in clean["adc"]]}), wanted)


def equal(found, wanted):
    """Values and gradients of the same program, to the bit, and finite."""
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.all(np.isfinite(want))
        np.testing.assert_array_equal(got, want)


def test_weights_and_columns_go_by_name_whatever_order_a_dictionary_has():
    """JAX sorts dictionaries by key: adc, hbv, t2w. Fusion by hand, with mean of projections."""
    module = cmsad_jax.Fusion(1, NAMES, FusionConfig(kind="mean"))
    values = {"t2w": 1.0, "adc": 10.0, "hbv": 100.0}
    features = {name: jnp.full((1, 2, 2, 1), value) for name, value in values.items()}
    weights = {
        f"project{m}": {"kernel": jnp.full((1, 1, 1, 1), m + 1.0), "bias": jnp.zeros(1)}
        for m in range(3)
    }
    present = np.array([[True, False, True]])
    expected = (1 * 1.0 + 3 * 100.0) / 2
    backwards = dict(reversed(features.items()))
    for run in (module.apply, jax.jit(module.apply)):
        for given in (features, backwards):
            fused = run({"params": weights}, given, present).fused
            np.testing.assert_allclose(fused, expected)


def test_an_absent_teacher_does_not_teach_whatever_order_a_dictionary_has():
    """By hand: t2w and hbv attend to one voxel each, adc to both; adc is absent."""
    first = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    features = {"t2w": [first], "adc": [first + first[:, :, ::-1]], "hbv": [first[:, :, ::-1]]}
    present = np.array([[True, False, True]])
    for run in (lambda x: x, jax.jit(lambda x: x)):
        value = cross(run(features), present=present, modalities=NAMES)
        np.testing.assert_allclose(value, 2.0)  # unit maps at right angles: 2 - 2 cos 90
        taught = cross(run(features), present=present, modalities=NAMES, pairs=("adc->t2w",))
        np.testing.assert_array_equal(taught, 0)


def test_constants_of_tversky_and_focal_reach_the_objective():
    """Two voxels, probability 1/2 each, one of them foreground: tp, fp and fn are 1/2."""
    from cmsad_jax.modules import NetworkOutput
    from cmsad_jax.training import segmentation_terms

    logits = jnp.zeros((1, 1, 2, 1))
    labels = jnp.array([[[1, 0]]])
    output = NetworkOutput(logits, (), {}, (), (), jnp.zeros(1))
    config = LossConfig(
        region="tversky",
        voxel="focal",
        tversky_alpha=0.2,
        tversky_beta=0.8,
        focal_gamma=1.0,
        focal_alpha=0.25,
        smooth=1e-9,
    )
    terms = segmentation_terms(output, labels, config)
    # 1 - tp / (tp + alpha fp + beta fn) = 1 - 1/2 / (1/2 + 0.1 + 0.4)
    np.testing.assert_allclose(terms["tversky_loss"], 0.5, rtol=1e-6)
    # mean of alpha_t (1 - p)^1 log 2 with alpha 1/4 and 3/4
    np.testing.assert_allclose(terms["focal_loss"], (0.25 + 0.75) / 2 * 0.5 * np.log(2), rtol=1e-6)
    other = dataclasses.replace(config, tversky_alpha=0.6, tversky_beta=1.0)
    # 1 - 1/2 / (1/2 + 0.3 + 0.5)
    found = segmentation_terms(output, labels, other)["tversky_loss"]
    np.testing.assert_allclose(found, 1 - 0.5 / 1.3, rtol=1e-6)
