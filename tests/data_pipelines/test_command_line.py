"""Programs end with a status and one message, whatever stops them."""

import sys
import warnings

import pytest

from data_pipelines import build, command_line, validate
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions


@pytest.mark.parametrize("program", [build, validate])
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (None, 0, ""),
        (DataError("a must be b; got c. Do d."), 2, "error: a must be b; got c. Do d."),
        (
            OSError(28, "No space left on device", "f"),
            3,
            "error: f: No space left on device. Repair",
        ),
        (KeyboardInterrupt(), 130, "interrupted; finished cases are kept, run again to continue"),
    ],
)
def test_a_program_ends_in_one_message(program, fault, status, message, monkeypatch, capsys):
    def main(arguments) -> int:
        assert arguments.num_workers == 3
        if fault is not None:
            raise fault
        return 0

    monkeypatch.setattr(sys, "argv", ["program", "--num-workers=3"])
    with pytest.raises(SystemExit) as ended:
        command_line.run(main, program.Arguments, module="program", description="A program.")
    assert ended.value.code == status
    assert message in capsys.readouterr().err


def test_options_of_a_data_set_are_understood_under_their_older_names(monkeypatch):
    given = [
        "--data.num-cases=3",
        "--data.num_cases",
        "4",
        "--data.name=phantom",
        "--data.reader=2",
    ]
    monkeypatch.setattr(sys, "argv", ["program", *given])

    def main(arguments) -> int:
        assert arguments.data.phantom == PhantomOptions(num_cases=4)
        assert arguments.data.prostate158.reader == 2
        return 0

    message = "--data.num-cases is --data.phantom.num-cases now; use that name"
    with pytest.warns(FutureWarning, match=message), pytest.raises(SystemExit) as ended:
        command_line.run(main, build.Arguments, module="program", description="A program.")
    assert ended.value.code == 0


def test_current_names_are_left_alone():
    given = ["--data.phantom.num-cases=3", "--data.seeds=1", "data.seed", "--seed=2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command_line.current_names(given) == given
