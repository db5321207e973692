import json

import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError, MissingDataError
from experiments.compare import compare, compare_all, format_comparisons, main
from experiments.measuring.summary import summarise
from experiments.process.records import write_record
from experiments.run_folder import SCHEMA, Results, RunFolder, RunRecord
from experiments.settings.stored import to_json
from tests.experiments.fake_run import row_of
from tests.experiments.probable_run import phantom_source, probable_run


def save_run(folder, dice, *, name="lesion", patients=None, fold=0):
    """A run with the given Dice per case; None marks a negative case."""
    folder.mkdir()
    rows = [
        row_of(
            case_id,
            patient_id=(patients or {}).get(case_id),
            fold=fold,
            name=name,
            truth_ml=0.0 if score is None else 1.0,
            dice=score,
        )
        for case_id, score in dice.items()
    ]
    RunFolder(folder).write_results(Results(summarise(rows, [fold])))
    return folder


@pytest.fixture
def runs(tmp_path):
    a = save_run(tmp_path / "a", {"p": 0.9, "q": 0.7, "r": 0.5, "n": None})
    b = save_run(tmp_path / "b", {"p": 0.6, "q": 0.5, "r": 0.4, "n": None})
    return a, b


def test_means_and_difference_are_over_the_positive_cases(runs):
    (row,) = compare(*runs)
    assert row.num_cases == row.num_patients == 3
    assert row.mean_a == pytest.approx(0.7)
    assert row.mean_b == pytest.approx(0.5)
    assert row.difference == pytest.approx(0.2)
    assert row.interval == pytest.approx((0.1, 0.3))
    assert row.tests.permutation_p == 0.25  # 2 / 2 ** 3: all three signs alike
    assert row.tests.wilcoxon_p == 0.25
    assert row.tests.rank_biserial == 1
    assert row.tests.cohens_dz == pytest.approx(2.0)
    assert row.same_folds


def test_swapping_the_runs_mirrors_the_result(runs):
    (forward,), (backward,) = compare(*runs), compare(*runs[::-1])
    assert backward.difference == pytest.approx(-forward.difference)
    assert backward.interval == pytest.approx([-end for end in forward.interval[::-1]])
    assert backward.tests.permutation_p == forward.tests.permutation_p
    assert backward.tests.rank_biserial == -forward.tests.rank_biserial


def test_p_values_are_corrected_for_the_number_of_comparisons(runs, tmp_path):
    first, second = runs
    equal = save_run(tmp_path / "c", {"p": 0.9, "q": 0.7, "r": 0.5, "n": None})
    rows = compare_all(first, [second, equal])
    assert [row.tests.permutation_p for row in rows] == [0.25, 1.0]
    assert [row.corrected_p for row in rows] == [0.5, 1.0]


def test_missed_case_counts_as_zero(tmp_path):
    a = save_run(tmp_path / "a", {"p": 0.0, "q": 0.8})
    b = save_run(tmp_path / "b", {"p": 0.5, "q": 0.8})
    (row,) = compare(a, b)
    assert row.num_cases == 2
    assert row.difference == pytest.approx(-0.25)


def test_one_patient_gives_no_interval(tmp_path, capsys):
    a = save_run(tmp_path / "a", {"p": 0.9, "n": None})
    b = save_run(tmp_path / "b", {"p": 0.6, "n": None})
    (row,) = compare(a, b)
    assert row.interval is row.tests is row.corrected_p is None
    main([str(a), str(b)])
    assert "needs 2 patients" in capsys.readouterr().out


def test_command_prints_a_line_per_run_and_writes_json(runs, tmp_path, capsys):
    c = save_run(tmp_path / "c", {"p": 0.9, "q": 0.7, "r": 0.5, "n": None}, fold=1)
    main([*map(str, runs), str(c), "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "a - b (lesion)" in out
    assert "+0.2000" in out
    assert "a - c (lesion): folds differ" in out
    rows = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [row["difference"] for row in rows] == pytest.approx([0.2, 0.0])
    assert rows[1]["tests"]["permutation_p"] == rows[1]["corrected_p"] == 1.0
    assert "a - b (lesion): only 3 positive patients: below 20" in out


def test_runs_that_cannot_be_paired_are_refused(runs, tmp_path):
    a, _ = runs
    with pytest.raises(MissingDataError, match=r"must hold metrics\.json"):
        compare(a, tmp_path / "nowhere")
    fewer = save_run(tmp_path / "fewer", {"p": 0.6, "q": 0.5, "n": None})
    with pytest.raises(DataError, match=r"same cases; got 1 \(r\) only in .*a and none only in"):
        compare(a, fewer)
    gland = save_run(tmp_path / "gland", {"p": 0.6, "q": 0.5, "r": 0.4, "n": None}, name="gland")
    with pytest.raises(DataError, match=r"same classes; got \['lesion'\] in .*\['gland'\]"):
        compare(a, gland)
    other = save_run(tmp_path / "other", {"p": 0.6, "q": 0.5, "r": None, "n": None})
    with pytest.raises(DataError, match=r"same truth; got other volumes of lesion in 1 \(r\)\."):
        compare(a, other)
    metrics = json.loads((a / "metrics.json").read_text("utf-8"))
    metrics["metric_per_case"][-1]["volume_truth_ml"] *= 1.1
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    with pytest.raises(DataError, match="same truth; got other volumes of lesion in 1"):
        compare(a, larger)
    negative = save_run(tmp_path / "negative", {"n": None})
    with pytest.raises(DataError, match="needs a positive case; got none"):
        compare(negative, negative)
    with pytest.raises(DataError, match="at least two runs; got 1"):
        main([str(a)])
    with pytest.raises(ConfigError, match=r"needs resamples; got 0\. Use --num-resamples=10000"):
        main([str(a), str(a), "--num-resamples=0"])


def test_runs_of_equal_names_are_told_apart(tmp_path):
    dice = {"p": 0.9, "q": 0.7}
    for row in ("full", "scff", "concat"):
        (tmp_path / row).mkdir()
    runs = [save_run(tmp_path / row / "seed_1", dice) for row in ("full", "scff", "concat")]
    text = format_comparisons(compare_all(runs[0], runs[1:]))
    assert "\nfull/seed_1 - scff/seed_1 (lesion) " in text
    assert "\nfull/seed_1 - concat/seed_1 (lesion) " in text


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return phantom_source(tmp_path_factory.mktemp("cache"))


def finding(strength_of):
    """A probability for the lesion of each case, and 0.1 elsewhere."""
    return lambda case: np.where(case.original_truth > 0, strength_of[case.case_id], 0.1)


def test_the_mean_of_runs_is_compared_and_proposed(source, tmp_path, capsys):
    """Each run is sure of what the other is not; their mean finds all, whatever their folds."""
    cases = [info.case_id for info in source[1].info]
    positive = [info.case_id for info in source[1].info if info.positive]
    assert len(positive) > 1
    folds = [{case: (number + n) % 2 for number, case in enumerate(cases)} for n in (0, 1)]
    ranks = {case: positive.index(case) if case in positive else 0 for case in cases}
    weak = [{case: 0.9 if rank % 2 == n else 0.4 for case, rank in ranks.items()} for n in (0, 1)]
    a, b = (
        probable_run(tmp_path / name, *source, fold_of, finding(strength))
        for name, fold_of, strength in zip("ab", folds, weak, strict=True)
    )
    mean = tmp_path / "mean"
    main([str(a), str(b), "--average", str(mean)])
    said = capsys.readouterr().out
    assert "a - mean (lesion)" in said
    assert "Highest Dice: the mean of the runs (1.0000). To predict so: cmsad predict" in said
    assert f"--model {a} --model {b} --input CASES" in said
    summary = RunFolder(mean).read_results().summary
    assert {row.case_id: row.fold for row in summary.metric_per_case} == folds[0]
    assert all(row.dice == 1 for row in summary.metric_per_case if row.case_id in positive)
    assert (mean / "report.html").is_file()

    main([str(a), str(b)])
    assert "Add --average FOLDER to see whether the mean" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"into a folder of its own; .*mean holds something"):
        main([str(a), str(b), "--average", str(mean)])
    write_record(RunFolder(a).config, RunRecord(to_json(source[0]), "others"), schema=SCHEMA)
    with pytest.raises(DataError, match=r"the data must be those that .*a was trained on; got oth"):
        main([str(a), str(b), "--average", str(tmp_path / "other")])
    a = probable_run(tmp_path / "a", *source, folds[0], finding(weak[0]))
    (file,) = RunFolder(b).fold(folds[1][cases[0]]).probabilities(cases[0], ("lesion",))
    file.unlink()
    with pytest.raises(DataError, match=f"probabilities/{cases[0]}.nii.gz"):
        main([str(a), str(b), "--average", str(tmp_path / "other")])
