"""Programs end with a status and one message, whatever stops them."""

import sys

import pytest

from data_pipelines import build, command_line, validate
from data_pipelines.faults import DataError


@pytest.mark.parametrize("program", [build, validate])
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (None, 0, ""),
        (DataError("a must be b; got c. Do d."), 2, "error: a must be b; got c. Do d."),
        (OSError(28, "No space left on device", "f"), 3, "No space left on device: 'f'. Repair"),
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
