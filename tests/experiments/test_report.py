import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
import scipy

from data_pipelines.case import RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import MissingDataError
from data_pipelines.preparing.geometry import canonical
from data_pipelines.preparing.preprocessing import preprocess_case, to_original
from data_pipelines.serving.splits import Folds
from experiments.measuring import lesions
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.rows import Detection, Match
from experiments.measuring.summary import summarise
from experiments.measuring.training_data import ModalityData, TrainingData
from experiments.process.console import run_main
from experiments.process.records import write_record
from experiments.report import main
from experiments.reporting import charts, figures, pictures, sprites, views
from experiments.reporting.lesion_list import KINDS, kind_of, lesion_table, located
from experiments.reporting.page import write_report
from experiments.reporting.pictures import choose_cases, outline
from experiments.reporting.views import View, slice_to_show
from experiments.run_folder import FoldResults, Results, RunFolder
from experiments.settings.command_line import complete
from experiments.settings.config import Config, ReportConfig
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
    (run / "environment.json").write_text(
        json.dumps({"device": "<b>&|x", "system": "<i>|y"}), encoding="utf-8"
    )
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
    (run / "metrics.json").write_text(json.dumps(content), encoding="utf-8")


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


def test_outline_follows_the_voxel_edges_in_closed_lines():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    assert outline(mask) == "M2 1h1v1h-1v-1z"
    mask[1, 3] = True  # at the border: no edge between the two, one at the border
    assert outline(mask) == "M2 1h2v1h-2v-1z"
    mask[:] = True
    mask[1, 1] = False  # a hole has a line of its own
    assert outline(mask) == "M0 0h4v3h-4v-3zM1 1v1h1v-1h-1z"
    assert outline(np.zeros((2, 2), bool)) == ""


@pytest.mark.parametrize("seed", range(3))
def test_outline_of_noise_has_every_edge_once(seed):
    mask = np.random.default_rng(seed).random((7, 9)) > 0.5
    padded = np.pad(mask, 1)
    steps = [abs(int(step)) for step in re.findall(r"[hv](-?\d+)", outline(mask))]
    assert sum(steps) == sum(
        int(np.diff(padded.astype(int), axis=axis).astype(bool).sum()) for axis in (0, 1)
    )


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
    """The cases that the viewer can open."""
    found = re.findall(r'id="viewer-case-\d+">(.*?)</script>', html, re.DOTALL)
    return [json.loads(case) for case in found]


def test_detection_and_calibration_are_shown(reports):
    html, markdown = reports["full"]
    for title in ("FROC of lesions", "ROC of cases", "Calibration of voxels", "of cases"):
        assert title in html
    assert re.search(r"\| AUROC of cases \| \d\.\d{3} \| \d\.\d{3} to \d\.\d{3} \|", markdown)
    assert 'id="detection"' not in reports["zones"][0]
    assert "FROC of lesions" not in reports["no_positives"][0]


def test_few_patients_are_warned_of(reports):
    assert "only 6 positive patients: below 20" in reports["one_modality"][0]


def test_viewer_holds_every_layer_of_every_kept_case_the_worst_first(reports):
    html, _ = reports["full"]
    cases = viewer_data(html)
    assert len(cases) == 5 * 3
    scores = [re.search(r"Dice ([\d.]+)", case["title"]) for case in cases]
    scores = [None if found is None else float(found[1]) for found in scores]
    assert scores == [*sorted(s for s in scores if s is not None), *[None] * scores.count(None)]
    for case in cases:
        layers = case["layers"]
        assert list(layers["images"]) == list(layers["attention"]) == ["t2w", "adc", "hbv"]
        assert {len(stages) for stages in layers["attention"].values()} == {2}
        depth, height, width = case["shape"]
        assert (depth, case["columns"]) == (8, 3)
        for layer in (*layers["images"].values(), layers["truth"], layers["probability"]):
            assert pixels(layer["uri"]).shape == (3 * height, 3 * width)
            assert layer["exact"]
    listed = json.loads(re.search(r'id="viewer-data">(.*?)</script>', html, re.DOTALL)[1])
    assert [entry["id"] for entry in listed["cases"]] == [case["id"] for case in cases]
    assert listed["colormaps"]["magma"][0] == [0, 0, 4]
    zones = viewer_data(reports["zones"][0])[0]["layers"]["truth"]
    assert set(np.unique(pixels(zones["uri"]))) == {0, 1, 2}


def test_first_line_says_what_the_data_are(reports, tmp_path):
    said = (
        "Data: phantom, synthetic: drawn by this project's code, no patient; "
        "30 cases of 30 simulated patients."
    )
    html, markdown = reports["full"]
    assert markdown.splitlines()[2] == said
    body = "".join(read(html).texts[read(html).texts.index("\n") :])
    assert said in body[: body.index("Run ")]
    run = make_run(tmp_path / "run", num_folds=2, figures=False, history=False)
    for name, path, words in (
        ("nifti_folder", "/data/ours", "whether of patients is not recorded, read from the folder"),
        ("elsewhere", None, "Data: elsewhere, of unrecorded origin; 12 cases of 12 patients."),
    ):
        content = json.loads((run / "config.json").read_text("utf-8"))
        content["config"]["data"] |= {"name": name, "path": path}
        (run / "config.json").write_text(json.dumps(content), encoding="utf-8")
        assert words in write_report(RunFolder(run)).read_text("utf-8")
    assert "Data: not recorded; 12 cases" in reports["bare"][1]


def test_average_precision_and_auroc_are_among_the_headline_figures(reports):
    html, markdown = reports["full"]
    tiles = re.findall(r'<div class="tile"><small>(.*?)</small><b>(.*?)</b>', html)
    figures = dict(re.findall(r"\| (Average precision|AUROC) of \w+ \| (\S+) \|", markdown))
    assert dict(tiles)["AP of lesions"] == figures["Average precision"]
    assert dict(tiles)["AUROC of cases"] == figures["AUROC"]
    assert f"- AUROC of cases: {figures['AUROC']} (95 % interval" in markdown
    assert dict(re.findall(r"<small>(AP.*?)</small><b>(.*?)</b>", reports["no_positives"][0])) == {
        "AP of lesions": "–"  # noqa: RUF001
    }


def test_curves_are_smoothed_by_a_running_mean():
    values = np.random.default_rng(0).normal(size=300)
    smooth = charts.smoothed(values)
    assert smooth[150] == pytest.approx(values[141:160].mean())
    assert smooth[0] == values[0]
    assert smooth[2] == pytest.approx(values[:5].mean())
    assert charts.smoothed(values[:20]) is not smooth
    np.testing.assert_array_equal(charts.smoothed(values[:20]), values[:20])


# The list of lesions ------------------------------------------------------------------------------


def blob(shape, *centre, radius=2.5):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return ((grid - centre) ** 2).sum(-1) <= radius**2


def test_lesions_are_located_as_they_are_counted():
    shape = (9, 30, 30)
    found, missed, false = blob(shape, 4, 6, 6), blob(shape, 4, 6, 22), blob(shape, 4, 22, 12)
    truth = (found | missed).astype(np.uint8)
    probability = 0.8 * np.roll(found, 1, 2) + 0.3 * false
    places = lesions.locate(probability, truth)
    counted = lesions.detect(probability, truth).lesions
    np.testing.assert_allclose(sorted(place.match for place in places), sorted(counted))
    where = {(p.match.lesion, p.match.confidence > 0): p.centre for p in places}
    assert where[1, True] == pytest.approx((4, 6, 7))
    assert where[1, False] == pytest.approx((4, 6, 22))
    assert where[0, True] == pytest.approx((4, 22, 12))
    assert lesions.locate(np.zeros(shape), np.zeros(shape)) == ()


@pytest.mark.parametrize("seed", range(4))
def test_lesions_are_located_as_picai_eval_counts_them(seed):
    rng = np.random.default_rng(seed)
    probability = scipy.ndimage.gaussian_filter(rng.random((8, 30, 30)), 2)
    probability = np.clip(8 * (probability - 0.5), 0, 1)
    truth = (scipy.ndimage.gaussian_filter(rng.random((8, 30, 30)), 2) > 0.54).astype(np.uint8)
    located = [place.match for place in lesions.locate(probability, truth)]
    counted = lesions.detect(probability, truth).lesions
    assert len(counted) > 3
    np.testing.assert_allclose(sorted(located), sorted(counted), rtol=1e-6)


def test_lesions_are_listed_worst_first_with_their_places(reports):
    html, markdown = reports["full"]
    lines = markdown[markdown.index("## Lesions and false candidates") :].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:]]
    kinds = [row[1] for row in rows]
    assert kinds == sorted(kinds, key=KINDS.index)
    assert {"found, faint", "false", "found"} <= {*kinds}
    false = [float(row[2]) for row in rows if row[1] == "false"]
    assert false == sorted(false, reverse=True)
    found = [float(row[3]) for row in rows if row[1] == "found"]
    assert found == sorted(found)
    placed = re.findall(r'<tr data-case="(\w+)" data-slice="(\d+)" data-x="(.*?)" data-y', html)
    shown = {case["id"] for case in viewer_data(html)}
    assert {case for case, *_ in placed} == shown & {row[0] for row in rows}
    assert [row[5] for row in rows if row[0] in shown] == [str(int(z) + 1) for _, z, _ in placed]
    assert all(row[5] == "–" for row in rows if row[0] not in shown)  # noqa: RUF001


def test_places_are_given_only_where_their_number_is_that_measured():
    detection = Detection(0.9, (Match(0, 0.9, 0.0), Match(1, 0.6, 0.4)), ())
    row = dataclasses.replace(row_of("a", dice=0.5), detection=detection)
    view = View(
        "", "", (), np.zeros(0), None, np.zeros((4, 10, 20)), np.zeros(0), None, (3, 1, 1), 0
    )
    false = lesions.Place(Match(0, 0.9, 0.0), (2, 3, 5), 50)
    there = [(place, located(view, place)) for place in (false, false)]
    table = lesion_table([row], {"a": there[:1]}, (), 0.5)
    assert table.facts[0] == {"case": "a", "slice": "2", "x": "14.5", "y": "6.5"}
    assert table.facts[1] == {"case": "a"}
    assert table.rows[0] == ("a", "false", "0.900", "–", "0.15 ml", "3", "0")  # noqa: RUF001
    assert lesion_table([row], {"a": there}, (), 0.5).facts[0] == {"case": "a"}
    assert lesion_table([row_of("a", dice=0.5)], {}, (), 0.5) is None
    kinds = [kind_of(Match(*match), 0.5) for match in ((1, 0, 0), (1, 0.5, 0.4), (0, 0.1, 0))]
    assert kinds == ["missed", "found, faint", "false, faint"]


# The viewer's pictures ----------------------------------------------------------------------------


def test_slices_lie_in_a_grid_row_by_row_and_radiological():
    volume = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    sheet = pixels(sprites._labels(volume, 1)["uri"])
    assert sheet.shape == (2 * 2, 3 * 3)
    for index in range(5):
        row, column = divmod(index, 3)
        tile = sheet[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(tile, volume[index, ::-1, ::-1])
    assert not sheet[2:, 6:].any()


def test_many_slices_lie_within_what_image_formats_hold():
    uri = sprites.sprite(np.full((300, 256, 256), 77, np.uint8), 60)  # 76800 rows one by one
    assert uri.startswith("data:image/webp;base64,")
    assert pixels(uri).shape == (17 * 256, 18 * 256, 3)
    assert np.abs(pixels(uri)[:256, :256].astype(int) - 77).max() <= 1


def a_view(shape=(2, 5, 7), **fields):
    """A view of a ramp, with a mask of one voxel."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(*shape, 1) + 1
    mask = np.zeros(shape, np.uint8)
    mask[1, 4, 6] = 1
    given = {
        "title": "a",
        "caption": "",
        "modalities": ["t2w"],
        "images": image,
        "truth": mask,
        "mask": mask,
        "foreground": 0.5 * mask,
        "attention": None,
        "spacing_mm": (3.0, 1.0, 0.5),
        "index": 1,
    }
    return View(**given | fields)


def decoded(layer, shape, columns=2):
    """Values of a layer as the viewer reads them, ``d h w`` of its own pixels."""
    sheet = pixels(layer["uri"]).astype(float)
    sheet = sheet if sheet.ndim == 2 else sheet[..., 0]
    rows, width = layer["rows"], layer["columns"]
    tiles = [
        sheet[rows * (z // columns) :][:rows, width * (z % columns) :][:, :width]
        for z in range(shape[0])
    ]
    return layer["low"] + np.stack(tiles) / 255 * (layer["high"] - layer["low"])


def test_values_are_read_back_to_a_step_of_the_grey_scale():
    view = a_view()
    case = sprites.viewer_case(view, "a", "", sprites.QUALITIES[0])
    layer = case["layers"]["images"]["t2w"]
    step = (layer["high"] - layer["low"]) / 255
    values = decoded(layer, case["shape"])
    np.testing.assert_allclose(values, view.images[:, ::-1, ::-1, 0], atol=0.51 * step)
    assert layer["low"] <= layer["window"][0] < layer["window"][1] <= layer["high"]
    assert not layer["absent"]
    absent = sprites.viewer_case(
        a_view(images=np.zeros((2, 5, 7, 1))), "a", "", sprites.QUALITIES[0]
    )
    assert absent["layers"]["images"]["t2w"]["absent"]
    assert (
        sprites.viewer_case(a_view(truth=None), "a", "", sprites.QUALITIES[0])["layers"]["truth"]
        is None
    )


def test_thinned_images_are_means_over_blocks_and_masks_stay_exact():
    view = a_view()
    case = sprites.viewer_case(view, "a", "", sprites.Quality(2, None))
    layer = case["layers"]["images"]["t2w"]
    assert (layer["rows"], layer["columns"], layer["step"]) == (3, 4, [2, 2])
    shown = view.images[:, ::-1, ::-1, 0]
    values, step = decoded(layer, case["shape"]), (layer["high"] - layer["low"]) / 255
    assert values[0, 1, 1] == pytest.approx(shown[0, 2:4, 2:4].mean(), abs=0.51 * step)
    assert values[1, 2, 3] == pytest.approx(shown[1, 4, 6], abs=0.51 * step)  # the rest of a block
    np.testing.assert_array_equal(
        decoded(case["layers"]["truth"], case["shape"]), view.truth[:, ::-1, ::-1]
    )
    assert case["caption"] == "images at 1/2 of the resolution in plane"


def test_a_grid_beyond_what_browsers_hold_is_thinned_in_plane_and_says_so(monkeypatch):
    monkeypatch.setattr(sprites, "CANVAS_PIXELS", 2 * 5 * 7 - 1)
    case, place = sprites.within(a_view(), "a", "", 10**6)
    assert sprites.QUALITIES[place].step == 2
    assert case["shape"] == [2, 5, 7]
    assert case["layers"]["truth"]["step"] == [2, 2]
    assert case["caption"].endswith("in plane; masks at 1/2 of it")


def noisy_run(folder):
    """A run whose one picture is noise, which no format makes small."""
    run = make_run(folder, num_folds=2, history=False)
    keep_one_figure(run, np.random.default_rng(0).normal(size=(12, 256, 256)))
    return run


def test_page_keeps_to_its_limit_and_thins_what_must_be(tmp_path):
    run = noisy_run(tmp_path / "run")
    whole = write_report(RunFolder(run))
    assert whole.stat().st_size > 1_200_000
    assert viewer_data(whole.read_text("utf-8"))[0]["layers"]["images"]["t2w"]["exact"]
    limit = 0.55
    html = write_report(RunFolder(run), ReportConfig(limit)).read_text("utf-8")
    assert 0.6 * limit * 1e6 < len(html.encode()) < limit * 1e6
    (case,) = viewer_data(html)
    assert case["shape"] == [12, 256, 256]
    assert not case["layers"]["images"]["t2w"]["exact"]


def test_pictures_keep_to_their_limit(tmp_path):
    folder = RunFolder(noisy_run(tmp_path / "run"))
    results = folder.read_results()
    kept = pictures.kept_cases(folder, results)

    def size(limit):
        shown = pictures.pictures_of(kept, results, ["lesion"], limit)
        (picture,) = shown
        said = re.findall(r"shown at 1/\d+ of the resolution", picture.caption)
        return sum(len(panel.svg) for panel in picture.panels), said

    whole, said = size(10**7)
    assert whole > 60_000
    assert said == []
    small, said = size(30_000)
    assert small < 30_000
    assert said == ["shown at 1/2 of the resolution"]
    assert size(0)[0] < 5_000  # the least possible, and it ends


def test_outlines_of_noise_count_as_well(monkeypatch, tmp_path):
    noise = np.random.default_rng(0).random((1, 200, 200)) > 0.5
    monkeypatch.setattr(pictures, "outline", lambda mask: "x" * int(mask.sum()))
    view = a_view(images=noise[..., None], truth=noise, mask=noise, foreground=noise, index=0)
    monkeypatch.setattr(pictures.KeptCase, "view", lambda *_: view)
    results = Results(summarise([row_of("a", dice=0.5)], [0]))
    kept = {"a": pictures.KeptCase(tmp_path, results.summary.metric_per_case)}
    (picture,) = pictures.pictures_of(kept, results, ["lesion"], 50_000)
    assert sum(len(panel.svg) for panel in picture.panels) < 50_000
    assert "1/2 of the resolution" in picture.caption


def test_cases_without_room_are_left_out_with_the_reason(tmp_path):
    run = make_run(tmp_path / "run", num_folds=2, history=False)
    html = write_report(RunFolder(run), ReportConfig(0.001)).read_text("utf-8")
    assert (
        "6 of 6 kept cases are left out of the viewer, the least wrong ones, as the page has no "
        "room for them within 0.001 MB (<code>--report.max-mb</code>). Their masks and "
        "probabilities lie in the folders of the folds." in html
    )
    assert "viewer-data" not in html
    assert read(html).open == []
    monkey = write_report(RunFolder(run)).read_text("utf-8")
    assert "left out of the viewer" not in monkey
    assert "the run kept; 6 others are in the tables alone" in monkey


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_page_without_a_size_is_refused(tmp_path, size, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main([str(tmp_path), f"--report.max-mb={size}"]))
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"the size of a page must be above 0 MB; got {float(size):g}." in said
    assert "Use --report.max-mb=20." in said


# The grid of the T2W file -------------------------------------------------------------------------


def test_layers_are_brought_onto_the_grid_of_the_t2w_file(tmp_path):
    """A T2W file stored from head to foot with axes of its own, seen on a grid twice as coarse."""
    rng = np.random.default_rng(0)
    raw = RawCase(
        "a",
        "a",
        {"t2w": Volume(rng.normal(size=(6, 24, 32)).astype(np.float32), FLIPPED)},
        Volume(blob((6, 24, 32), 2, 12, 10).astype(np.uint8), FLIPPED),
    )
    data = DataConfig(
        modalities=("t2w",), preprocess=PreprocessConfig(spacing_mm=(3, 2, 2), size=(4, 10, 12))
    )
    case = preprocess_case(raw, data)
    probability = scipy.ndimage.gaussian_filter(case.label.astype(np.float32), 1)
    np.savez(
        tmp_path / "a.npz",
        image=figures.scaled_image(case).astype(np.float16),
        modalities=np.array(["t2w"]),
        probability=probability,
        attention=np.full((4, 10, 12, 1, 1), 200, np.uint8),
        **figures.grids(case),
    )
    view = views.read_view(tmp_path / "a.npz", "", "", 1, 0.4)
    original = to_original(probability, case)
    truth = canonical(Volume(case.original_truth, case.original_affine))
    whole = canonical(Volume(original, case.original_affine))
    offset = np.linalg.solve(whole.affine, view.affine[:, 3])[:3].round().astype(int)[::-1]
    assert (offset >= 0).all()
    box = tuple(slice(a, a + n) for a, n in zip(offset, view.mask.shape, strict=True))
    np.testing.assert_allclose(view.foreground, whole.array[box], atol=1e-6)
    np.testing.assert_array_equal(view.mask, whole.array[box] > 0.4)
    np.testing.assert_array_equal(view.truth, truth.array[box])
    assert view.truth.sum() == case.original_truth.sum() > 0  # none is cut off
    assert np.array_equal(whole.array > 0, np.pad(view.foreground, pads(box, whole)) > 0)
    assert view.spacing_mm == pytest.approx((3, 1, 1))
    assert (view.attention[2, 8:12, 8:12] == 200).all()
    assert view.images.shape == (*view.mask.shape, 1)


FLIPPED = np.array([[-1.0, 0, 0, 9], [0, -1, 0, 7], [0, 0, -3, 40], [0, 0, 0, 1]])
"""From left to right, anterior to posterior, and head to foot."""


def pads(box, volume):
    return [(a.start, n - a.stop) for a, n in zip(box, volume.shape, strict=True)]


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

    def fail(run_dir, report):
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


def test_what_the_data_are_stands_before_the_figures(tmp_path):
    run = RunFolder(make_run(tmp_path / "run", num_folds=2, figures=False))
    write_report(run)
    assert "- Data: data that are not known" in run.report_markdown.read_text("utf-8")
    t2w = ModalityData(12, ((3.0, 3.0), (0.5, 0.5), (0.5, 0.5)), (1.0, 2.0))
    adc = dataclasses.replace(t2w, num_cases=9)
    data = TrainingData("phantom", True, 12, 12, 6, {"t2w": t2w, "adc": adc})
    write_record(run.training_data, data, schema=1)
    write_report(run)
    for file in (run.report_markdown, run.report_html):
        text = file.read_text("utf-8")
        assert "of the data set phantom (synthetic images, no patients)" in text
        assert "The data are synthetic (phantom): no figure below says anything of" in text
        assert "adc is absent in 3 of 12 cases." in text
