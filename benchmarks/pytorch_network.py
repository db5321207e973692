"""The network and its train step in plain PyTorch, from the same weights.

As a PyTorch user would write it: ``nn.functional``, AdamW, gradients
clipped. It covers what the presets use: instance norm, SCFF or concat, one logit, every modality
present, mean-of-squares attention normalised by l2, Dice and cross-entropy.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.pytorch import torch
from cmsad_jax.inference import importance, window_starts
from experiments.settings.config import Config


def flat_weights(params: Any) -> dict[str, Any]:
    """Weights by path (``a/b/kernel``) as PyTorch lays them out: outputs, inputs, space."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    weights = {}
    for path, leaf in leaves:
        name = "/".join(part.key for part in path)
        tensor = torch.from_numpy(np.array(leaf, np.float32))
        if name.endswith("kernel") and "coefficients" not in name:
            tensor = tensor.movedim((-1, -2), (0, 1)).contiguous()
        weights[name] = tensor.to(place()).requires_grad_()
    return weights


def place() -> str:
    """Where jax computes, in PyTorch's words."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


class Network:
    """Forward pass of ``CMSAD``: ``(logits, deep logits, features[modality][stage])``."""

    def __init__(self, config: Config, weights: Mapping[str, Any]):
        network = config.network
        found = (
            *(network.num_classes, network.encoder.norm, network.encoder.slices),
            *(
                network.distance_clip_mm,
                "separable" in (network.encoder.block, network.decoder_block),
            ),
        )
        if found != (1, "instance", "none", None, False):
            raise ValueError(
                "the PyTorch network has one logit, instance norm, no attention across slices, no "
                f"distance and no separable block; got {found}. Leave its row out."
            )
        self.config = network
        self.weights = weights
        self.rank = network.encoder.rank
        self.convolve = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[self.rank]
        self.mode = {2: "bilinear", 3: "trilinear"}[self.rank]

    def conv(self, x: Any, name: str, strides: Any = 1) -> Any:
        kernel = self.weights[f"{name}/kernel"]
        padding = [size // 2 for size in kernel.shape[2:]]
        return self.convolve(
            x, kernel, self.weights.get(f"{name}/bias"), stride=strides, padding=padding
        )

    def norm(self, x: Any, name: str) -> Any:
        return torch.nn.functional.instance_norm(
            x, weight=self.weights[f"{name}/scale"], bias=self.weights[f"{name}/bias"], eps=1e-6
        )

    def block(self, x: Any, name: str, strides: Any = 1) -> Any:
        act = torch.nn.functional.leaky_relu
        y = act(self.norm(self.conv(x, f"{name}/Conv_0", strides), f"{name}/Normalization_0"))
        y = self.norm(self.conv(y, f"{name}/Conv_1"), f"{name}/Normalization_1")
        if x.shape != y.shape:
            x = self.norm(self.conv(x, f"{name}/Conv_2", strides), f"{name}/Normalization_2")
        return act(x + y)

    def resize(self, x: Any, space: Any) -> Any:
        if x.shape[2:] == space:
            return x
        return torch.nn.functional.interpolate(x, space, mode=self.mode, align_corners=False)

    def encode(self, x: Any, name: str) -> list[Any]:
        encoder, features = self.config.encoder, []
        for stage in range(encoder.num_stages):
            for number in range(encoder.blocks[stage]):
                strides = encoder.strides[stage] if number == 0 else 1
                x = self.block(x, f"{name}/stage{stage}_block{number}", strides)
            features.append(x)
        return features

    def correlate(self, g: list[Any], name: str) -> Any:
        """SCFF's gates, ``b m *space``."""
        batch, channels = g[0].shape[:2]
        ones = (1,) * self.rank
        pairs = list(itertools.permutations(range(len(g)), 2))
        pooled = [x.float().mean(tuple(range(2, x.ndim))) for x in g]
        inputs = torch.stack([torch.cat([pooled[i], pooled[j]], -1) for i, j in pairs], 1)

        def dense(x, layer):
            kernel = self.weights[f"{name}/{layer}/kernel"]
            return torch.einsum("bpi,pio->bpo", x, kernel) + self.weights[f"{name}/{layer}/bias"]

        hidden = dense(inputs, "coefficients_hidden")
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        table = dense(hidden, "coefficients").reshape(batch, len(pairs), 3, channels, *ones)
        maps = []
        for p, (i, j) in enumerate(pairs):
            alpha, beta, gamma = (table[:, p, k] for k in range(3))
            x = g[j].float()
            expressed = (alpha * x + (1 + beta)) * x + gamma
            maps.append(torch.nn.functional.cosine_similarity(g[i].float(), expressed, dim=1))
        return torch.sigmoid(self.conv(torch.stack(maps, 1), f"{name}/gate"))

    def fuse(self, features: list[Any], name: str) -> Any:
        g = [self.conv(x, f"{name}/project{m}") for m, x in enumerate(features)]
        mean = sum(g[1:], g[0]) / len(g)
        gated = g
        if self.config.fusion.kind == "scff" and len(g) > 1:
            gates = self.correlate(g, name)
            gated = [x * (1 + gates[:, m : m + 1].to(x.dtype)) for m, x in enumerate(g)]
        return self.conv(torch.cat(gated, 1), f"{name}/join") + mean

    def decode(self, fused: list[Any]) -> tuple[Any, list[Any]]:
        x, deep = fused[-1], []
        for stage in reversed(range(len(fused) - 1)):
            if stage < self.config.deep_supervision:
                deep.append(self.conv(x, f"decoder/head{stage + 1}").float())
            x = self.conv(x, f"decoder/reduce{stage}")
            x = torch.cat([self.resize(x, fused[stage].shape[2:]), fused[stage]], 1)
            x = self.block(x, f"decoder/block{stage}")
        return self.conv(x, "decoder/head0").float(), deep[::-1]

    def __call__(self, image: Any) -> tuple[Any, list[Any], dict[str, list[Any]]]:
        """``image`` is ``b m *space``."""
        features = {
            name: self.encode(image[:, m : m + 1], f"encoder_{name}")
            for m, name in enumerate(self.config.modalities)
        }
        fused = [
            self.fuse([features[name][stage] for name in features], f"fusion{stage}")
            for stage in range(self.config.encoder.num_stages)
        ]
        logits, deep = self.decode(fused)
        return logits, deep, features


def attention(feature: Any) -> Any:
    """Mean of squares over the channels, ``b 1 *space``."""
    return feature.float().square().mean(1, keepdim=True)


def unit(energy: Any) -> Any:
    """Of unit norm over the voxels of each example."""
    return torch.nn.functional.normalize(energy.flatten(1), dim=1)


def objective(network: Network, config: Config, image: Any, label: Any) -> Any:
    """The loss of ``cmsad_jax.training.loss_fn`` after the warm-up."""
    logits, deep, features = network(image)
    loss, outputs = 0.0, [logits, *deep]
    shares = [config.loss.deep_weight**i for i in range(len(outputs))]
    target = label.float()
    for share, output in zip(shares, outputs, strict=True):
        z = network.resize(output, target.shape[1:])[:, 0]
        p, axes = torch.sigmoid(z), tuple(range(1, z.ndim))
        overlap = 2 * (p * target).sum(axes) + config.loss.smooth
        dice = 1 - overlap / (p.sum(axes) + target.sum(axes) + config.loss.smooth)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, target)
        part = config.loss.region_weight * dice.mean() + config.loss.voxel_weight * entropy
        loss = loss + share / sum(shares) * part
    stages = config.loss.distilled_stages(len(next(iter(features.values()))))
    energy = {name: [attention(f) for f in fs] for name, fs in features.items()}
    if config.loss.cross_modal_weight:
        maps = {name: {s: unit(energy[name][s]) for s in stages} for name in energy}
        terms = [
            (maps[t][s].detach() - maps[u][s]).square().sum(1)
            for t, u in itertools.permutations(maps, 2)
            for s in stages
        ]
        loss = loss + config.loss.cross_modal_weight * torch.stack(terms).mean()
    if config.loss.self_weight:
        terms = []
        for name, s in itertools.product(energy, stages):
            if s + 1 < len(energy[name]):
                teacher = network.resize(energy[name][s + 1], energy[name][s].shape[2:])
                student = unit(energy[name][s])
                terms.append((unit(teacher).detach() - student).square().sum(1))
        loss = loss + config.loss.self_weight * torch.stack(terms).mean()
    return loss


def whole_volume(
    config: Config, params: Any, *, window: tuple[int, ...], overlap: float, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """``*space m`` to the foreground probability ``*space``, in a loop over windows.

    The windows and their Gaussian weights are those of ``cmsad_jax.inference.sliding_window``; the
    image is at least as large as the window.
    """
    network = Network(config, flat_weights(params))
    rank = config.network.encoder.rank
    size = (1, *window)[-3:]
    weight = torch.from_numpy(importance(size)).to(place())
    half = config.network.dtype == "bfloat16"

    def predict(image: np.ndarray) -> np.ndarray:
        volume = torch.from_numpy(image).movedim(-1, 0).to(place())
        total, mass = torch.zeros(2, *volume.shape[1:], device=place())
        starts = [window_starts(n, w, overlap) for n, w in zip(volume.shape[1:], size, strict=True)]
        corners = [
            tuple(slice(i, i + n) for i, n in zip(corner, size, strict=True))
            for corner in itertools.product(*starts)
        ]
        with torch.inference_mode(), torch.autocast(place(), torch.bfloat16, enabled=half):
            for first in range(0, len(corners), batch_size):
                chunk = corners[first : first + batch_size]
                windows = torch.stack([volume[:, *corner] for corner in chunk])
                if rank == 2:
                    windows = windows[:, :, 0]
                found = torch.sigmoid(network(windows)[0].float())[:, 0]
                for corner, values in zip(chunk, found, strict=True):
                    total[corner] += weight * values.reshape(size)
                    mass[corner] += weight
        return (total / mass).cpu().numpy()

    return predict


def loss_and_step(
    config: Config,
    params: Any,
    batch: Mapping[str, Any],
    *,
    last: bool = True,
    compiled: bool = False,
) -> tuple[float, Callable[[], Any]]:
    """The loss of ``params`` on ``batch``, and a call that makes one update and waits for it.

    ``last`` keeps the channels last in memory; else features are contiguous, channels first.
    ``compiled``: loss and gradient by ``torch.compile``, at the first call.
    """
    weights = flat_weights(params)
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[config.network.encoder.rank]
    for name, weight in weights.items():
        if last and weight.ndim == config.network.encoder.rank + 2:
            weights[name] = weight.detach().contiguous(memory_format=layout).requires_grad_()
    image, label = (
        torch.from_numpy(np.array(batch[name])).to(place()) for name in ("image", "label")
    )
    image = image.movedim(-1, 1)
    if not last:
        image = image.contiguous()
    network = Network(config, weights)
    optimizer = torch.optim.AdamW(
        list(weights.values()),
        lr=config.train.optimizer.learning_rate,
        weight_decay=config.train.optimizer.weight_decay,
    )
    half = config.network.dtype == "bfloat16"

    function = torch.compile(objective) if compiled else objective

    def loss():
        with torch.autocast(place(), torch.bfloat16, enabled=half):
            return function(network, config, image, label)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(
            list(weights.values()), config.train.optimizer.clip_norm, foreach=True
        )
        optimizer.step()
        if place() == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), torch.autocast(place(), torch.bfloat16, enabled=half):
        return float(objective(network, config, image, label)), step
