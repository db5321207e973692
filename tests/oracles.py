"""Slow, obvious NumPy in float64, written from the formulas: what the library must equal."""

import itertools

import numpy as np

EPSILON = 1e-12


def convolution(x, kernel, strides):
    """Cross-correlation with ``k // 2`` zeros on both sides, tap by tap."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    sizes, space = kernel.shape[:-2], x.shape[1:-1]
    padded = np.pad(x, [(0, 0), *((size // 2, size // 2) for size in sizes), (0, 0)])
    total = 0.0
    for tap in np.ndindex(*sizes):
        window = tuple(
            slice(start, start + n, step)
            for start, n, step in zip(tap, space, strides, strict=True)
        )
        total = total + padded[(slice(None), *window)] @ kernel[tap]
    return total


def attention_energy(features, kind="mean", exponent=2.0):
    """``abs(F)^p`` reduced over channels."""
    magnitude = np.abs(np.asarray(features, np.float64)) ** exponent
    return {"mean": np.mean, "sum": np.sum, "max": np.max}[kind](magnitude, axis=-1)


def normalize_map(energy, normalization="l2", temperature=1.0):
    """Unit norm or softmax over the voxels, example by example."""
    result = np.zeros(energy.shape)
    for i, q in enumerate(np.asarray(energy, np.float64)):
        if normalization == "softmax":
            weights = np.exp((q - q.max()) / temperature)
            result[i] = weights / weights.sum()
        elif (q**2).sum() >= EPSILON:
            result[i] = q / np.sqrt((q**2).sum())
    return result


def correlation(features, alpha, beta, gamma):
    """``r_ij`` voxel by voxel."""
    features, alpha, beta, gamma = (
        np.asarray(x, np.float64) for x in (features, alpha, beta, gamma)
    )
    num_modalities = len(features)
    result = np.zeros((*features.shape[1:-1], num_modalities, num_modalities))
    for i, j in itertools.permutations(range(num_modalities), 2):
        for voxel in np.ndindex(*features.shape[1:-1]):
            b = voxel[0]
            own, other = features[i][voxel], features[j][voxel]
            expressed = alpha[b, i, j] * other**2 + beta[b, i, j] * other + gamma[b, i, j]
            if (own**2).sum() >= EPSILON and (expressed**2).sum() >= EPSILON:
                norms = np.linalg.norm(own) * np.linalg.norm(expressed)
                result[(*voxel, i, j)] = own @ expressed / norms
    return result


def distance(teacher, student, name, temperature=1.0, reduction="sum"):
    """Distance of two normalised maps of one example."""
    if name == "l2":
        of_voxel = (teacher - student) ** 2
    else:
        of_voxel = temperature**2 * (teacher * np.log(teacher / student))
    return of_voxel.sum() if reduction == "sum" else of_voxel.mean()


def cross_modal_distillation_loss(
    features, stages, pairs, name, present, foreground=None, **attention
):
    """Mean over the valid (stage, pair) terms of each example.

    ``foreground`` holds the target on the grid of each stage; then a term is valid where the
    teacher has the larger share of its attention there.
    """
    energy_options = {k: attention[k] for k in ("kind", "exponent")}
    norm_options = {k: attention[k] for k in ("normalization", "temperature")}
    names = list(features)
    result = []
    for b in range(present.shape[0]):
        terms = []
        for stage, (teacher, student) in itertools.product(stages, pairs):
            if present[b, names.index(teacher)] and present[b, names.index(student)]:
                maps = [
                    normalize_map(
                        attention_energy(features[m][stage][b : b + 1], **energy_options),
                        **norm_options,
                    )
                    for m in (teacher, student)
                ]
                if foreground is not None:
                    shares = [(q * foreground[stage][b]).sum() / q.sum() for q in maps]
                    if shares[0] <= shares[1]:
                        continue
                terms.append(distance(*maps, name, norm_options["temperature"]))
        result.append(np.mean(terms) if terms else 0.0)
    return np.array(result)


def taught_by_one(students, teacher, stages, name, valid, reduction="sum", **attention):
    """Mean over the valid (student, stage) terms of each example; one teacher for all students.

    ``teacher`` holds an energy for each stage, on its grid; ``valid[student]`` says where a student
    is taught.
    """
    energy_options = {k: attention[k] for k in ("kind", "exponent")}
    norm_options = {k: attention[k] for k in ("normalization", "temperature")}
    result = []
    for b in range(len(next(iter(valid.values())))):
        terms = []
        for student, stage in itertools.product(students, stages):
            if valid[student][b]:
                q = attention_energy(students[student][stage][b : b + 1], **energy_options)
                maps = [
                    normalize_map(energy, **norm_options)
                    for energy in (np.asarray(teacher[stage])[b : b + 1], q)
                ]
                terms.append(distance(*maps, name, norm_options["temperature"], reduction))
        result.append(np.mean(terms) if terms else 0.0)
    return np.array(result)


def output_distillation_loss(logits, teacher, withheld):
    """``sum_k p log(p / q)`` voxel by voxel, then their mean; 0 where nothing is withheld."""
    result = []
    for student, expected, counts in zip(
        np.asarray(logits, np.float64), np.asarray(teacher, np.float64), withheld, strict=True
    ):
        if student.shape[-1] == 1:
            q, p = (1 / (1 + np.exp(-x[..., 0])) for x in (student, expected))
            q, p = (np.stack([1 - x, x], -1) for x in (q, p))
        else:
            q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, expected))
        result.append((p * np.log(p / q)).sum(-1).mean() if counts else 0.0)
    return np.array(result)


def map_distance(features, stages, present, **attention):
    """Mean over pairs of examples that have the modality, then over modalities and stages."""
    terms = []
    for (m, name), stage in itertools.product(enumerate(features), stages):
        energy = attention_energy(features[name][stage], **attention)
        maps = [q for q, there in zip(normalize_map(energy), present[:, m], strict=True) if there]
        pairs = list(itertools.combinations(maps, 2))
        if pairs:
            terms.append(np.mean([distance(*pair, "l2") for pair in pairs]))
    return np.mean(terms)


def optimise(kind, params, gradients, rates, config):
    """Weights after a step with each gradient, which are clipped already."""
    x, mean, square = np.array(params, np.float64), 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        if kind != "adamw":
            gradient = gradient + config.weight_decay * x
        if kind == "sgd":
            mean = config.momentum * mean + gradient
            x = x - rate * (gradient + config.momentum * mean if config.nesterov else mean)
            continue
        mean = config.beta1 * mean + (1 - config.beta1) * gradient
        square = config.beta2 * square + (1 - config.beta2) * gradient**2
        change = (mean / (1 - config.beta1**t)) / (
            np.sqrt(square / (1 - config.beta2**t)) + config.epsilon
        )
        x = x - rate * (change + (config.weight_decay * x if kind == "adamw" else 0))
    return x


def dice_loss(probability, target, smooth):
    """One minus the overlap of one class of one example."""
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + smooth) / (probability.sum() + target.sum() + smooth)


def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def dense(x, weights):
    """A dense layer."""
    return x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"], np.float64)


def two_layers(x, weights):
    """Dense, ReLU, dense."""
    return dense(np.maximum(dense(x, weights["hidden"]), 0), weights["output"])


def csam(x, params, noise=None):
    """CSAM of the slices of one volume ``d h w c``, all of which are there.

    ``noise``: standard normal, of the factors and then of the slices; None takes ``a`` itself.
    """
    x = np.asarray(x, np.float64)
    pooled = x.max((0, 1, 2)), x.mean((0, 1, 2))
    x = x * sigmoid(sum(two_layers(p, params["semantic"]) for p in pooled))
    planes = np.stack([x.max((0, 3)), x.mean((0, 3))], -1)
    scores = convolution(planes[None], params["positional"]["kernel"], (1, 1))[0]
    x = x * sigmoid(scores + np.asarray(params["positional"]["bias"]))
    pooled = x.max((1, 2, 3)), x.mean((1, 2, 3))
    a = sum(two_layers(p, params["slice"]) for p in pooled)
    if noise is not None:
        rectified, depth = np.maximum(a, 0), len(x)
        factor = dense(rectified, params["slice_factor"]).reshape(depth, -1)
        root = np.sqrt(np.exp(dense(rectified, params["slice_log_diagonal"])))
        rank = factor.shape[1]
        a = dense(rectified, params["slice_mean"]) + factor @ noise[:rank] + root * noise[rank:]
    return x * sigmoid(a)[:, None, None, None]


def cat(x, params, heads, pooling):
    """CAT-Net's attention among the slices of one volume, each normalised by itself."""
    x = np.asarray(x, np.float64)
    depth, height, width, channels = x.shape
    y = x.copy()
    for i, c in itertools.product(range(depth), range(channels)):
        angle = i / 10_000 ** ((c - c % 2) / channels)
        y[i, ..., c] += np.cos(angle) if c % 2 else np.sin(angle)
    rows, columns = min(pooling, height), min(pooling, width)
    cells = np.array(
        [
            [
                [
                    y[i, r * rows : (r + 1) * rows, s * columns : (s + 1) * columns].mean((0, 1))
                    for s in range(width // columns)
                ]
                for r in range(height // rows)
            ]
            for i in range(depth)
        ]
    )
    kernels = {
        name: np.asarray(params[name]["kernel"], np.float64)[0, 0].reshape(channels, heads, -1)
        for name in ("query", "key", "value")
    }
    outs = []
    for head in range(heads):
        query, key = ((cells @ kernels[n][:, head]).reshape(depth, -1) for n in ("query", "key"))
        scores = query @ key.T / np.sqrt(query.shape[1])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        outs.append(np.einsum("ij,jhwc->ihwc", weights, y @ kernels["value"][:, head]))
    join = {**params["join"], "kernel": np.asarray(params["join"]["kernel"])[0, 0]}
    z = y + dense(np.concatenate(outs, -1), join)
    mean, variance = z.mean((1, 2), keepdims=True), z.var((1, 2), keepdims=True)
    z = (z - mean) / np.sqrt(variance + 1e-6) * np.asarray(params["scale"])
    z += np.asarray(params["bias"])
    return z * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
