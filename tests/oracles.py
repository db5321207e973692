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


def distance(teacher, student, name, temperature=1.0):
    """Distance of two normalised maps of one example."""
    if name == "l2":
        return ((teacher - student) ** 2).sum()
    return temperature**2 * (teacher * np.log(teacher / student)).sum()


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


def dice_loss(probability, target, smooth):
    """One minus the overlap of one class of one example."""
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + smooth) / (probability.sum() + target.sum() + smooth)
