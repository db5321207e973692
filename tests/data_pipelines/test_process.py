"""Workers end with their parent, and programs with whoever reads what they print."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import process

WORKERS = """
import os, sys, time
from data_pipelines import process
from data_pipelines.building import staging

class Slow:
    def examine_entry(self, entry):
        os.write(1, b"working\\n")
        time.sleep(120)

if sys.argv[1] == "pipe":
    process._kernel_sends = lambda number: False
if __name__ == "__main__":
    staging.examine_all(Slow(), [1, 2], num_workers=2, description="", keep=str)
"""


@pytest.mark.parametrize("way", ["kernel", "pipe"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_their_parent_whatever_ended_it(way, number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WORKERS, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(process.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, str(program), way], stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"working\n"] * 2
        parent.send_signal(number)
        assert parent.wait(30) == -number
        with contextlib.closing(parent.stdout) as ends:  # when no process holds the other end
            rest: list[bytes] = []
            os.set_blocking(ends.fileno(), True)
            timeout = signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.alarm(20)
            try:
                rest.append(ends.read())
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, timeout)
    assert rest == [b""]


def test_a_process_without_a_parent_of_ours_has_nothing_to_wait_for():
    process.end_with_parent()  # would otherwise end this test


TALKING = """
import sys
from experiments.process.console import log, run_main
def main():
    for line in range(100_000):
        log(f"line {line}")
run_main(main)
"""
HELP = ["-m", "data_pipelines.build", "--help"]


@pytest.mark.parametrize("arguments", [HELP, ["-c", TALKING]])
def test_a_reader_who_leaves_ends_the_program_quietly(arguments):
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 141 == process.READER_LEFT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [HELP, ["-c", TALKING]])
def test_output_that_can_be_written_nowhere_is_said(arguments):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_status_of_a_program_is_kept_and_other_pipes_are_faults(monkeypatch):
    class Broken(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    with pytest.raises(SystemExit) as stopped, process.printing():
        raise SystemExit(4)
    assert stopped.value.code == 4
    with pytest.raises(BrokenPipeError), process.printing():
        raise BrokenPipeError  # of a worker: both streams have their readers
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit) as stopped, process.printing():
        pass
    assert stopped.value.code == process.READER_LEFT
    with pytest.raises(SystemExit) as stopped, process.printing():
        raise SystemExit(2)
    assert stopped.value.code == 2
