"""Segmentation losses per example (docs/method.md, section 6).

One logit means sigmoid, and foreground where ``labels > 0``; several mean softmax over classes,
background first. All compute in float32 and are finite, with finite gradients, on empty labels.
They raise ``ConfigError`` where the shapes of logits and labels disagree, where labels are not
whole numbers, and for constants outside their range.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cmsad_jax.types import ConfigError, Labels, Logits, PerExample, check_number

Over = Literal["example", "batch", "target"]
"""Over what an overlap is taken: each example; the whole batch; each example that holds target."""


def dice_loss(
    logits: Logits,
    labels: Labels,
    *,
    smooth: float = 1e-5,
    include_background: bool = False,
    over: Over = "example",
    labelled: Bool[Array | np.ndarray, " b"] | None = None,
    counted: Bool[Array | np.ndarray, "b *space"] | None = None,
    axis_name: str | None = None,
) -> PerExample:
    """Soft Dice: ``1 - (2 |p y| + smooth) / (|p| + |y| + smooth)``, averaged over the classes.

    Equals MONAI's ``DiceLoss`` at its defaults. An example without foreground has the loss
    ``1 - smooth / (|p| + smooth)``: its gradient matters where the predicted volume ``|p|`` is of
    the order of ``smooth``, and grows without bound as it shrinks. ``over`` takes the overlap where
    there is target, and leaves the rest to a voxel-wise loss.

    Args:
        logits: network output ``b *space k``. One is a sigmoid; several are a softmax, of which the
            first is the background.
        labels: integers ``b *space``; beside one logit, foreground is every value above 0.
        smooth: in voxels, added to numerator and denominator.
        include_background: count the background of several classes as a class.
        over: ``example``: each example by itself. ``batch``: one overlap of the whole batch, the
            value of each of its examples (nnU-Net's ``batch_dice``). ``target``: each example that
            holds target. A class counts under ``batch`` only if the batch holds it, and under
            ``target`` only in the examples that hold it; where there is none, value and gradient
            are 0.
        labelled: which examples have a label, None is all; the others have value 0 and no part in
            the overlap of a batch.
        counted: voxels that count, None is all; the others have no part in any sum.
        axis_name: the mapped axis over which the batch is split, for ``batch``.

    Raises:
        ConfigError: if logits, labels or constants do not fit; see the module.

    Examples:
        >>> logits = jnp.array([[[9.0], [9.0], [-9.0], [-9.0]]])
        >>> dice_loss(logits, jnp.array([[1, 1, 0, 0]])).round(2)
        Array([0.], dtype=float32)
    """
    check_number("smooth", smooth, least=0, usual=1e-5)
    p, y = _foreground(logits, labels, include_background, counted)
    hit, predicted, true = _counted((_sum(p * y), _sum(p), _sum(y)), over, labelled, axis_name)
    loss = 1 - (2 * hit + smooth) / (predicted + true + smooth)
    return _mean_of_classes(loss, true, over, labelled)


def tversky_loss(
    logits: Logits,
    labels: Labels,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 1e-5,
    include_background: bool = False,
    over: Over = "example",
    labelled: Bool[Array | np.ndarray, " b"] | None = None,
    counted: Bool[Array | np.ndarray, "b *space"] | None = None,
    axis_name: str | None = None,
) -> PerExample:
    """``1 - (tp + smooth) / (tp + alpha fp + beta fn + smooth)``, averaged over the classes.

    Salehi et al., MLMI 2017; equals MONAI's ``TverskyLoss``. ``beta > alpha`` favours sensitivity.
    With 0.5 and 0.5 it is the Dice loss of twice the ``smooth``.

    Args:
        logits: network output ``b *space k``. One is a sigmoid; several are a softmax, of which the
            first is the background.
        labels: integers ``b *space``; beside one logit, foreground is every value above 0.
        alpha: weight of false positives.
        beta: weight of false negatives.
        smooth: in voxels, added to numerator and denominator.
        include_background: count the background of several classes as a class.
        over: ``example``: each example by itself. ``batch``: one overlap of the whole batch, the
            value of each of its examples (nnU-Net's ``batch_dice``). ``target``: each example that
            holds target. A class counts under ``batch`` only if the batch holds it, and under
            ``target`` only in the examples that hold it; where there is none, value and gradient
            are 0.
        labelled: which examples have a label, None is all; the others have value 0 and no part in
            the overlap of a batch.
        counted: voxels that count, None is all; the others have no part in any sum.
        axis_name: the mapped axis over which the batch is split, for ``batch``.

    Raises:
        ConfigError: if logits, labels or constants do not fit; see the module.

    Examples:
        >>> logits = jnp.array([[[9.0], [9.0], [-9.0], [-9.0]]])
        >>> bool(tversky_loss(logits, jnp.array([[1, 0, 0, 0]]), alpha=0.3, beta=0.7)[0] < 0.25)
        True
    """
    check_number("smooth", smooth, least=0, usual=1e-5)
    check_number("alpha", alpha, least=0, usual=0.3)
    check_number("beta", beta, least=0, usual=0.7)
    p, y = _foreground(logits, labels, include_background, counted)
    sums = (_sum(p * y), _sum(p * (1 - y)), _sum((1 - p) * y), _sum(y))
    hit, false, missed, true = _counted(sums, over, labelled, axis_name)
    loss = 1 - (hit + smooth) / (hit + alpha * false + beta * missed + smooth)
    return _mean_of_classes(loss, true, over, labelled)


def cross_entropy_loss(
    logits: Logits,
    labels: Labels,
    *,
    class_weights: tuple[float, ...] | None = None,
    counted: Bool[Array | np.ndarray, "b *space"] | None = None,
) -> PerExample:
    """Mean over voxels of ``-log p`` of the true class, from the logits.

    Equals the cross-entropy term of MONAI's ``DiceCELoss``.

    Args:
        logits: network output ``b *space k``. One is a sigmoid; several are a softmax, of which the
            first is the background.
        labels: integers ``b *space``; beside one logit, foreground is every value above 0.
        class_weights: of each class, background first (so two beside one logit); the mean is then
            weighted by that of each voxel's true class, as in PyTorch. None weighs all alike.
        counted: voxels that count, None is all; 0 where none does.

    Raises:
        ConfigError: if logits, labels or constants do not fit, see the module, or the weights are
            not one positive number for each class.

    Examples:
        >>> cross_entropy_loss(jnp.zeros((1, 4, 1)), jnp.array([[1, 0, 0, 0]])).round(2)
        Array([0.69], dtype=float32)
    """
    loss = jax.nn.softplus(-_margin(logits, labels))
    if class_weights is None:
        return _mean(loss, counted)
    num_classes = max(logits.shape[-1], 2)
    if len(class_weights) != num_classes or min(class_weights) <= 0:
        raise ConfigError(
            "class weights must be one positive number for each class, background first; "
            f"got {class_weights} for {num_classes} classes. "
            f"Use for example {(1.0,) * num_classes}."
        )
    index = labels > 0 if logits.shape[-1] == 1 else labels
    weights = jnp.asarray(class_weights, jnp.float32)[jnp.asarray(index, jnp.int32)]
    total = _mean(weights, counted)
    if counted is not None:
        total = jnp.where(total > 0, total, 1.0)
    return _mean(loss * weights, counted) / total


def focal_loss(
    logits: Logits,
    labels: Labels,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    counted: Bool[Array | np.ndarray, "b *space"] | None = None,
) -> PerExample:
    """Mean over voxels of ``-(1 - p)^gamma log p`` of the true class.

    Lin et al., ICCV 2017; equals MONAI's ``FocalLoss`` for one logit.

    Args:
        logits: network output ``b *space k``. One is a sigmoid; several are a softmax, of which the
            first is the background.
        labels: integers ``b *space``; beside one logit, foreground is every value above 0.
        gamma: 0 is cross-entropy; larger dwells on voxels that are wrong.
        alpha: weight of foreground voxels, those of background weigh ``1 - alpha``; None weighs
            all by 1.
        counted: voxels that count, None is all; 0 where none does.

    Raises:
        ConfigError: if logits, labels or constants do not fit; see the module.

    Examples:
        >>> focal_loss(jnp.zeros((1, 4, 1)), jnp.array([[1, 0, 0, 0]]), gamma=2.0).round(2)
        Array([0.17], dtype=float32)
    """
    check_number("gamma", gamma, least=0, usual=2)
    if alpha is not None:
        check_number("alpha", alpha, least=0, usual=0.25)
        check_number("1 - alpha", 1 - alpha, least=0, usual=0.75)
    margin = _margin(logits, labels)
    # From log(1 - p), as 1 - p would lose its digits and its gradient where p is close to 1.
    loss = jnp.exp(gamma * jax.nn.log_sigmoid(-margin)) * jax.nn.softplus(-margin)
    if alpha is not None:
        loss *= jnp.where(labels > 0, alpha, 1 - alpha)
    return _mean(loss, counted)


def _margin(logits: Logits, labels: Labels) -> Float[Array, "b *space"]:
    """Logit of the true class against all others: its probability is the sigmoid of this."""
    _check(logits, labels)
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jnp.where(labels > 0, logits[..., 0], -logits[..., 0])
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(logits, axis=-1, where=~true)
    return jnp.where(true, logits, 0).sum(-1) - others


def _foreground(
    logits: Logits,
    labels: Labels,
    include_background: bool,
    counted: Bool[Array | np.ndarray, "b *space"] | None,
) -> tuple[Float[Array, "b *space classes"], Float[Array, "b *space classes"]]:
    """Probability and truth (0 or 1) of each class that counts; 0 both where voxels do not."""
    _check(logits, labels)
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        found = jax.nn.sigmoid(logits), jnp.asarray(labels > 0, jnp.float32)[..., None]
    else:
        first = 0 if include_background else 1
        truth = jax.nn.one_hot(labels, logits.shape[-1])
        found = jax.nn.softmax(logits)[..., first:], truth[..., first:]
    if counted is None:
        return found
    p, y = (jnp.where(jnp.asarray(counted)[..., None], x, 0.0) for x in found)
    return p, y


def _counted(
    sums: tuple[Float[Array, "b classes"], ...],
    over: Over,
    labelled: Bool[Array | np.ndarray, " b"] | None,
    axis_name: str | None,
) -> tuple[Float[Array, "b classes"], ...]:
    """Sums over each example, or under ``batch`` over all that are labelled, for each example."""
    if over not in get_args(Over):
        raise ConfigError(
            f"over must be one of {', '.join(get_args(Over))}; got {over!r}. Use 'example'."
        )
    if over != "batch":
        return sums
    if labelled is not None:
        sums = tuple(jnp.where(labelled[:, None], x, 0.0) for x in sums)
    totals = tuple(x.sum(0, keepdims=True) for x in sums)
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
    return tuple(jnp.broadcast_to(total, x.shape) for total, x in zip(totals, sums, strict=True))


def _mean_of_classes(
    loss: Float[Array, "b classes"],
    true: Float[Array, "b classes"],
    over: Over,
    labelled: Bool[Array | np.ndarray, " b"] | None,
) -> PerExample:
    """Mean over the classes that count: all, or those with target; 0 where there is none."""
    if over == "example":
        mean = loss.mean(-1)
    else:
        counts = true > 0
        mean = jnp.where(counts, loss, 0.0).sum(-1) / jnp.maximum(counts.sum(-1), 1)
    return mean if labelled is None else jnp.where(labelled, mean, 0.0)


def _sum(x: Float[Array, "b *space classes"]) -> Float[Array, "b classes"]:
    return x.sum(tuple(range(1, x.ndim - 1)))


def _mean(
    x: Float[Array, "b *space"], counted: Bool[Array | np.ndarray, "b *space"] | None = None
) -> PerExample:
    axes = tuple(range(1, x.ndim))
    if counted is None:
        return x.mean(axes)
    kept = jnp.asarray(counted)
    return jnp.where(kept, x, 0.0).sum(axes) / jnp.maximum(kept.sum(axes), 1)


def _check(logits: Any, labels: Any) -> None:
    for name, array in (("logits", logits), ("labels", labels)):
        if not hasattr(array, "dtype"):
            raise ConfigError(
                f"{name} must be an array; got {type(array).__name__}. Pass one array for a batch."
            )
    if logits.ndim < 3 or logits.shape[:-1] != labels.shape:
        raise ConfigError(
            "logits must have the shape of the labels and one more axis, of classes; "
            f"got logits {logits.shape} and labels {labels.shape}. Resize one to the other's grid."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype != bool:
        raise ConfigError(
            "labels must be whole numbers, the class of each voxel; "
            f"got an array of {labels.dtype}. Round and convert them: labels.astype(int)."
        )
