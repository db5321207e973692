import jax
import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.case import CaseInfo
from data_pipelines.serving import loading
from data_pipelines.serving.sampling import Sampling
from experiments.training.feed import choose_residency, hidden_labels, training_feed

CROP = (4, 8, 8)


class Source(loading.CaseSource):
    """Random cases in memory."""

    def __init__(self, num_cases=3, space=(6, 12, 14)):
        rng = np.random.default_rng(0)
        info = [CaseInfo(f"case{i}", f"patient{i}", True) for i in range(num_cases)]
        super().__init__([], info, "none")
        for one in info:
            self._kept[one.case_id] = loading.Arrays(
                rng.integers(-(2**15), 2**15, (*space, 2), np.int16),
                rng.integers(0, 2, space, np.uint8),
                rng.integers(0, 2, 2).astype(bool),
            )


def feed(where, *, start_step=0, unlabelled=()):
    source = Source()
    sampling = Sampling(
        crop=CROP,
        batch_size=3,
        num_steps=4,
        seed=7,
        foreground_share=0.5,
        start_step=start_step,
        unlabelled=frozenset(unlabelled),
    )
    return training_feed(source, source.case_ids, sampling, where=where)


@pytest.mark.parametrize(("start", "unlabelled"), [(0, ()), (2, {"case1"})])
def test_device_and_host_give_the_same_batches(start, unlabelled):
    device, host = (
        feed(where, start_step=start, unlabelled=unlabelled) for where in ("device", "host")
    )
    count = 0
    for cut, read in zip(device, host, strict=True):
        assert set(cut) == set(read)
        assert isinstance(cut["image"], jax.Array)
        for name in read:
            assert cut[name].dtype == read[name].dtype
            np.testing.assert_array_equal(cut[name], read[name])
        count += 1
    assert count == 4 - start
    assert host.waited_s > 0


def test_no_foreground_crop_is_drawn_by_a_hidden_label():
    batches = list(feed("host", unlabelled={"case0", "case2"}))
    cases = np.concatenate([batch["case_index"] for batch in batches])
    labelled = np.concatenate([batch["labelled"] for batch in batches])
    np.testing.assert_array_equal(labelled, cases == 1)
    assert (cases == 1).sum() == 6 + 2  # half of 12 crops, and a third of the others
    assert all("labelled" not in batch for batch in feed("host"))


def test_labels_are_hidden_by_patient_alike_among_those_with_target_and_others():
    info = [
        CaseInfo(f"{patient}-{visit}", f"patient{patient}", patient < 10 and visit == 0)
        for patient in range(30)
        for visit in range(2)
    ]
    source = loading.CaseSource([], info, "none")
    training = source.case_ids[:-4]  # of 10 patients with target and 18 without
    found = {
        share: hidden_labels(source, training, share=share, seed=3)
        for share in (0.0, 0.25, 0.5, 0.99)
    }
    assert found[0.0] == set()
    for share, (positive, others) in {0.25: (2, 4), 0.5: (5, 9), 0.99: (9, 17)}.items():
        patients = {case_id.split("-")[0] for case_id in found[share]}
        assert len(found[share]) == 2 * len(patients)
        assert sum(int(patient) < 10 for patient in patients) == positive
        assert len(patients) == positive + others
    assert found[0.25] < found[0.5] < found[0.99] < {*training}
    assert hidden_labels(source, training, share=0.5, seed=4) != found[0.5]


def test_where_cases_lie_follows_from_sizes():
    assert choose_residency("auto", 10**9, None)[0] == "host"
    assert choose_residency("auto", 10**9, 8 * 10**9)[0] == "device"
    assert choose_residency("auto", 3 * 10**9, 8 * 10**9)[0] == "host"
    assert choose_residency("host", 1, 8 * 10**9)[0] == "host"
    assert choose_residency("device", 3 * 10**9, 8 * 10**9)[0] == "device"
    with pytest.raises(ConfigError, match=r"got 9.00 GB .* 8.00 GB. Use --data.residency=host"):
        choose_residency("device", 9 * 10**9, 8 * 10**9)
