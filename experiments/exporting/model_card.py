"""What a person should know before using an exported model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cmsad_jax import __version__, export
from data_pipelines.config import origin_of
from experiments.measuring.metrics import METRICS
from experiments.prediction.outputs import target_of_model

UNDEFINED = "undefined"


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """What the members of a model were trained on.

    Attributes:
        num_cases: of each member, where the folds are known.
        groups: that the folds leave out one after another, such as centres.
        started_from: whose weights the training of each started from; empty for drawn ones.
    """

    num_cases: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    started_from: tuple[str, ...] = ()


def classes_of(description: export.Description) -> tuple[str, ...]:
    """What is measured: the outputs, or what the user's lines make of them."""
    own = bool(description.labels)
    return target_of_model(description).classes if own else description.classes


def _scaled(grid: Mapping[str, Any]) -> str:
    """How intensities are scaled."""
    kept = ", ".join(grid.get("scales", ()))
    units = f", but for what keeps its unit ({kept}: centre and width)" if kept else ""
    return f"scaled to mean 0 and sd 1{units}"


def model_card(
    description: export.Description,
    num_parameters: int,
    trained_on: TrainingSet = TrainingSet(),
) -> str:
    """What a person should know before using the model, Markdown.

    Args:
        description: of the model, with the figures of its members.
        num_parameters: of each member.
        trained_on: how many cases, and whose.
    """
    sections = (
        _what_it_is(description, num_parameters),
        _training(description, trained_on),
        _figures(description),
        _use(description),
        _limits(description),
        _loading(),
    )
    return "# Model card\n\n" + "\n\n".join(sections) + "\n"


def _what_it_is(description: export.Description, num_parameters: int) -> str:
    grid = description.preprocess
    low, high = grid["clip_percentiles"]
    centre = "gland" if grid["centre"] == "gland" else "T2W image"
    missing = "may be missing" if description.allow_missing else "must all be there"
    classes, modalities = ", ".join(classes_of(description)), ", ".join(description.modalities)
    of_what = "in images" if description.labels else "in prostate MRI"
    return f"""Segments {classes} {of_what} from {modalities}
({missing}). **Research software, not a medical device: not for diagnosis or treatment.**

- **Model**: cross-modal self-attention distillation (CMSAD), a reconstruction from the abstract of
  arXiv 2011.03908; {num_parameters:,} weights for each of {len(description.members)} members
  ({", ".join(description.members)}), whose probabilities are averaged.
- **Input**: volumes resampled to {_times(grid["size"])} voxels (d h w) of
  {_times(grid["spacing_mm"])} mm around the centre of the {centre}, clipped to the percentiles
  {low:g} to {high:g}, {_scaled(grid)}. What lies outside that grid is not examined.
{_box(description)}- **Output**: probabilities; {_rule(description)}.{_operating_point(description)}
- **Missing modalities**: {_missing(description)}
- **Licence of the weights**: {description.license}."""


def _box(description: export.Description) -> str:
    if not description.box:
        return ""
    cascade = description.provenance.get("config", {}).get("cascade", {})
    margin = description.margin_mm
    called = "" if margin is None else f"\n  Beyond {margin:g} mm of it nothing is called."
    return (
        f"- **Cascade**: a first network in this file finds {cascade.get('target', 'it')}; this\n"
        f"  one sees a box of {_times(description.box)} voxels of the grid above around that."
        f"{called}\n"
    )


def _rule(description: export.Description) -> str:
    if len(description.classes) > 1:
        return "a voxel belongs to the most probable class, background among them"
    return f"a voxel above {description.threshold} belongs to the target"


def _operating_point(description: export.Description) -> str:
    point = description.operating_point
    if not point:
        return ""
    return (
        f"\n- **Thresholds**: {description.threshold} was fixed before the run. Learnt from it "
        f"({point['num_cases']} cases, {point['num_lesions']} lesions): candidates are called from "
        f"a confidence of {point['least_confidence']:.3f} on; voxels above "
        f"{point['threshold']:.2f} gave the best Dice (`--threshold learnt`)."
    )


def _missing(description: export.Description) -> str:
    if not description.allow_missing:
        return "a case that lacks one is refused; the model was never shown such a case."
    config = description.provenance.get("config", {})
    rate = config.get("train", {}).get("modality_dropout", 0)
    how = f"each was withheld from {rate:.0%} of its training examples" if rate else (
        "cases that lack one were among its training cases"
    )  # fmt: skip
    return (
        f"a case may lack any but all; {how}. What that costs is not in the figures below "
        "(`python -m experiments.missing_modalities`)."
    )


def _training(description: export.Description, trained_on: TrainingSet) -> str:
    data = description.provenance["config"]["data"]
    environment = description.provenance["environment"]
    origin = origin_of(str(data["name"]))
    cases = "not recorded"
    if trained_on.num_cases:
        counts = sorted({*trained_on.num_cases})
        each = " or ".join(map(str, counts)) if len(counts) < 3 else f"{counts[0]} to {counts[-1]}"
        cases = f"{each} for each member"
    total = description.metrics.get("num_cases")
    groups = ", ".join(trained_on.groups) or "not recorded in the run"
    kind = {True: "synthetic, no patients", False: "patients", None: "not recorded"}
    return f"""## Training data

- **Data set**: {origin.text}
- **Kind**: {kind[origin.synthetic]}
- **Training cases**: {cases}{"" if total is None else f"; {total} cases are measured below"}
- **Groups or centres of the folds**: {groups}{_start(trained_on)}
- **Fingerprint**: `{description.provenance["data_fingerprint"][:16]}`; commit
  `{environment.get("git_commit")}`, {environment.get("started", "date unknown")}, \
{environment.get("device", "device unknown")}"""


def _start(trained_on: TrainingSet) -> str:
    """Whose weights the members started from, whose training data they know as well."""
    whose = dict.fromkeys(words for words in trained_on.started_from if words)
    if not whose:
        return ""
    return f"\n- **First weights**: {'; '.join(whose)}. Cases of that training are known too"


def _figures(description: export.Description) -> str:
    if not description.metrics.get("mean"):
        return "## Cross-validated figures\n\nNone: the run holds no figures of these members."
    rows = [
        f"| {name} | {key} | {_figure(description, 'mean', name, key)} "
        f"| {_ends(description.metrics.get('interval', {}).get(name, {}).get(key))} "
        f"| {_figure(description, 'sd', name, key)} "
        f"| {_figure(description, 'num_defined', name, key)} |"
        for name in classes_of(description)
        for key, metric in METRICS.items()
        if metric.per_fold
    ]
    found: Mapping[str, Any] = description.metrics.get("detection") or {}
    interval, lesion = found.get("interval") or {}, target_of_model(description).lesion
    for key, label in (("average_precision", "AP of lesions"), ("auroc", "AUROC of cases")):
        if found:
            rows.append(
                f"| {lesion} | {label} | {_number(found.get(key))} | {_ends(interval.get(key))} "
                f"| – | {found['num_cases']} |"  # noqa: RUF001
            )
    return f"""## Cross-validated figures

Of the members in this file. Each case was measured by the member that had not seen it, with the
threshold {description.threshold}. The ensemble of all members has seen every case of the training
data: predictions on these are no test. Intervals (95 %, bootstrap over patients) cover chance in
who was examined, not in training.

| class | metric | mean | 95 % interval | sd | cases |
|---|---|---|---|---|---|
{chr(10).join(rows)}"""


def _use(description: export.Description) -> str:
    of_what = "such images" if description.labels else "prostate MRI"
    return f"""## Intended use

Research on methods: comparing with them, teaching, and finding cases worth a look in retrospective
collections. A person who knows {of_what} judges every result. Not intended: diagnosis, biopsy
planning, triage, or any decision on a patient; images of other organs; other sequences than
{", ".join(name.upper() for name in description.modalities)}."""


def _limits(description: export.Description) -> str:
    name = description.provenance["config"]["data"]["name"]
    first = {
        True: "- It has never seen a patient. Its figures say nothing about accuracy on patients.",
        False: "- It was measured on patients of its own data set alone; other scanners, protocols "
        "and populations were not tried.",
        None: "- It was measured on its own data set alone; other scanners, protocols and "
        "populations were not tried.",
    }[origin_of(str(name)).synthetic]
    return f"""## Limits

{first}
- Modalities are put on one grid by their headers; movement between them is not corrected.
- A confidence is the highest probability in a candidate, not the chance of a cancer.
- What lies outside the grid above is not examined and comes out as background."""


def _loading() -> str:
    return f"""## Use

In an empty environment, without a checkout of the code (written by version {__version__}):

```
pip install "cmsad-jax[experiments]"
cmsad predict --model model.cmsad --input CASES --output PREDICTIONS
```

or, on preprocessed arrays and with no other packages than jax, jaxtyping and flatbuffers
(`pip install "cmsad-jax[export]"`), `cmsad_jax.export.load("model.cmsad")`. The weights are
`weights/*.safetensors` of this archive, a zip file."""


def _figure(description: export.Description, statistic: str, name: str, metric: str) -> str:
    return _number(description.metrics.get(statistic, {}).get(name, {}).get(metric))


def _number(value: float | None) -> str:
    if value is None:
        return UNDEFINED
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _ends(ends: Sequence[float] | None) -> str:
    return UNDEFINED if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
