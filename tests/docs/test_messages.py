"""What a message tells people to pass is an option of a program, and can be passed so."""

import ast
import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines import build, validate
from data_pipelines.faults import DataError
from experiments import ablation, compare, evaluate, export, false_positives, plan, predict
from experiments.planning import fits
from experiments.settings import command_line

ROOT = Path(__file__).parents[2]
FIELD = "\0"
"""Stands for what an f-string fills in."""

VALUE = rf"(?:\d[\d.]*|True|False|[a-z.]+=\S+|[A-Z]+|{FIELD})"
OPTION = re.compile(
    rf"(?P<before>\w+)?[ (]?(?P<option>--[a-z][\w.-]*\w)"
    rf"(?:=(?P<value>[^\s,;)]+)|(?P<values>(?: {VALUE}(?![^\s.,;)]))+))?"
)


def programs() -> dict[str, Callable[[list[str]], object]]:
    """Programs as functions of their arguments."""

    def of(arguments: type, required: list[str], **settings) -> Callable[[list[str]], object]:
        return lambda words: tyro.cli(arguments, args=[*required, *words], **settings)

    strict = {"config": (tyro.conf.FlagConversionOff,)}
    paths = ["--output", "o"]
    return {  # the quickest first
        "data_pipelines.validate": of(validate.Arguments, [], **strict),
        "experiments.ablation": of(ablation.AblationConfig, []),
        "experiments.compare": of(compare.CompareConfig, []),
        "experiments.evaluate": of(evaluate.EvaluateConfig, []),
        "experiments.export": of(export.ExportConfig, ["--run", "r", *paths]),
        "experiments.false_positives": of(false_positives.FalsePositivesConfig, []),
        "experiments.fit": of(fits.FitCommand, []),
        "experiments.plan": of(plan.PlanCommand, [], **strict),
        "experiments.predict": of(predict.PredictCommand, ["--model", "m", "--input", "i", *paths]),
        "data_pipelines.build": of(build.Arguments, [], **strict),
        "experiments.cv": command_line.parse,
    }


def messages() -> list[tuple[str, str]]:
    """Every text of the code that is no documentation, and where it stands."""
    found = []
    for folder in ("cmsad_jax", "data_pipelines", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            nodes = list(ast.walk(tree))
            skipped: set[ast.AST] = {node.value for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.JoinedStr):
                    skipped |= {*node.values}
            for node in nodes:
                if node in skipped:
                    continue
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else FIELD for p in node.values]
                    text = "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                else:
                    continue
                if " " in text and "pip install" not in text:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def recommended() -> list[tuple[str, str, tuple[str, ...], bool]]:
    """Where an option is named, its name and values, and whether it is to be given so."""
    found = []
    for where, text in messages():
        for match in OPTION.finditer(text):
            words = (match["value"] or match["values"] or "").rstrip(".").split()
            told = bool(words) or (match["before"] or "").lower() in ("use", "pass")
            found.append((where, match["option"], tuple(words), told))
    return found


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every program, as its help names them."""
    found = {}
    for name, program in programs().items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            program(["--help"])
        found[name] = set(re.findall(r"--[a-z][\w.-]*\w", text.getvalue()))
    return found


def understood(program: Callable[[list[str]], object], words: list[str]) -> bool:
    """Whether a program takes these arguments; whether they make sense together is not asked."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            program(words)
    except (ConfigError, DataError):
        return True
    except SystemExit:
        return False
    return True


@pytest.mark.parametrize(("where", "option", "words", "told"), recommended())
def test_an_option_that_a_message_names_can_be_given_so(where, option, words, told, options):
    having = [name for name in options if option in options[name]]
    assert having, f"{where}: no program has {option}"
    concrete = not any(FIELD in word or word.isupper() for word in words)
    if told and concrete:
        assert any(understood(programs()[name], [option, *words]) for name in having), where


def test_messages_were_found_and_faults_would_be(options):
    assert len(recommended()) > 60
    assert not any("--train.seed" in names for names in options.values())
    assert not understood(programs()["experiments.cv"], ["--data.allow-missing"])
    assert understood(programs()["experiments.cv"], ["--data.allow-missing", "True"])
