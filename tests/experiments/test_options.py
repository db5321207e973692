"""What ``--help`` shows: every option with its meaning and its default."""

import dataclasses
import importlib
import re

import docstring_parser
import pytest

from data_pipelines import build, validate
from experiments import (
    ablation,
    attention,
    compare,
    evaluate,
    export,
    false_positives,
    missing_modalities,
    plan,
    predict,
    report,
    reproduce,
)
from experiments.planning import fits
from experiments.settings.command_line import parse
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS

COMMANDS = {
    "ablation": ablation.AblationConfig,
    "attention": attention.AttentionCommand,
    "compare": compare.CompareConfig,
    "cv": Config,
    "evaluate": evaluate.EvaluateConfig,
    "export": export.ExportConfig,
    "false_positives": false_positives.FalsePositivesConfig,
    "fit": fits.FitCommand,
    "missing_modalities": missing_modalities.MissingConfig,
    "plan": plan.PlanCommand,
    "predict": predict.PredictCommand,
    "report": report.ReportCommand,
    "reproduce": reproduce.ReproduceConfig,
}


def help_of(command, capsys, monkeypatch) -> dict[str, str]:
    """Meaning and default of each option, and of each positional argument, as shown."""
    monkeypatch.setenv("COLUMNS", "80")  # wider, boxes lie beside each other
    monkeypatch.setattr("sys.argv", ["program", "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"experiments.{command}").main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m experiments.{command} ")
    # An entry is a flag or a name in capitals, indented by two; its text is further right.
    entries: dict[str, str] = {}
    name = None
    for line in shown.splitlines():
        if found := re.match(r"  (--?[a-z]\S*|[A-Z]+\b)(.*?)(  +|$)(.*)", line):
            name = found[1].rstrip(",")
            entries[name] = found[4].strip()
        elif name and line.startswith("   "):
            entries[name] = f"{entries[name]} {line.strip()}".strip()
        else:
            name = None
    return entries


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_meaning_and_a_default(command, capsys, monkeypatch):
    entries = help_of(command, capsys, monkeypatch)
    assert entries.pop("-h")
    assert entries
    for name, text in entries.items():
        assert re.fullmatch(r"[A-Z].{10,} \((default: ?.*|required|repeatable)\)", text), (
            name,
            text,
        )


def test_help_lists_every_field_but_those_that_follow_from_others(capsys, monkeypatch):
    shown = {
        name.removeprefix("--").replace("-", "_")
        for name in help_of("cv", capsys, monkeypatch)
        if name.startswith("--")
    }

    def fields(value, prefix=""):
        for field in dataclasses.fields(value):
            inner, name = getattr(value, field.name), f"{prefix}{field.name}"
            if dataclasses.is_dataclass(inner):
                yield from fields(inner, f"{name}.")
            elif isinstance(inner, tuple) and inner and isinstance(inner[0], tuple):
                yield from (f"{name}.{index}" for index in range(len(inner)))
            else:
                yield name

    derived = {
        *("network.modalities", "network.num_classes", "network.prior"),
        "loss.ignored_label",
    }
    assert shown == {*fields(PRESETS["small"])} - derived


def test_meanings_are_one_line():
    """A line that is continued would be broken there in the help, whatever the terminal's width."""

    def check(kind):
        meanings = {
            parameter.arg_name: parameter.description
            for own in reversed(kind.__mro__)
            if dataclasses.is_dataclass(own)
            for parameter in docstring_parser.parse_from_object(own).params
        }
        for field in dataclasses.fields(kind):
            meaning = meanings.get(field.name) or ""
            assert "\n" not in meaning, f"{kind}.{field.name}"
            assert meaning or dataclasses.is_dataclass(field.default), f"{kind}.{field.name}"
            if dataclasses.is_dataclass(field.default):
                check(type(field.default))

    for kind in (*COMMANDS.values(), build.Arguments, validate.Arguments):
        check(kind)


def test_what_may_be_left_out_is_shown_as_what_it_is_and_still_understands_none(capsys):
    assert parse(["--loss.stages", "None", "--folds-file=None"]).loss.stages is None
    assert parse(["--loss.stages", "1", "2"]).loss.stages == (1, 2)
    flip = ["--model=m", "--input=i", "--output=o", "--flip=False"]
    command = predict.tyro.cli(predict.PredictCommand, args=flip, registry=predict.REGISTRY)
    assert command.flip is False
    with pytest.raises(SystemExit):
        parse(["--folds", "one"])
    assert "one" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--network.modalities=t2w", "--network.num-classes=3"])
def test_what_follows_from_the_data_cannot_be_given(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([option])
    assert stopped.value.code == 2
    assert "Unrecognized" in capsys.readouterr().err


def test_kernels_and_strides_are_given_by_stage():
    config = parse(["--network.encoder.kernels.1", "3", "3", "3"])
    small = PRESETS["small"].network.encoder.kernels
    assert config.network.encoder.kernels == (small[0], (3, 3, 3), *small[2:])
    slices = parse(["--preset=slice2d", "--network.encoder.strides.5", "1", "1"])
    assert slices.network.encoder.strides[-1] == (1, 1)
