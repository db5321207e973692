"""Uncertainty over patients, and whether two runs differ: intervals, paired tests, corrections.

Patients are the unit throughout: the cases of one patient, and the folds of one run, are not
independent. Everything is vectorised and deterministic in its seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import scipy

FEW_PATIENTS = 20
"""Below this number an interval is reported with a warning: see experiments/RESULTS.md."""


def few_patients_warning(num_patients: int) -> str:
    """What to say beside an interval over fewer than ``FEW_PATIENTS`` patients."""
    return (
        f"only {num_patients} positive patient{'s' * (num_patients != 1)}: below {FEW_PATIENTS}, "
        "intervals and tests say little, and an interval may not hold what it promises."
    )


NUM_RESAMPLES = 10_000

Statistic = Callable[[np.ndarray], np.ndarray]
"""From weights of the patients, ``r n``, to the statistic under each, ``r`` or ``r k``."""


def bca_interval(
    statistic: Statistic,
    num_patients: int,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> np.ndarray | None:
    """Bias-corrected and accelerated bootstrap interval (Efron, JASA 1987) over patients.

    A resample is how often it drew each patient, so ``statistic`` takes weights. Replicates for
    which it is NaN (no positive patient was drawn) are left out.

    Returns:
        Lower and upper end, ``2`` or ``2 k``; both the estimate where no replicate differs from
        it, NaN where the estimate is NaN; None below two patients.
    """
    if num_patients < 2:
        return None
    everyone = np.ones((1, num_patients))
    estimate = np.asarray(statistic(everyone))[0]
    jackknife = statistic(everyone - np.eye(num_patients))
    replicates = np.sort(statistic(_draws(num_patients, num_resamples, seed)), axis=0)  # NaN last
    valid = np.isfinite(replicates).sum(0)
    # Half of the ties count as below: a statistic of few values would look biased otherwise.
    scale = 1e-12 * np.maximum(1, np.abs(estimate))
    below = (replicates < estimate - scale).sum(0) + 0.5 * (
        np.abs(replicates - estimate) <= scale
    ).sum(0)
    share = np.clip(below, 0.5, np.maximum(valid - 0.5, 0.5)) / np.maximum(valid, 1)
    bias = scipy.stats.norm.ppf(share)
    jackknife = np.where(np.isfinite(jackknife), jackknife, estimate)
    influence = jackknife.mean(0) - jackknife
    spread = (influence**2).sum(0)
    acceleration = (influence**3).sum(0) / np.maximum(6 * spread**1.5, 1e-300)
    tail = scipy.stats.norm.ppf((1 - level) / 2)
    ends = []
    for z in (bias + tail, bias - tail):
        place = scipy.stats.norm.cdf(bias + z / np.maximum(1 - acceleration * z, 1e-12))
        index = np.clip(np.nan_to_num(place * valid), 0, np.maximum(valid - 1, 0)).astype(int)
        ends.append(np.take_along_axis(replicates, index[None], axis=0)[0])
    interval = np.stack(ends)
    interval = np.where(spread > scale**2, interval, estimate)
    return np.where(np.isfinite(estimate), interval, np.nan)


@functools.lru_cache(maxsize=2)
def _draws(num_patients: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each patient, ``r n``."""
    equal = np.full(num_patients, 1 / num_patients)
    draws = np.random.default_rng(seed).multinomial(num_patients, equal, size=num_resamples)
    draws = draws.astype(np.float64)
    draws.setflags(write=False)
    return draws


def bootstrap_interval(
    values: np.ndarray,
    patients: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % interval of the mean of ``values`` over cases, by ``bca_interval`` over patients.

    A patient is drawn with all of its cases; the mean is over the cases drawn. None below two
    patients.
    """
    sums, counts = sums_of_patients(values, patients)
    interval = bca_interval(
        lambda weights: weights @ sums / np.maximum(weights @ counts, 1e-12),
        len(counts),
        num_resamples=num_resamples,
        seed=seed,
    )
    return None if interval is None else (float(interval[0]), float(interval[1]))


def sums_of_patients(values: np.ndarray, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of ``values`` and number of cases of each patient, in the order of their names."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.bincount(owner, weights=values, minlength=len(names))
    return sums, np.bincount(owner, minlength=len(names)).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class PairedTests:
    """How far the patients' differences lie from 0, and what chance would give.

    A patient counts by what all its cases add to the mean over cases: the sum of their differences,
    over the mean number of cases. So the tests are of the difference that is reported, also where
    some patients have more cases than others.

    Attributes:
        wilcoxon_p: Wilcoxon signed-rank test, two-sided; ties at 0 are left out.
        permutation_p: sign-flip permutation test of the mean, two-sided.
        cohens_dz: mean over standard deviation of the differences; None where that is 0.
        rank_biserial: share of the rank sum in favour of A minus that in favour of B, -1 to 1.
    """

    wilcoxon_p: float
    permutation_p: float
    cohens_dz: float | None
    rank_biserial: float


def paired_tests(differences: np.ndarray, patients: Sequence[str], *, seed: int = 0) -> PairedTests:
    """Tests of the mean of ``differences`` (one for each case, ``A - B``) over patients."""
    sums, counts = sums_of_patients(differences, patients)
    parts = sums / counts.mean()  # their mean is the mean over cases
    spread = float(parts.std(ddof=1)) if parts.size > 1 else 0.0
    moved = parts[parts != 0]
    ranks = scipy.stats.rankdata(np.abs(moved))
    return PairedTests(
        wilcoxon_p=float(wilcoxon_p(parts)),
        permutation_p=float(permutation_p(parts, seed=seed)),
        cohens_dz=float(parts.mean()) / spread if spread > 1e-12 else None,
        rank_biserial=float((np.sign(moved) * ranks).sum() / ranks.sum()) if moved.size else 0.0,
    )


def wilcoxon_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided Wilcoxon signed-rank p along the last axis; 1 where all differences are 0."""
    differences = np.asarray(differences, np.float64)
    if not differences.any():
        return np.ones(differences.shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        result = scipy.stats.wilcoxon(differences, axis=-1)
    p = np.asarray(result.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return np.where(np.isfinite(p), p, 1.0)


def permutation_p(
    differences: np.ndarray, *, num_permutations: int = 9_999, seed: int = 0
) -> np.ndarray:
    """Two-sided sign-flip permutation p of the mean along the last axis.

    Equal models give each difference either sign alike. The observed signs count as one of the
    permutations, so p is never 0 and the test keeps its level. All sign patterns are used where
    there are no more than ``num_permutations``.
    """
    differences = np.asarray(differences, np.float64)
    size = differences.shape[-1]
    exhaustive = size <= np.log2(num_permutations + 1)
    if exhaustive:
        signs = (np.arange(2**size)[:, None] >> np.arange(size) & 1) * 2.0 - 1
    else:
        signs = np.random.default_rng(seed).integers(0, 2, (num_permutations, size)) * 2.0 - 1
    observed = np.abs(differences.sum(-1, keepdims=True))
    tolerance = 1e-9 * np.abs(differences).sum(-1, keepdims=True)
    as_large = (np.abs(differences @ signs.T) >= observed - tolerance).sum(-1)
    return as_large / len(signs) if exhaustive else (as_large + 1) / (len(signs) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, 1979), in the order given.

    The chance of any false positive among them stays below the level at which they are read.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    return np.minimum(corrected, 1.0).tolist()
