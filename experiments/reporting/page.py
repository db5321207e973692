"""The report's two pages from what a run folder holds."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments.measuring.metrics import METRICS
from experiments.measuring.statistics import FEW_PATIENTS, few_patients_warning
from experiments.measuring.summary import Summary
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
from experiments.reporting.pictures import pictures_of, viewer_of
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


def write_report(run: RunFolder) -> Path:
    """Write ``report.html`` and ``report.md`` of a run folder; returns the HTML's path.

    ``metrics.json`` must be there; any other file may be missing, and the report then says so or
    leaves its section out.

    Raises:
        MissingDataError: the folder holds no ``metrics.json``.
        DataError: another version wrote it, with other metrics.
    """
    results = run.read_results()
    classes = results.classes or results.summary.classes
    facts = _facts(run, results, classes)
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
    markdown, html = (templates.get_template(f"report.{kind}.j2") for kind in ("md", "html"))
    write_text(run.report_markdown, markdown.render(facts))
    room = PAGE_BYTES - len(html.render({**facts, "viewer": None}).encode()) - VIEWER_PROGRAM_BYTES
    viewer = viewer_of(run, results, classes, room)
    write_text(run.report_html, html.render({**facts, "viewer": viewer}))
    return run.report_html


PAGE_BYTES = 15_000_000


PICTURES_BYTES = 5_000_000


VIEWER_PROGRAM_BYTES = 50_000  # controls, script, and what JSON and HTML escape


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


def _facts(run: RunFolder, results: Results, classes: Sequence[str]) -> dict[str, object]:
    """Everything the two templates show but the viewer, which gets the room that is left."""
    summary = results.summary
    target = results.target or classes[0]
    names = run.read_folds().names if run.folds.is_file() else ()
    environment = run.read_environment()
    return {
        "title": f"Cross-validation: {target} segmentation",
        "run": run.path.resolve().name,
        "target": target,
        "started": environment.started,
        "device": environment.device,
        "checkpoint": CHECKPOINT_LABELS.get(results.checkpoint or "", "not recorded"),
        "rule": _rule(results, classes),
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
        "pictures": pictures_of(run, results, classes, PICTURES_BYTES),
        "per_case": case_table(summary, names),
        "timing": timing_table(results.fold_summaries or {}, names),
        **_fold_facts(run, results, classes, names),
        **_training_facts(run, summary, names),
        **_provenance(run, environment),
    }


def _rule(results: Results, classes: Sequence[str]) -> str:
    """Which voxels are foreground."""
    if len(classes) > 1:
        return "the largest of the class probabilities"
    threshold = "not recorded" if results.threshold is None else results.threshold
    return f"probability above {threshold}"


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
        "warnings": _warnings(results.summary, classes, names),
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
