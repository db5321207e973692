import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmsad_jax.modules import baselines
from cmsad_jax.types import ConfigError
from data_pipelines.case import spacing_of
from data_pipelines.faults import DataError
from data_pipelines.reading.volume_io import write_nifti
from data_pipelines.serving import loading
from data_pipelines.serving.splits import Folds
from experiments import ablation
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.summary import summarise
from experiments.run_folder import Results, RunFolder
from experiments.settings.config import CascadeConfig, window
from experiments.settings.presets import PRESETS
from experiments.settings.stored import to_json
from experiments.settings.systems import SYSTEMS
from experiments.studies import ablation_table, cross_validation
from experiments.studies.ablation_table import folder_of_row, write_table
from tests.experiments.fake_run import row_of

TINY = [
    "--accelerator=cpu",
    "--num-folds=2",
    "--data.phantom.num-cases=10",
    *("--data.preprocess.spacing-mm", "3", "3", "3"),
    *("--data.preprocess.size", "12", "32", "32"),
    *("--train.crop", "8", "32", "32"),
    "--train.validations=1",
    *("--network.encoder.channels", "4", "4", "4", "6"),
    "--predict.figures=1",
]


def command(tmp_path, **options):
    options = {"preset": "quick", "match_parameters": False} | options
    return ablation.AblationConfig(output=tmp_path / "ablation", **options)


def rows_of(tmp_path, options=(), **chosen):
    asked = command(tmp_path, **chosen)
    base, _ = ablation.base_of(asked, options)
    return {
        row.name: row.config
        for row in ablation.variants(base, ablation._cv_options(asked, options), asked)
    }


def test_rows_are_those_of_the_method(tmp_path):
    rows = rows_of(tmp_path)
    assert list(rows) == [
        *("full", "scff", "cmsad", "concat", "attention-gated", "early-unet", "early-resenc"),
        *("t2w-alone", "adc-alone", "hbv-alone"),
    ]
    kinds = {name: config.network.fusion.kind for name, config in rows.items()}
    assert [kinds[name] for name in ("full", "scff", "cmsad", "concat")] == [
        *("scff", "scff", "concat", "concat")
    ]
    for name, config in rows.items():
        distils = config.loss.cross_modal_weight > 0 and config.loss.self_weight > 0
        assert distils == (name in ("full", "cmsad"))
        assert config.train == rows["full"].train
    assert rows["adc-alone"].network.modalities == rows["adc-alone"].data.modalities == ("adc",)
    assert rows["early-resenc"].network.encoder.blocks == (1, 3, 4, 6)


def test_systems_are_rows_where_they_are_asked_for(tmp_path):
    rows = rows_of(tmp_path, rows=tuple(SYSTEMS))
    assert list(rows) == ["full", *SYSTEMS]
    full = rows.pop("full")
    assert rows.pop("distance").network.distance_clip_mm == 15
    assert rows.pop("modality-weights").network.fusion.kind == "weighted"
    assert rows.pop("cascade").cascade == CascadeConfig(target="gland")
    light = rows.pop("light")
    assert light == dataclasses.replace(full, network=PRESETS["light"].network)
    for name, config in rows.items():
        encoder = config.network.encoder
        assert encoder.slices == ("none" if name == "slice2d" else name)
        assert encoder.kernels == ((3, 3),) * 4
        assert not config.loss.distils_maps
        voxels = config.train.batch_size * np.prod(config.train.crop)
        assert voxels == full.train.batch_size * np.prod(full.train.crop)
        depth = 1 if name == "slice2d" else 6
        assert config.train.crop == (depth, *full.train.crop[1:])
        assert window(config) == config.train.crop[-encoder.rank :]
        share = full.train.foreground_share if name == "slice2d" else 0.6
        assert config.train.foreground_share == share
    slices = rows_of(tmp_path, config="slice2d", rows=("csam",))
    assert slices["full"].train.crop[0] == 1
    assert slices["full"].train.batch_size == 16
    assert slices["csam"].train.crop == (6, *slices["full"].train.crop[1:])
    assert slices["csam"].train.batch_size == 2
    asked = ("--train.crop", "4", "48", "48", "--train.foreground-share=0.5")
    thin = rows_of(tmp_path, asked, rows=("csam",))["csam"].train
    assert (thin.crop, thin.batch_size, thin.foreground_share) == ((4, 48, 48), 2, 0.5)


def test_options_hold_for_all_rows_and_replace_those_of_the_preset(tmp_path):
    rows = rows_of(tmp_path, ["--train.steps=7", "--train.batch-size", "3"])
    assert {config.train.steps for config in rows.values()} == {7}
    assert {config.train.batch_size for config in rows.values()} == {3}
    assert {config.folds for config in rows.values()} == {(0, 1)}
    full = rows_of(tmp_path, preset="full")["full"]
    assert full.folds is None


def test_a_sweep_changes_one_field_of_the_full_model(tmp_path):
    sweep = ("loss.attention.exponent=1,4", "loss.stages=1 2", "loss.pairs=adc->t2w")
    rows = rows_of(tmp_path, rows=("full",), sweep=sweep)
    assert list(rows) == [
        *("full", "loss.attention.exponent=1", "loss.attention.exponent=4"),
        *("loss.stages=1 2", "loss.pairs=adc->t2w"),
    ]
    assert rows["loss.attention.exponent=4"].loss.attention.exponent == 4
    assert rows["loss.stages=1 2"].loss.stages == (1, 2)
    assert rows["loss.pairs=adc->t2w"].loss.pairs == ("adc->t2w",)
    assert rows["loss.pairs=adc->t2w"].network == rows["full"].network
    assert len(folder_of_row(Path("out"), "data.path=/x/y", 1).parts) == 3
    for faulty in ("exponent", "=1", "loss.pairs="):
        with pytest.raises(ConfigError, match="a sweep must be field=value,value"):
            rows_of(tmp_path, sweep=(faulty,))


def test_unknown_rows_and_presets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rows must be among full, .*late-fusion, .*; got other"):
        rows_of(tmp_path, rows=("other",))
    with pytest.raises(ConfigError, match="config must be one of small"):
        rows_of(tmp_path, config="large")


def test_late_fusion_asks_for_its_parts(tmp_path):
    rows = rows_of(tmp_path, rows=("late-fusion",))
    assert list(rows) == ["full", "t2w-alone", "adc-alone", "hbv-alone"]
    two = rows_of(tmp_path, ["--data.modalities", "t2w", "adc"])
    assert {"t2w-alone", "adc-alone"} <= set(two)
    assert "hbv-alone" not in two
    one = rows_of(tmp_path, ["--data.modalities", "t2w"])
    assert not any(name.endswith("alone") for name in one)


def test_rows_are_matched_in_parameters(tmp_path):
    rows = rows_of(tmp_path, rows=("early-unet",), match_parameters=True)
    counts = [
        baselines.count_parameters(rows[name].network, window(rows[name]))
        for name in ("full", "early-unet")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.03)


def test_the_channel_of_a_cascade_is_counted(tmp_path):
    (_, alone), (_, boxed) = rows_of(tmp_path, rows=("cascade",)).items()
    counts = [
        baselines.count_parameters(config.network, window(config)) for config in (alone, boxed)
    ]
    added = 27 * len(alone.network.modalities) * alone.network.encoder.channels[0]
    assert 0 < counts[1] - counts[0] <= added


@pytest.mark.slow
def test_the_light_row_keeps_its_size_and_the_others_are_widened(tmp_path):
    rows = rows_of(tmp_path, rows=("light", "slice2d"), match_parameters=True)
    space = window(rows["full"])
    counts = {
        name: baselines.count_parameters(config.network, window(config))
        for name, config in rows.items()
    }
    assert counts["light"] < 500_000 < counts["full"]
    assert counts["slice2d"] == pytest.approx(counts["full"], rel=0.03)
    operations = [baselines.count_operations(rows[n].network, space) for n in ("light", "full")]
    assert operations[0] < 0.5 * operations[1]


def save(run, dice):
    """A run with one positive case for each Dice, done in folds 0 and 1."""
    run.mkdir(parents=True)
    rows = [
        row_of(f"c{i:02d}", patient_id=f"p{i:02d}", fold=i % 2, dice=float(score))
        for i, score in enumerate(dice)
    ]
    RunFolder(run).write_results(Results(summarise(rows, [0, 1]), folds_done=(0, 1)))


def summary_of(run):
    return RunFolder(run).read_results().summary


@pytest.fixture
def three_rows(tmp_path):
    """Rows of the ablation, of which ``scff`` lies 0.1 below the full model, with two seeds."""
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.4, 0.8, 24)
    for name, shift in (("full", 0.1), ("scff", 0.0), ("concat", 0.1)):
        for seed in (1, 2):
            noise = rng.normal(0, 0.01, 24)
            save(tmp_path / name / f"seed_{seed}", dice + shift + noise + 0.02 * seed)
    asked = command(tmp_path, rows=("scff", "concat"))
    base, _ = ablation.base_of(asked, [])
    rows = ablation.variants(base, ablation._cv_options(asked, []), asked)
    return tmp_path, [row for row in rows if row.name in ("full", "scff", "concat")]


@pytest.fixture
def no_sizes(monkeypatch):
    sizes = ablation_table.Size(num_parameters=1234, num_operations=5e9)
    monkeypatch.setattr(ablation_table, "_size", lambda *arguments: sizes)


def test_table_compares_every_row_with_the_full_model(three_rows, no_sizes):
    folder, rows = three_rows
    table = write_table(folder, rows, (1, 2), late_fusion=False)
    scff, concat = table.rows["scff"], table.rows["concat"]
    (written,) = (
        json.loads((folder / "ablation.json").read_text("utf-8"))["rows"][name] for name in ["scff"]
    )
    assert written["num_parameters"] == 1234
    assert written["dice"] == scff.figures.dice
    assert written["against_full"]["difference"] == scff.against_full.difference
    assert written["against_full"]["permutation_p"] == scff.against_full.tests.permutation_p
    assert table.rows["full"].against_full is None
    assert scff.against_full.difference == pytest.approx(-0.1, abs=0.01)
    low, high = scff.against_full.interval
    assert low < -0.09 < high < 0 or low < -0.1 < high < 0
    assert scff.against_full.corrected_p == pytest.approx(2e-4)
    assert concat.against_full.tests.permutation_p > 0.05
    assert scff.figures.sd_over_seeds == pytest.approx(0.02 / 2**0.5, abs=0.005)
    assert scff.figures.num_seeds == 2
    text = (folder / "ablation.md").read_text("utf-8")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {13}
    assert "| scff | 1,234 | 5.00 |" in text


def test_a_row_without_all_its_seeds_waits(three_rows, no_sizes):
    folder, rows = three_rows
    (folder / "scff" / "seed_2" / "metrics.json").unlink()
    assert list(write_table(folder, rows, (1, 2), late_fusion=False).rows) == ["full", "concat"]
    (folder / "full" / "seed_1" / "metrics.json").unlink()
    (alone,) = write_table(folder, rows, (1, 2), late_fusion=False).rows.values()
    assert alone.against_full is None


def test_a_row_without_all_its_folds_waits(three_rows, no_sizes):
    folder, rows = three_rows
    run = RunFolder(folder / "scff" / "seed_2")
    rows_of_run = run.read_results().summary.metric_per_case
    of_one = summarise([row for row in rows_of_run if row.fold == 0], [0])
    run.write_results(Results(of_one, folds_done=(0,)))
    assert list(write_table(folder, rows, (1, 2), late_fusion=False).rows) == ["full", "concat"]


def test_fewer_folds_than_are_done_may_be_asked_for(three_rows, no_sizes):
    folder, rows = three_rows
    fewer = [
        dataclasses.replace(row, config=dataclasses.replace(row.config, folds=(1,))) for row in rows
    ]
    table = write_table(folder, fewer, (1, 2), late_fusion=False).rows
    assert [row.figures.num_cases for row in table.values()] == [12, 12, 12]
    odd = np.mean(
        [
            row.dice
            for seed in (1, 2)
            for row in summary_of(folder / "full" / f"seed_{seed}").metric_per_case
            if row.fold == 1
        ]
    )
    assert table["full"].figures.dice == pytest.approx(odd)


def test_a_table_without_any_positive_case_compares_nothing(three_rows, no_sizes):
    folder, rows = three_rows
    for run in folder.glob("*/seed_*"):
        negatives = [
            row_of(row.case_id, fold=row.fold, dice=None, truth_ml=0.0)
            for row in summary_of(run).metric_per_case
        ]
        results = Results(summarise(negatives, [0, 1]), folds_done=(0, 1))
        RunFolder(run).write_results(results)
    table = write_table(folder, rows, (1, 2), late_fusion=False).rows
    assert [row.against_full for row in table.values()] == [None, None, None]
    assert "nan" not in (folder / "ablation.md").read_text("utf-8")


def test_late_fusion_is_in_the_table_if_it_is_asked_for(three_rows, no_sizes):
    folder, rows = three_rows
    shutil.copytree(folder / "scff", folder / "late-fusion")
    for asked in (True, False):
        table = write_table(folder, rows, (1, 2), late_fusion=asked)
        assert ("late-fusion" in table.rows) == asked


def test_rows_on_other_cases_are_refused(three_rows):
    folder, _ = three_rows
    full, scff = (
        [summary_of(folder / name / f"seed_{seed}") for seed in (1, 2)] for name in ("full", "scff")
    )
    scff = [
        dataclasses.replace(of_seed, metric_per_case=of_seed.metric_per_case[1:])
        for of_seed in scff
    ]
    with pytest.raises(DataError, match="all rows must have evaluated the same cases"):
        ablation_table.compare_rows(scff, full)
    with pytest.raises(DataError, match="all seeds of a row must have evaluated the same cases"):
        ablation_table.dice_of_cases([full[0], scff[0]])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--data.cache={tmp_path_factory.mktemp('cache')}"


@pytest.mark.slow
def test_rows_share_folds_and_what_is_done_is_not_done_again(
    tmp_path, cache, monkeypatch, no_sizes, capsys
):
    ran = []

    def train(config, programs):
        source = loading.build(config.data)
        folds = cross_validation.make_folds(config, source)
        ran.append((config.output.parent.name, config.seed, folds.sha256))
        save(config.output, np.linspace(0.2, 0.8, 24))
        record = {"config": to_json(config)}
        (config.output / "config.json").write_text(json.dumps(record), encoding="utf-8")

    monkeypatch.setattr(cross_validation, "run", train)
    monkeypatch.setattr(ablation.jobs, "compile_programs", lambda config, devices: None)
    asked = command(tmp_path, rows=("scff",), seeds=(1, 2), jobs=1)
    ablation.run(asked, [*TINY, cache])
    assert [entry[:2] for entry in ran] == [("full", 1), ("full", 2), ("scff", 1), ("scff", 2)]
    assert len({entry[2] for entry in ran}) == 1
    assert "| scff | 1,234 |" in capsys.readouterr().out
    more = command(tmp_path, rows=("scff", "concat"), seeds=(1, 2, 3), jobs=1)
    ablation.run(more, [*TINY, cache])
    assert [entry[:2] for entry in ran[4:]] == [
        *(("full", 3), ("scff", 3), ("concat", 1), ("concat", 2), ("concat", 3))
    ]
    with pytest.raises(ConfigError, match=r"holds one configuration.*(?s:.*)train.steps"):
        ablation.run(asked, [*TINY, cache, "--train.steps=5"])


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="an ablation runs in one process; got Distributed"):
        ablation.base_of(command(tmp_path), ["--distributed.process-id=1"])


def test_other_folds_are_refused(tmp_path):
    ablation.keep_folds(tmp_path, Folds((("a",), ("b",))))
    assert ablation.keep_folds(tmp_path, Folds((("a",), ("b",)))) == tmp_path / "folds.json"
    with pytest.raises(ConfigError, match="compares rows on the same folds"):
        ablation.keep_folds(tmp_path, Folds((("b",), ("a",))))


def test_a_row_whose_modality_some_cases_lack_is_refused_before_training(tmp_path, cache):
    rows = [
        ablation.Variant(name, config)
        for name, config in rows_of(tmp_path, [*TINY, cache, "--data.allow-missing=True"]).items()
    ]
    source = loading.build(rows[0].config.data)
    ablation.refuse_lacking_modalities(rows, source)
    (first, *_) = source.case_ids

    class Lacking:
        case_ids = source.case_ids

        def __getitem__(self, case_id):
            case = source[case_id]
            present = np.array([True, case_id != first, True])
            return dataclasses.replace(case, present=present)

        def __len__(self):
            return len(source)

    with pytest.raises(DataError, match=f"got 1 of 10 cases, the first {first}, .*adc-alone"):
        ablation.refuse_lacking_modalities(rows, Lacking())
    others = [row for row in rows if row.name != "adc-alone"]
    ablation.refuse_lacking_modalities(others, Lacking())


def test_late_fusion_averages_the_probabilities(tmp_path, cache):
    asked = command(tmp_path, rows=("late-fusion",))
    base, _ = ablation.base_of(asked, [*TINY, cache])
    source = loading.build(base.data)
    positive = next(info.case_id for info in source.info if info.positive)
    negative = next(info.case_id for info in source.info if not info.positive)
    strengths = dict(zip(base.data.modalities, (0.9, 0.8, 0.1), strict=True))
    for name, strength in strengths.items():
        run = asked.output / f"{name}-alone" / "seed_0"
        rows = []
        for case_id in (positive, negative):
            case = source[case_id]
            probability = (strength * (case.original_truth > 0)).astype(np.float32)
            spacing = spacing_of(case.original_affine)
            truth, rule = case.original_truth, Rule("lesion", 0.5)
            rows += measure_case(
                case_id, case.patient_id, 0, probability[..., None], truth, spacing, rule
            )
            file = run / "fold_0" / "probabilities" / f"{case_id}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(file, probability, case.original_affine)
        results = Results(summarise(rows, [0]), "lesion", ("lesion",), 0.5, "ema", 2, (0,))
        RunFolder(run).write_results(results)
    ablation.late_fusion(asked.output, base, source, 0)
    fused = summary_of(asked.output / "late-fusion" / "seed_0")
    by_case = {row.case_id: row for row in fused.metric_per_case}
    assert by_case[positive].dice == 1  # (0.9 + 0.8 + 0.1) / 3 = 0.6 exceeds 0.5
    assert by_case[positive].detection.confidence == pytest.approx(0.6, abs=1e-3)
    assert by_case[negative].dice is None
    assert (asked.output / "late-fusion" / "seed_0" / "report.html").is_file()


@pytest.mark.slow
def test_rows_are_trained_and_compared(tmp_path, cache, capsys):
    ablation.main(
        [
            "--preset=quick",
            f"--output={tmp_path / 'ablation'}",
            *("--rows", "early-unet", "late-fusion"),
            *("--sweep", "loss.attention.exponent=1"),
            *TINY,
            cache,
            "--train.steps=2",
        ]
    )
    table = json.loads((tmp_path / "ablation" / "ablation.json").read_text("utf-8"))
    assert list(table["rows"]) == [
        *("full", "early-unet", "t2w-alone", "adc-alone", "hbv-alone"),
        *("loss.attention.exponent=1", "late-fusion"),
    ]
    for row in table["rows"].values():
        assert 0 <= row["dice"] <= 1
        assert row["auroc"] is not None
        assert row["num_parameters"] > 0
        assert row["num_operations"] > 0
    report = Path(tmp_path / "ablation" / "early-unet" / "seed_0" / "report.html").read_text(
        encoding="utf-8"
    )
    assert 'id="viewer"' in report
    assert "Attention T2W" not in report
    assert "| early-unet |" in capsys.readouterr().out
