"""The report's two pages from what a run folder holds."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from data_pipelines.config import origin_of
from experiments.measuring.detection import DetectionSummary
from experiments.measuring.lesions import Place, locate
from experiments.measuring.metrics import METRICS
from experiments.measuring.statistics import FEW_PATIENTS, few_patients_warning
from experiments.measuring.summary import Summary
from experiments.measuring.training_data import absences, in_words
from experiments.process.environment import Environment
from experiments.process.records import encode
from experiments.process.storage import write_text
from experiments.reporting.charts import (
    curve_chart,
    curve_names,
    detection_charts,
    fold_color,
    read_history,
    result_charts,
)
from experiments.reporting.lesion_list import Located, lesion_table, located
from experiments.reporting.pictures import KeptCase, caption_of, kept_cases, pictures_of
from experiments.reporting.sprites import Viewer, share_out
from experiments.reporting.tables import (
    beside_table,
    best_table,
    case_table,
    count_table,
    curve_table,
    detection_table,
    flat_table,
    fold_table,
    folds_table,
    headline_table,
    timing_table,
)
from experiments.reporting.views import View, weights_in_words
from experiments.reporting.wording import (
    Table,
    class_label,
    curve_label,
    fold_name,
    interval,
    number,
    plural,
    volume,
)
from experiments.run_folder import Results, RunFolder
from experiments.settings.config import ReportConfig

CHECKPOINT_LABELS = {
    "last": "last training step",
    "ema": "moving average (EMA) of the weights, last training step",
}


DEFINITIONS = (
    (
        "Undefined Dice",
        "A case without foreground has no Dice: it is shown as \u2013 and never averaged in, "
        "neither as 0 nor as 1. Sensitivity, precision and surface distances are of positive cases "
        "too; negative cases are judged by their false-positive volume. The column Cases holds the "
        "number of cases for which a metric is defined; every mean is over these alone.",
    ),
    (
        "Missed cases",
        "A positive case with an empty prediction has Dice and sensitivity 0, but no precision, "
        "HD95 or ASSD. Those means leave it out; the penalised ones put the diagonal of the volume "
        "in its place, and surface Dice 0. The missed cases are counted as well.",
    ),
    (
        "Spread",
        "Standard deviations (n - 1) over cases, and over the means of the folds. Neither is a "
        "standard error or a confidence interval.",
    ),
    (
        "95 % interval",
        "BCa bootstrap of the mean, drawing patients with all of their cases. It covers chance in "
        "who was examined, not in training: that takes several seeds.",
    ),
    (
        "Frame",
        "Every metric is measured on the original T2W grid, after resampling and cropping were "
        "undone.",
    ),
    (
        "Surface distances",
        "Convention of the package surface-distance: surfaces through voxel corners, elements "
        "weighted by area. HD95 is the larger of the two directed 95th percentiles, ASSD the mean "
        "of the two directed average distances. MONAI and MedPy give other values.",
    ),
    (
        "False-positive volume",
        "Predicted volume outside the truth; on negative cases all that is predicted. Volume "
        "difference is predicted less true volume of positive cases.",
    ),
    (
        "Lesion detection",
        "By picai_eval with the lesion candidates of the PI-CAI baselines: a candidate finds a "
        "lesion from an IoU of 0.1 on; a case is as suspicious as its strongest candidate. PI-CAI "
        "score: mean of average precision (AP) and AUROC.",
    ),
    (
        "Calibration",
        "Expected calibration error (ECE): mean gap between probability and frequency over bins of "
        "equal width, weighted by size. Nearly all voxels lie in the lowest bin, hence the second "
        "figure without it.",
    ),
)


PICTURES_SHARE = 0.25
"""Of a page, for the pictures that are there without JavaScript."""

PROGRAM_BYTES = 60_000
"""For the viewer's controls and script, and the tags around its cases."""

BYTES_PER_PLACE = 60
"""Of a row in the list of lesions, for where it is."""

SCALED_UNITS = "intensities as the network saw them, mean 0 and sd 1"


def write_report(run: RunFolder, report: ReportConfig = ReportConfig()) -> Path:  # noqa: B008
    """Write ``report.html`` and ``report.md`` of a run folder; returns the HTML's path.

    ``metrics.json`` must be there; any other file may be missing, and the report then says so or
    leaves its section out.

    Args:
        run: the folder.
        report: its size, in 10^6 bytes. The slices of the cases are thinned, and the least wrong
            ones left out, until it holds; tables and charts are there in any case.

    Raises:
        MissingDataError: the folder holds no ``metrics.json``.
        DataError: another version wrote it, with other metrics.
    """
    limit = int(report.max_mb * 1e6)
    results = run.read_results()
    classes = results.classes or results.summary.classes
    names = run.read_folds().names if run.folds.is_file() else ()
    rows, kept = results.summary.metric_per_case, kept_cases(run, results)
    threshold = 0.5 if results.threshold is None else results.threshold
    facts = _facts(run, results, classes, names) | {
        "max_mb": f"{report.max_mb:g}",
        "pictures": pictures_of(
            kept, results, results.parts or classes, int(limit * PICTURES_SHARE)
        ),
        "not_kept": results.summary.num_cases - len(kept),
        "lesions": lesion_table(rows, {}, names, threshold),
        "viewer": None,
    }
    templates = page_templates()
    markdown, html = (templates.get_template(f"report.{kind}.j2") for kind in ("md", "html"))
    places_bytes = BYTES_PER_PLACE * (len(facts["lesions"].rows) if facts["lesions"] else 0)
    room = limit - len(html.render(facts).encode()) - PROGRAM_BYTES - places_bytes
    viewer, places = _viewer(results, results.parts or classes, kept, room)
    facts["viewer"] = viewer
    facts["lesions"] = lesion_table(rows, places, names, threshold)
    write_text(run.report_markdown, markdown.render(facts))
    write_text(run.report_html, html.render(facts))
    return run.report_html


def page_templates() -> jinja2.Environment:
    """The templates of the pages, beside this file."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["markdown"] = _markdown
    templates.policies["json.dumps_kwargs"] = {}  # modalities keep their order
    return templates


def _viewer(
    results: Results, classes: Sequence[str], kept: Mapping[str, KeptCase], room: int
) -> tuple[Viewer | None, dict[str, list[tuple[Place, Located]]]]:
    """What the viewer shows within ``room`` bytes, and where the lesions of its cases are."""
    places: dict[str, list[tuple[Place, Located]]] = {}
    if not kept:
        return None, places
    detected = results.summary.detection is not None

    def opened(case_id: str) -> View:
        case = kept[case_id]
        title = f"{case_id}: {caption_of(case.rows)}"
        view = case.view(title, len(classes), results.threshold)
        view = dataclasses.replace(view, caption=weights_in_words(view.modality_weights))
        if detected:
            places[case_id] = [
                (place, located(view, place))
                for place in locate(view.foreground, view.truth_or_empty)
            ]
        return view

    views = {case_id: functools.partial(opened, case_id) for case_id in kept}
    viewer = share_out(views, SCALED_UNITS, room)
    for case_id in viewer["left_out"]:
        places.pop(case_id, None)
    return viewer, places


def _markdown(table: Table) -> str:
    """The table in GitHub's Markdown, under a heading."""
    lines = [
        table.columns,
        ["---", *["---:"] * (len(table.columns) - 1)],
        *table.rows,
    ]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"## {table.title}\n\n{body}\n"


def _facts(
    run: RunFolder, results: Results, classes: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """What the two templates show of the results and of how they came about."""
    summary = results.summary
    target = results.target or classes[0]
    environment = run.read_environment()
    return {
        "title": f"Cross-validation: {target} segmentation",
        "run": run.path.resolve().name,
        "target": target,
        "data_line": _data_line(run, summary),
        "started": environment.started,
        "device": environment.device,
        "checkpoint": CHECKPOINT_LABELS.get(results.checkpoint or "", "not recorded"),
        "rule": _rule(results, classes),
        "cascade": _cascade(run),
        "data": in_words(run.read_training_data()),
        "tiles": _tiles(summary, classes),
        "headline": [headline_table(summary, name) for name in classes],
        "counts": count_table(summary, classes),
        "detection": summary.detection and detection_table(summary.detection, summary.operation),
        "detection_charts": []
        if summary.detection is None
        else detection_charts(summary.detection),
        "definitions": DEFINITIONS,
        "beside": beside_table(results, classes),
        "best": results.best_checkpoint and best_table(results.best_checkpoint, names),
        "result_charts": [
            chart
            for index, name in enumerate(classes)
            for chart in result_charts(summary, name, f"r{index}")
        ],
        "per_case": case_table(summary, names),
        "timing": timing_table(results.fold_summaries or {}, names),
        **_fold_facts(run, results, classes, names),
        **_training_facts(run, summary, names),
        **_provenance(run, environment),
    }


def _data_line(run: RunFolder, summary: Summary) -> str:
    """What the data are: name, whether patients or synthetic, origin, and how many."""
    patients = len({row.patient_id for row in summary.metric_per_case})
    counted = f"{plural(summary.num_cases, 'case')} of {plural(patients, 'patient')}"
    if not run.config.is_file():
        return f"Data: not recorded; {counted}."
    data = run.read_record().config.get("data")
    data = data if isinstance(data, Mapping) else {}
    origin = origin_of(str(data.get("name", "not recorded")))
    folder = f", read from the folder {Path(str(data['path'])).name}" if data.get("path") else ""
    if origin.synthetic:
        counted = counted.replace("patient", "simulated patient")
    return f"Data: {origin.text}{folder}; {counted}."


def _rule(results: Results, classes: Sequence[str]) -> str:
    """Which voxels are foreground."""
    if len(classes) > 1:
        return "the largest of the class probabilities"
    threshold = "not recorded" if results.threshold is None else results.threshold
    return f"probability above {threshold}"


def _cascade(run: RunFolder) -> str:
    """Of a cascade, what its first network finds; nothing of other runs."""
    if not run.first.is_dir():
        return ""
    cascade = run.read_config().cascade
    box = " x ".join(f"{mm:g}" for mm in cascade.box_mm)
    margin = cascade.margin_mm
    called = "" if margin is None else f", and beyond {margin:g} mm of it nothing is called"
    return (
        f"a first network finds {cascade.target} (its own report: {run.first.name}/report.html); "
        f"beyond a box of {box} mm around it nothing is looked at{called}"
    )


def _fold_facts(
    run: RunFolder, results: Results, classes: Sequence[str], names: Sequence[str]
) -> dict[str, object]:
    """Which folds there are, and what each of those that are done came to."""
    folds = run.read_folds() if run.folds.is_file() else None
    done = [entry.fold for entry in results.summary.per_fold]
    num_folds = len(done) if results.num_folds is None else results.num_folds
    if folds is not None:
        num_folds = len(folds)
    return {
        "status": _status(done, num_folds, names),
        "complete": len(done) == num_folds,
        "warnings": [*_data_warnings(run), *_warnings(results.summary, classes, names)],
        "per_fold": fold_table(results.summary, classes, num_folds, names),
        "folds_table": folds and folds_table(folds),
        "folds_sha256": folds and folds.sha256,
    }


def _training_facts(run: RunFolder, summary: Summary, names: Sequence[str]) -> dict[str, object]:
    """Training curves, and the colour of each fold in all charts."""
    history = read_history(run)
    curves, unused = curve_names(history)
    shown = [entry.fold for entry in summary.per_fold] or sorted(history)
    return {
        "fold_colors": [(fold_name(fold, names), fold_color(fold)) for fold in shown],
        "curve_charts": [
            curve_chart(history, name, f"t{index}") for index, name in enumerate(curves)
        ],
        "curve_table": curve_table(history, curves, names),
        "unused_terms": [curve_label(name) for name in unused],
    }


def _provenance(run: RunFolder, environment: Environment) -> dict[str, object]:
    """Configuration, data and environment."""
    record = run.read_record() if run.config.is_file() else None
    return {
        "config": flat_table("Configuration", {} if record is None else record.config),
        "data_fingerprint": record and record.data_fingerprint,
        "environment": flat_table("Environment", encode(environment)),
    }


def _status(done: Sequence[int], num_folds: int, names: Sequence[str]) -> str:
    if not num_folds:
        return "Evaluated without folds."
    missing = [fold for fold in range(num_folds) if fold not in done]
    if not missing:
        return f"All {num_folds} folds are done."
    return (
        f"Incomplete: {len(done)} of {num_folds} folds are done; missing: "
        f"{', '.join(f'fold {fold_name(fold, names)}' for fold in missing)}. "
        "Every figure below is of the folds that are done."
    )


def _data_warnings(run: RunFolder) -> list[str]:
    """What must be known of the data before any figure."""
    data = run.read_training_data()
    if data is None:
        return []
    synthetic = (
        f"The data are synthetic ({data.name}): no figure below says anything of patients, nor "
        "does a model of this run."
    )
    return [*([synthetic] if data.synthetic else []), *absences(data)]


def _warnings(summary: Summary, classes: Sequence[str], names: Sequence[str]) -> list[str]:
    warnings = [
        f"No evaluated case holds any {class_label(name)}: Dice, sensitivity, precision and "
        "surface distances are undefined. Only false positives can be judged."
        for name in classes
        if not summary.num_positive[name]
    ]
    without = summary.folds_without_positives
    if without and any(summary.num_positive.values()):
        listed = ", ".join(f"fold {fold_name(fold, names)}" for fold in without)
        warnings.append(f"No positive case in {listed}: Dice is undefined there.")
    for name in classes:
        num = summary.num_patients[name]["dice"]
        if 0 < num < FEW_PATIENTS:
            warnings.append(f"{class_label(name).capitalize()}: {few_patients_warning(num)}")
    return warnings


def _tiles(summary: Summary, classes: Sequence[str]) -> list[dict[str, str]]:
    """The few figures that stand at the top, each with what it rests on."""
    tiles = []
    for name in classes:
        for key, metric in METRICS.items():
            if not metric.headline:
                continue
            num = summary.num_defined[name][key]
            ends = interval(summary.interval[name][key], metric)
            tiles.append(
                {
                    "label": f"Mean {class_label(name)} {metric.title}",
                    "value": number(summary.mean[name][key], metric),
                    "note": f"95 % interval {ends}; {plural(num, 'positive case')}"
                    if num
                    else "undefined: no positive case",
                }
            )
    tiles += _detection_tiles(summary.detection)
    if len(classes) > 1:
        return tiles
    (name,) = classes
    num_positive, num_negatives = summary.num_positive[name], summary.num_negatives[name]
    if num_positive:
        tiles.append(
            {
                "label": "Missed",
                "value": f"{summary.num_missed[name]} of {num_positive}",
                "note": "positive cases with an empty prediction",
            }
        )
    if num_negatives:
        false = summary.false_positives_on_negatives[name]
        tiles.append(
            {
                "label": "False positives",
                "value": f"{false.num_cases} of {num_negatives}",
                "note": f"negative cases, {volume(false.mean_ml)} on average",
            }
        )
    return tiles


def _detection_tiles(detection: DetectionSummary | None) -> list[dict[str, str]]:
    """Average precision of lesions and AUROC of cases."""
    if detection is None:
        return []
    ends, cases = detection.interval, detection.num_cases
    figures = (
        (
            "AP of lesions",
            detection.average_precision,
            ends.average_precision,
            plural(detection.num_lesions, "lesion"),
            "undefined: no lesion",
        ),
        (
            "AUROC of cases",
            detection.auroc,
            ends.auroc,
            f"{detection.num_positive} of {plural(cases, 'case')} with a lesion",
            "undefined: cases with and without a lesion are needed",
        ),
    )
    return [
        {
            "label": label,
            "value": number(value),
            "note": without if value is None else f"95 % interval {interval(between)}; {rests_on}",
        }
        for label, value, between, rests_on, without in figures
    ]
