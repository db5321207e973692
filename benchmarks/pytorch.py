"""The benchmarked operations in PyTorch, as its users write them. PyTorch is optional here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Foreign

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None


def available() -> bool:
    """Whether PyTorch is installed and computes where jax does."""
    if torch is None:
        return False
    return jax.default_backend() == "cpu" or torch.cuda.is_available()


def distillation(
    features: Mapping[str, Sequence[jax.Array]], cotangent: jax.Array | None
) -> Foreign:
    """Mutual cross-modal distillation of l2-normalised mean-of-squares maps, per example."""
    wants = cotangent is not None
    inputs = {name: [_image(f, wants) for f in stages] for name, stages in features.items()}

    def attention(feature):
        energy = feature.float().square().mean(1).flatten(1)
        return torch.nn.functional.normalize(energy, dim=1)

    def loss():
        maps = {name: [attention(f) for f in stages] for name, stages in inputs.items()}
        terms = [
            (teacher.detach() - student).square().sum(1)
            for t in maps
            for u in maps
            if t != u
            for teacher, student in zip(maps[t], maps[u], strict=True)
        ]
        return torch.stack(terms).mean(0)

    leaves = [feature for stages in inputs.values() for feature in stages]
    return _foreign(loss, leaves, None if cotangent is None else _tensor(cotangent))


def correlation(
    g: Sequence[jax.Array],
    alpha: jax.Array,
    beta: jax.Array,
    gamma: jax.Array,
    cotangent: jax.Array | None,
) -> Foreign:
    """Spatial correlation of every ordered pair of modalities, ``b *space m m``."""
    wants = cotangent is not None
    inputs = [_image(x, wants) for x in g]
    coefficients = [_tensor(x).requires_grad_(wants) for x in (alpha, beta, gamma)]
    count = len(inputs)

    def correlated(i, j):
        x = inputs[j].float()
        if i == j:
            return torch.zeros_like(x[:, 0])
        per_channel = (x.shape[0], x.shape[1], *(1,) * (x.ndim - 2))
        a, b, c = (k[:, i, j].reshape(per_channel) for k in coefficients)
        return torch.nn.functional.cosine_similarity(
            inputs[i].float(), a * x.square() + b * x + c, dim=1
        )

    def forward():
        rows = [torch.stack([correlated(i, j) for j in range(count)], -1) for i in range(count)]
        return torch.stack(rows, -2)

    pull = None if cotangent is None else _tensor(cotangent)
    return _foreign(forward, [*inputs, *coefficients], pull)


def convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], cotangent: jax.Array | None
) -> Foreign:
    """Convolution with ``k // 2`` padding, channels last in memory."""
    wants = cotangent is not None
    rank = x.ndim - 2
    image = _image(x, wants)
    layout = torch.channels_last if rank == 2 else torch.channels_last_3d
    weight = _tensor(kernel).movedim((-1, -2), (0, 1)).contiguous(memory_format=layout)
    weight.requires_grad_(wants)
    apply = torch.nn.functional.conv2d if rank == 2 else torch.nn.functional.conv3d
    padding = [k // 2 for k in kernel.shape[:rank]]
    return _foreign(
        lambda: apply(image, weight, stride=strides, padding=padding),
        [image, weight],
        None if cotangent is None else _image(cotangent, False),
        channels_axis=1,
    )


def _tensor(array: jax.Array) -> Any:
    place = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return torch.from_numpy(np.array(array, np.float32)).to(place, getattr(torch, array.dtype.name))


def _image(array: jax.Array, wants_gradient: bool) -> Any:
    """The tensor with channels on axis 1, where PyTorch looks for them, and last in memory."""
    return _tensor(array).moveaxis(-1, 1).requires_grad_(wants_gradient)


def _foreign(
    function: Callable[[], Any],
    inputs: Sequence[Any],
    cotangent: Any | None,
    channels_axis: int = -1,
) -> Foreign:
    def call():
        if cotangent is None:
            with torch.no_grad():
                function()
        else:
            torch.autograd.grad(function(), inputs, cotangent)
        if jax.default_backend() != "cpu":
            torch.cuda.synchronize()

    def value():
        with torch.no_grad():
            return function().moveaxis(channels_axis, -1).float().cpu().numpy()

    return Foreign(call, value)
