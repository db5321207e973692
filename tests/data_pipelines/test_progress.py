"""What programs say while they work, the short help, and the first line."""

import io
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from data_pipelines import build, progress, short_help, validate
from data_pipelines.progress import alive, doing, duration, recorded, say_line
from experiments.settings.command_line import complete
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.settings.stored import flatten, to_json


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True


def until(condition, seconds=10.0):
    """Wait for a condition; whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_silence_in_a_file_is_broken_by_what_is_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FILE_S", 0.0)
    said = []
    with (
        alive("predict"),
        doing("compiling the step"),
        progress.progress(description="fold 0", total=8) as bar,
    ):
        bar.update(2)
        assert until(lambda: said.append(capsys.readouterr().err) or "..." in said[-1])
    assert re.match(
        r"\.\.\. fold 0: 2 of 8, about \d+ s left; compiling the step, \d+ s\n", said[-1]
    )


def test_silence_on_a_terminal_is_a_line_that_the_next_one_replaces(monkeypatch):
    monkeypatch.setattr(progress, "TERMINAL_S", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with alive("predict"):
        assert until(lambda: "\r\033[Kpredict, " in terminal.getvalue())
        say_line("a line")
        assert terminal.getvalue().endswith("\r\033[Ka line\n")


def test_rate_leaves_out_the_start(monkeypatch):
    with progress.progress(description="x", total=100) as bar:
        time.sleep(0.3)
        bar.update(1)  # a program was compiled
        bar.without_start()
        assert bar.left_s is None
        time.sleep(0.02)
        bar.update(1)
        assert bar.n == 2
        assert bar.left_s < 98 * 0.3, "the step that compiled does not count"


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.4, "5 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words


def test_record_has_command_line_versions_lines_warnings_and_the_end(tmp_path, capsys):
    say_line("before the folder was there")

    def work():
        with alive("x"), recorded(tmp_path / "log.txt", ["version 1"]):
            say_line("a line")
            warnings.warn("look here", FutureWarning, stacklevel=1)
            raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        work()
    lines = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert lines[0].startswith("$ ")
    assert Path(sys.orig_argv[0]).name in lines[0]
    assert lines[1] == "version 1"
    assert [line.partition("  ")[2] for line in lines[-4:-2]] == [
        "before the folder was there",
        "a line",
    ]
    assert "FutureWarning: look here" in lines[-2]
    assert lines[-1].endswith("ended by ValueError: the end")
    with recorded(tmp_path / "log.txt", []):
        pass
    assert len((tmp_path / "log.txt").read_text("utf-8").splitlines()) == len(lines) + 1


DEFAULTS = {
    "cv": flatten(to_json(complete(PRESETS["small"]))),
    "validate": flatten(to_json(validate.Arguments())),
    "build": flatten(to_json(build.Arguments())),
}
OPTIONS = [
    *(("cv", *entry) for entry in short_help.OF_TRAINING),
    *(("validate", *entry) for entry in short_help.OF_READING),
    *(("build", *entry) for entry in short_help.OF_READING),
]
IN_WORDS = {
    *("the phantom", "each", "all", "below runs", "one, or one for each CPU", ""),
    "small; for files auto",
}


@pytest.mark.parametrize(("command", "option", "meaning", "default"), OPTIONS)
def test_short_help_holds_to_the_options(command, option, meaning, default):
    name = option.split()[0].removeprefix("--").replace("-", "_")
    values = DEFAULTS[command]
    assert name in values, f"{option} of {command}: {meaning}"
    value = Config().data.name if name == "data.name" else values[name]
    words = (
        " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, list)
        else str(value)
    )
    assert default in IN_WORDS or default == words


def test_short_help_is_a_screen_and_loads_nothing():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "experiments.cv", "--help"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.startswith("usage: python -m experiments.cv [OPTIONS]\n")
    assert len(done.stdout.splitlines()) < 25
    assert "--help-all" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "data_pipelines.short_help" in loaded
    assert not loaded & {"jax", "tyro", "numpy"}


def test_first_line_comes_before_packages_are_loaded():
    code = "-m", "experiments.report", "nowhere"
    done = subprocess.run([sys.executable, *code], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stdout.splitlines()[0] == "cmsad report, version 0.1.0; loading packages"
    hidden = "import sys; sys.modules['jax'] = None; sys.orig_argv[1:] = ['-m', 'experiments.cv']\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden}import experiments"], capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout) == (0, "cmsad cv, version 0.1.0; loading packages\n")
