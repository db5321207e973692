import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest

from data_pipelines.faults import MissingDataError
from data_pipelines.serving.splits import Folds
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.summary import summarise
from experiments.process.console import run_main
from experiments.report import main
from experiments.reporting import pictures
from experiments.reporting.page import write_report
from experiments.reporting.pictures import choose_cases, outline, slice_to_show
from experiments.run_folder import FoldResults, Results, RunFolder
from experiments.settings.command_line import complete
from experiments.settings.config import Config
from experiments.studies import cross_validation
from tests.experiments.fake_run import keep_one_figure, make_run, row_of

VARIANTS = {
    "full": {},
    "partial": {"done": (0, 3), "history": False},
    "no_positives": {"positive_share": 0.0, "num_folds": 2, "history": False},
    "one_modality": {"modalities": ("t2w",), "num_folds": 2, "history": False},
    "zones": {"classes": ("pz", "tz"), "num_folds": 2, "history": False},
    "bare": {"figures": False, "extras": False, "num_folds": 2, "history": False},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """HTML and Markdown of every variant."""
    texts = {}
    for name, options in VARIANTS.items():
        run = make_run(tmp_path_factory.mktemp("runs") / name, **options)
        page = write_report(RunFolder(run))
        assert page == run / "report.html"
        texts[name] = (page.read_text("utf-8"), (run / "report.md").read_text("utf-8"))
    return texts


class Reader(HTMLParser):
    """Balance of tags, ids, and the texts of headings, cells and captions."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


@pytest.mark.parametrize("name", VARIANTS)
def test_page_is_well_formed_self_contained_and_small(reports, name):
    html, _ = reports[name]
    reader = read(html)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in references)
    assert not re.search(
        r"<(link|iframe)\b|<script[^>]*src|@import|url\((?!#)|https?://(?!www.w3)", html
    )
    assert len(html.encode()) < 5e6
    targets = {target[1:] for target in references if target.startswith("#")}
    assert targets <= set(reader.ids)


@pytest.mark.parametrize("name", VARIANTS)
def test_both_forms_begin_with_what_this_is(reports, name):
    html, markdown = reports[name]
    for text in ("".join(read(html).texts), markdown.replace("\n> ", " ")):
        head = text[: text.index("Weights")]
        assert "A reconstruction from the paper's abstract" in head
        assert "not the authors' code. Not for clinical use." in head


@pytest.mark.parametrize("name", VARIANTS)
def test_markdown_holds_every_figure_of_the_page(reports, name):
    html, markdown = reports[name]
    for cell in re.findall(r"<t[hd][^>]*>([^<]+)</t[hd]>", html):
        assert cell.replace("&#39;", "'").replace("&gt;", ">").replace("&amp;", "&") in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for table in re.split(r"\n\n", markdown):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_headline_is_the_mean_over_defined_cases(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    write_report(RunFolder(run))
    summary = RunFolder(run).read_results().summary
    dice = [row.dice for row in summary.metric_per_case if row.dice is not None]
    low, high = summary.interval["lesion"]["dice"]
    expected = (
        f"| Dice | {np.mean(dice):.3f} | {low:.3f} to {high:.3f} | {np.std(dice, ddof=1):.3f} |"
    )
    assert expected in (run / "report.md").read_text("utf-8")


def test_full_run_shows_curves_hash_baseline_and_environment(reports):
    html, markdown = reports["full"]
    assert "All 5 folds are done." in html
    for text in (html, markdown):
        assert re.search(r"SHA-256 of the folds: (<code>|`)[0-9a-f]{64}", text)
        assert "optimistic" in text
        assert "0.123" in text
        assert "abc123" in text
        assert "Zero throughout, so switched off: Correlation loss." in text
    for title in ("Loss, total", "Cross-modal distillation loss", "Validation Dice", "Learning"):
        assert f'aria-label="{title}' in html
    assert 'aria-label="Correlation loss"' not in html
    assert html.count('class="panel"') == 4 * 7
    assert html.index("Best: case") < html.index("Negative, most false positives")


def test_missing_folds_are_named(reports):
    html, markdown = reports["partial"]
    for text in (html, markdown):
        assert "Incomplete: 2 of 5 folds are done; missing: fold 1, fold 2, fold 4." in text
        assert "Fold 4 (missing)" in text


def test_folds_of_groups_are_named(tmp_path):
    run = make_run(tmp_path / "run", num_folds=3, done=(0, 2), figures=False)
    folds = Folds.load(run / "folds.json")
    Folds(folds.validation, ("RUMC", "<PCNN>", "ZGT")).save(run / "folds.json")
    html = write_report(RunFolder(run)).read_text("utf-8")
    markdown = (run / "report.md").read_text("utf-8")
    for text in (html.replace("&lt;", "<").replace("&gt;", ">"), markdown):
        assert "missing: fold 1 (<PCNN>)." in text
        assert "Fold 1 (<PCNN>) (missing)" in text
    for row in ("0 (RUMC) |", "2 (ZGT): training |", "2 (ZGT) | 12 | 6 |", "2 (ZGT) | 6 | 3 |"):
        assert f"Fold {row}" in markdown
    assert "| case_000 | 0 (RUMC) |" in markdown
    assert "|  | Fold 0 (RUMC) | Fold 2 (ZGT) |" in markdown
    assert html.count("</i>fold 0 (RUMC)</span>") == 2  # the legends
    assert not re.search(r"[Ff]old \d(?! \()", "".join(read(html).texts))


def test_run_without_positives_has_no_dice(reports):
    html, markdown = reports["no_positives"]
    assert "No evaluated case holds any lesion" in html
    assert "undefined: no positive case" in html
    assert "No chart of Dice: there is no positive case." in html
    assert "| Dice | – | – | – | – | – | 0 |" in markdown  # noqa: RUF001
    assert html.count('class="panel"') == 7


def test_a_single_fold_without_positives_is_named(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, figures=False, history=False)
    change_metrics(run, lambda content: content.update(folds_without_positives=[1]))
    html = write_report(RunFolder(run)).read_text("utf-8")
    assert "No positive case in fold 1: Dice is undefined there." in html
    folds = Folds.load(run / "folds.json")
    Folds(folds.validation, ("A", "B")).save(run / "folds.json")
    assert "No positive case in fold 1 (B): Dice" in write_report(RunFolder(run)).read_text("utf-8")


def test_one_modality_and_several_classes(reports):
    assert reports["one_modality"][0].count("Attention T2W, stage 1</figcaption>") == 4
    html, _ = reports["zones"]
    assert "Mean peripheral zone Dice" in html
    assert "Dice per fold, transition zone" in html
    assert "the largest of the class probabilities" in html
    assert "Fold 1, tz" in html


def test_bare_run_says_what_it_lacks(reports):
    html, _ = reports["bare"]
    assert "The run kept no pictures." in html
    assert "Configuration" not in html


def test_names_from_files_are_escaped(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, figures=False, history=False)
    (run / "environment.json").write_text(json.dumps({"device": "<b>&|x", "system": "<i>|y"}))
    html = write_report(RunFolder(run)).read_text("utf-8")
    assert "on &lt;b&gt;&amp;|x" in html
    assert "<b>&" not in html
    assert "&lt;i&gt;|y" in html
    assert "<i>\\|y" in (run / "report.md").read_text("utf-8")


def test_report_is_written_anew_and_alike(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    first = write_report(RunFolder(run)).read_text("utf-8")
    main([str(run)])
    assert (run / "report.html").read_text("utf-8") == first


def change_metrics(run, change):
    """Edit ``metrics.json`` in place."""
    content = json.loads((run / "metrics.json").read_text("utf-8"))
    change(content)
    (run / "metrics.json").write_text(json.dumps(content))


def test_a_run_of_the_earliest_versions_gets_its_intervals_from_its_rows(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, figures=False, history=False, extras=False)
    before = RunFolder(run).read_results()

    def as_once(content):
        for key in ("schema", "interval", "num_patients"):
            del content[key]

    change_metrics(run, as_once)
    assert RunFolder(run).read_results() == before
    assert "95 % interval" in write_report(RunFolder(run)).read_text("utf-8")


@pytest.mark.parametrize("table", ["metric_per_case", "mean", "num_defined", "per_fold"])
def test_a_run_without_a_metric_of_this_version_is_refused(tmp_path, table, capsys):
    run = make_run(tmp_path / "run", num_folds=2, figures=False, history=False)
    write_report(RunFolder(run))
    written = (run / "report.html").read_bytes()

    def without(content):
        entries = content[table]
        entries = [entries["lesion"]] if isinstance(entries, dict) else entries
        for entry in entries:
            del entry.get("mean", {}).get("lesion", entry)["specificity"]

    change_metrics(run, without)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main([str(run)]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    what = "row" if table == "metric_per_case" else "summary"
    assert f"error: {run / 'metrics.json'}: every {what} must hold all metrics; got one " in said
    assert "without specificity, as another version wrote it. Measure the cases again" in said
    assert (run / "report.html").read_bytes() == written


def test_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(MissingDataError, match=r"must hold metrics\.json; got none in"):
        write_report(RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_outline_follows_the_voxel_edges():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    assert sorted(re.findall(r"M[^M]*", outline(mask))) == ["M2 1h1", "M2 1v1", "M2 2h1", "M3 1v1"]
    mask[1, 3] = True  # at the border: no edge between the two, one at the border
    assert sorted(re.findall(r"M[^M]*", outline(mask))) == [
        "M2 1h1",
        "M2 1v1",
        "M2 2h1",
        "M3 1h1",
        "M3 2h1",
        "M4 1v1",
    ]
    assert outline(np.zeros((2, 2), bool)) == ""


def test_slice_shows_truth_then_prediction_then_probability():
    truth, mask = np.zeros((4, 2, 2)), np.zeros((4, 2, 2))
    probability = np.zeros((4, 2, 2))
    probability[3, 0, 0] = 0.3
    assert slice_to_show(truth, mask, probability) == 3
    mask[2] = 1
    assert slice_to_show(truth, mask, probability) == 2
    truth[1, 0, 0] = 1
    assert slice_to_show(truth, mask, probability) == 1


def rows_of(**dice):
    return {case: [row_of(case, dice=score)] for case, score in dice.items()}


def test_best_median_worst_and_a_negative_are_chosen():
    rows = rows_of(a=0.1, b=0.5, c=0.6, d=0.9, e=0.7, n=None, o=None)
    rows["o"] = [row_of("o", dice=None, predicted_ml=2.0)]
    chosen = choose_cases(rows, rows.keys())
    assert list(chosen) == ["d", "c", "a", "o"]
    assert list(chosen.values())[:3] == ["Best", "Median", "Worst"]


def test_roles_admit_when_a_better_case_has_no_picture():
    rows = rows_of(a=0.1, b=0.5, c=0.9)
    assert choose_cases(rows, {"a", "b"}) == {
        "b": "Best of the cases pictured",
        "a": "Worst",
    }
    assert choose_cases(rows, ()) == {}


def pixels(uri):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def viewer_data(html):
    return json.loads(re.search(r'id="viewer-data">(.*?)</script>', html, re.DOTALL)[1])


def test_detection_and_calibration_are_shown(reports):
    html, markdown = reports["full"]
    for title in ("FROC of lesions", "ROC of cases", "Calibration of voxels", "of cases"):
        assert title in html
    assert re.search(r"\| AUROC of cases \| \d\.\d{3} \| \d\.\d{3} to \d\.\d{3} \|", markdown)
    assert 'id="detection"' not in reports["zones"][0]
    assert "FROC of lesions" not in reports["no_positives"][0]


def test_few_patients_are_warned_of(reports):
    assert "only 6 positive patients: below 20" in reports["one_modality"][0]


def test_viewer_holds_every_layer_of_every_case_shown(reports):
    data = viewer_data(reports["full"][0])
    assert len(data["cases"]) == 4
    for case in data["cases"]:
        layers = case["layers"]
        assert list(layers["images"]) == list(layers["attention"]) == ["t2w", "adc", "hbv"]
        assert {len(stages) for stages in layers["attention"].values()} == {2}
        depth, height, width = case["shape"]
        assert (depth, case["columns"]) == (8, 3)
        for uri in (layers["truth"], layers["prediction"], layers["probability"]):
            assert pixels(uri).shape == (3 * height, 3 * width)
    assert data["colormaps"]["magma"][0] == [0, 0, 4]
    assert data["left_out"] == 0
    zones = viewer_data(reports["zones"][0])["cases"][0]["layers"]["truth"]
    assert set(np.unique(pixels(zones))) == {0, 1, 2}


def test_slices_lie_in_a_grid_row_by_row_and_radiological():
    volume = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    sheet = pixels(pictures._sprite(volume))
    assert sheet.shape == (2 * 2, 3 * 3)
    for index in range(5):
        row, column = divmod(index, 3)
        tile = sheet[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(tile, volume[index, ::-1, ::-1])
    assert not sheet[2:, 6:].any()


def test_a_large_image_is_kept_as_jpeg_within_what_image_formats_hold():
    uri = pictures._sprite(np.full((300, 256, 256), 77), lossy=True)  # 76800 rows one by one
    assert uri.startswith("data:image/jpeg;base64,")
    assert pixels(uri).shape == (17 * 256, 18 * 256)
    assert np.abs(pixels(uri)[:256, :256].astype(int) - 77).max() <= 1


def test_a_grid_beyond_what_browsers_hold_is_thinned_in_plane_and_says_so(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    monkeypatch.setattr(pictures, "CANVAS_PIXELS", 9 * 40 * 48 - 1)
    html = write_report(RunFolder(run)).read_text("utf-8")
    for case in viewer_data(html)["cases"]:
        assert case["shape"] == [8, 20, 24]
        assert case["spacing_mm"] == [3, 2, 2]
        assert case["caption"].endswith("shown at 1/2 of the resolution in plane")
        assert pixels(case["layers"]["truth"]).shape == (3 * 20, 3 * 24)
    assert html.count("1/2 of the resolution") == 4  # not the pictures: they have room
    monkeypatch.setattr(pictures, "CANVAS_SIDE", 3 * 24 - 1)
    assert viewer_data(write_report(RunFolder(run)).read_text("utf-8"))["cases"][0]["shape"] == [
        8,
        13,
        16,
    ]


def test_thinning_takes_means_of_images_and_middles_of_labels():
    case = pictures._Case(
        title="",
        caption="",
        modalities=["t2w"],
        images=np.arange(2 * 5 * 7.0).reshape(2, 5, 7, 1),
        truth=np.arange(2 * 5 * 7).reshape(2, 5, 7),
        mask=np.zeros((2, 5, 7)),
        foreground=np.ones((2, 5, 7)),
        attention=np.arange(2 * 4 * 4.0).reshape(2, 4, 4, 1, 1),
        spacing_mm=(3.0, 1.0, 0.5),
        index=1,
    )
    thinned = pictures._thinned(case, 2)
    assert thinned.images.shape == (2, 2, 3, 1)
    assert thinned.images[1, 1, 2] == case.images[1, 2:4, 4:6].mean()
    assert thinned.truth[1].tolist() == [[43, 45, 47], [57, 59, 61]]
    assert thinned.foreground.shape == thinned.mask.shape == (2, 2, 3)
    assert thinned.attention.shape == (2, 2, 2, 1, 1)  # no finer than the rest
    assert thinned.attention[0, 0, 0] == case.attention[0, :2, :2].mean()
    assert thinned.spacing_mm == (3.0, 2.0, 1.0)


def noisy_run(folder):
    """A run whose one picture is noise, which no format makes small."""
    run = make_run(folder, num_folds=2, history=False)
    keep_one_figure(run, np.random.default_rng(0).normal(size=(12, 256, 256)))
    return run


def test_page_keeps_to_its_limit_and_thins_even_the_first_case(tmp_path, monkeypatch):
    run = noisy_run(tmp_path / "run")
    assert write_report(RunFolder(run)).stat().st_size > 800_000
    monkeypatch.setattr("experiments.reporting.page.PAGE_BYTES", 600_000)
    html = write_report(RunFolder(run)).read_text("utf-8")
    assert 300_000 < len(html.encode()) < 600_000
    (case,) = viewer_data(html)["cases"]
    assert case["shape"] == [12, 128, 128]
    assert "1/2 of the resolution" in case["caption"]


def test_pictures_keep_to_their_limit(tmp_path, monkeypatch):
    run = noisy_run(tmp_path / "run")

    def size():
        html = write_report(RunFolder(run)).read_text("utf-8")
        shown = re.search(r'<section id="pictures">.*?</section>', html, re.DOTALL)[0]
        return len(shown), re.findall(r"shown at 1/\d+ of the resolution", shown)

    whole, said = size()
    assert whole > 60_000
    assert said == []
    monkeypatch.setattr("experiments.reporting.page.PICTURES_BYTES", 30_000)
    small, said = size()
    assert small < 32_000
    assert said == ["shown at 1/2 of the resolution"]
    monkeypatch.setattr(
        "experiments.reporting.page.PICTURES_BYTES", 0
    )  # the least possible, and it ends
    assert size()[0] < 5_000


def test_outlines_of_noise_count_as_well(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).random((1, 200, 200)) > 0.5
    monkeypatch.setattr(pictures, "outline", lambda mask: "x" * int(mask.sum()))
    monkeypatch.setattr(pictures, "_chosen", lambda *_: [()])
    case = pictures._Case(
        "", "", ["t2w"], noise[..., None], noise, noise, noise, None, (3, 1, 1), 0
    )
    monkeypatch.setattr(pictures, "_read_case", lambda *_: case)
    results = Results(summarise([row_of("a", dice=0.5)], [0]))
    (picture,) = pictures.pictures_of(RunFolder(tmp_path), results, ["lesion"], 50_000)
    assert sum(len(panel.svg) for panel in picture.panels) < 50_000
    assert "1/2 of the resolution" in picture.caption


def test_cases_without_room_are_left_out_with_the_reason(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    monkeypatch.setattr("experiments.reporting.page.PAGE_BYTES", 1000)
    html = write_report(RunFolder(run)).read_text("utf-8")
    assert (
        "Left out, as the page has no room for their slices even at low resolution: "
        "4 of the cases pictured above." in html
    )
    assert "Their masks and probabilities lie in the folders of the folds." in html
    assert "viewer-data" not in html
    assert read(html).open == []


def test_folders_put_aside_in_a_run_change_nothing(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2)
    page = write_report(RunFolder(run))
    before = page.read_text("utf-8")
    for name in ("fold_0_old", "fold_x", "fold_"):
        shutil.copytree(run / "fold_1", run / name)
        for file in (run / "fold_0" / "figures").iterdir():
            (run / name / "figures" / file.name).write_bytes(b"of an earlier attempt")
    assert write_report(RunFolder(run)).read_text("utf-8") == before


def test_pictures_are_of_the_folds_that_are_done(tmp_path):
    run = make_run(tmp_path / "run", num_folds=3, done=(0, 1), history=False)
    before = write_report(RunFolder(run)).read_text("utf-8")
    (run / "fold_2" / "figures").mkdir(parents=True)
    for file in (run / "fold_0" / "figures").iterdir():
        (run / "fold_2" / "figures" / file.name).write_bytes(b"of a fold that still runs")
    assert write_report(RunFolder(run)).read_text("utf-8") == before


def test_a_failing_report_costs_nothing_of_the_results(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    folder = RunFolder(run)
    results = folder.read_results()
    for fold, summary in results.fold_summaries.items():
        rows = tuple(row for row in results.summary.metric_per_case if row.fold == fold)
        folder.fold(fold).write_results(FoldResults(rows, summary))
    folder.metrics.unlink()

    def fail(run_dir):
        raise OSError("broken data stream")

    monkeypatch.setattr("experiments.reporting.page.write_report", fail)
    config = complete(Config(num_folds=2, output=run))
    with pytest.raises(OSError, match="cannot write: broken data stream") as raised:
        cross_validation.finish(config, folder, MeanShape(0.123, 7))
    assert raised.value.filename == str(run / "report.html")  # run_main ends with status 3
    printed = capsys.readouterr().out
    assert "lesion     dice" in printed
    assert "Dice 0.123" in printed
    assert "report:" not in printed
    assert folder.read_results().folds_done == (0, 1)
