import dataclasses
import errno
import gc
import os
import platform
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file, naming_path
from experiments.process.accelerator import uncollected
from experiments.process.console import RunError, run_main
from experiments.process.signals import SIGNALS, Interrupted, deferred_signals
from experiments.process.storage import TEMPORARY, locked, remove_temporary_files
from experiments.settings.command_line import complete
from experiments.settings.presets import PRESETS
from experiments.training import memory
from tests.processes import start_two

HOLD = """
import hashlib, sys
from pathlib import Path
from experiments.process.console import run_main
from experiments.process.signals import deferred_signals
from experiments.process.storage import locked
def main():
    with locked(Path(sys.argv[1])), deferred_signals() as stop:
        print("ready", flush=True)
        if sys.argv[2] == "steps":
            while stop.number is None:
                pass
            print("saved\\n", end="", flush=True)
        else:  # one long call during which Python runs no handler, as when XLA compiles
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
run_main(main)
"""


def holding(folder: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_signal_lets_the_step_end_and_the_lock_is_held_until_then(tmp_path):
    with holding(tmp_path, "steps") as process:
        with (
            pytest.raises(ConfigError, match=f"in use by process {process.pid} on"),
            locked(tmp_path),
        ):
            pass
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    said = {"SIGTERM: finishing this step and saving; again to quit now", "saved"}
    assert set(out.splitlines()) == said  # by two threads
    assert err.startswith("interrupted; what is done is kept")
    with locked(tmp_path):
        pass


def test_a_closed_terminal_lets_the_step_end_unless_it_is_ignored(tmp_path):
    with holding(tmp_path, "steps") as process:
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 129
    assert "SIGHUP: finishing this step and saving" in out
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with holding(tmp_path, "steps") as process:
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert process.returncode == 143
    assert "SIGHUP" not in out


def test_second_signal_ends_at_once_and_the_kernel_frees_the_lock(tmp_path):
    with holding(tmp_path, "call") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("SIGINT: finishing")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    with locked(tmp_path):
        pass


STUCK = """
import hashlib, sys, threading
from experiments.process import signals
from experiments.process.console import run_main
signals.GRACE_S = float(sys.argv[1])
def main():
    with signals.deferred_signals() as stop:
        stop.nothing_to_save = sys.argv[2] == "nothing"
        if sys.argv[2] == "nothing":
            stuck()
    stuck()
def stuck():  # says so from within: a signal before would still find Python at work
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
run_main(main)
"""


@pytest.mark.parametrize(
    ("grace", "what", "answer"),
    [
        ("0.2", "work", "SIGINT: stopping; again to quit now"),
        ("60", "nothing", "SIGINT: interrupted; what is done is kept, run again to continue"),
    ],
)
def test_signal_ends_what_does_not_return_to_python(grace, what, answer):
    """As XLA does while it compiles: in a run with nothing to save, and everywhere else."""
    status, said = signalled(signal.SIGINT, "ready", STUCK, grace, what)
    assert status == 130
    assert said.startswith(answer)


def signalled(number: signal.Signals, when: str, program: str, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a program that gets a signal once it has printed a line."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{when}\n"
        process.send_signal(number)
        status = process.wait(timeout=30)
        assert process.stderr is not None
        return status, process.stderr.read()


AT_EXIT = """
import atexit, time
from experiments.process.console import run_main
def slow():
    print("leaving", flush=True)
    time.sleep(60)
atexit.register(slow)
run_main(lambda: None)
"""


def test_signal_while_python_ends_is_no_traceback():
    """As one run of several gets it that has just ended, because another one failed."""
    assert signalled(signal.SIGTERM, "leaving", AT_EXIT) == (-signal.SIGTERM, "")


def test_signal_is_raised_at_the_end_of_the_section():
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"), deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_peak_memory_is_that_of_this_process_alone():
    program = """
import jax, subprocess, sys
from experiments.process.accelerator import peak_memory_bytes
if len(sys.argv) == 1:
    held = bytearray(3 * 2**29)
    for i in range(0, len(held), 4096):
        held[i] = 1
    assert peak_memory_bytes(jax.devices()[0]) > 3 * 2**29
    subprocess.run([sys.executable, "-c", sys.orig_argv[2], "child"], check=True)
else:
    assert 2**26 < peak_memory_bytes(jax.devices()[0]) < 2**30
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_after_a_function_that_is_traced(enabled):
    def fails(value):
        raise ValueError(f"{value} {gc.isenabled()}")

    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="7 False"):
            uncollected(fails)(value=7)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.fixture
def handlers():
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_that_python_drops_is_answered_at_the_next_section(handlers, capsys):
    class Struck:
        def __del__(self):  # as in the callbacks by which JAX follows garbage collection
            os.kill(os.getpid(), signal.SIGTERM)

    def main():
        Struck()
        print("went on")
        with deferred_signals():
            raise AssertionError("must not begin")

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 143
    assert capsys.readouterr().out == "went on\n"
    with deferred_signals() as stop:
        assert stop.number is None


TWO_PROCESSES = """
import sys, time
import jax
from experiments.settings.config import DistributedConfig
from experiments.process.hosts import join
from experiments.process.console import run_main
from experiments.process.signals import deferred_signals
def main():
    process, port = int(sys.argv[1]), sys.argv[2]
    join(DistributedConfig("auto", f"127.0.0.1:{port}", 2, process))
    assert len(jax.devices()) == 2 * len(jax.local_devices())
    with deferred_signals() as stop:
        for step in range(10_000):
            time.sleep(0.01 * (1 + process))  # neither is as fast as the other
            if step == 20:
                print("ready", flush=True)
            if stop.after_step():
                print("saved", step, flush=True)
                break
run_main(main)
"""


@pytest.mark.parametrize(("struck", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_processes_of_one_run_stop_at_the_same_step(struck, number):
    running = start_two(TWO_PROCESSES)
    stdout = running[struck].stdout
    assert stdout is not None
    assert stdout.readline() == "ready\n"
    running[struck].send_signal(number)
    ends = [process.communicate(timeout=120) for process in running]
    steps = {out.split("saved ")[1] for out, _ in ends}
    assert len(steps) == 1, ends
    assert running[struck].returncode == 128 + number
    assert running[1 - struck].returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (ConfigError("a; got b"), 2, "error: a; got b"),
        (DataError("a; got b"), 2, "error: a; got b"),
        (RunError("a; got b"), 3, "error: a; got b"),
        (OSError(errno.ENOSPC, "No space left", "/run/a"), 3, "error: /run/a: No space left. What"),
        (OSError(errno.ENOSPC, "No space left"), 3, "error: a file: No space left. What"),
        (KeyboardInterrupt(), 130, "interrupted; what is done is kept"),
        (Interrupted(signal.SIGHUP), 129, "interrupted; what is done is kept"),
        (Interrupted(signal.SIGTERM), 143, "interrupted; what is done is kept"),
    ],
)
def test_status_and_message(raised, status, said, handlers, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == status
    assert capsys.readouterr().err.startswith(said)


def test_fault_of_the_program_keeps_its_traceback(handlers):
    for error in (ZeroDivisionError("a"), OSError("no path, no message")):

        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            run_main(main)


def test_storage_faults_name_the_path_and_others_pass():
    with (
        pytest.raises(OSError, match="cannot write: No space left") as error,
        naming_path(Path("/run/a")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (error.value.filename, error.value.errno) == ("/run/a", errno.ENOSPC)
    with pytest.raises(DataError, match="a fault"), naming_path(Path("a"), faults=(ValueError,)):
        raise DataError("a fault")


def test_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.json"
    with atomic_file(path) as partial:
        partial.write_text("1", encoding="utf-8")
        assert TEMPORARY.fullmatch(partial.name)
        assert not path.exists()
    with pytest.raises(TypeError), atomic_file(path) as partial:
        partial.write_text(2, encoding="utf-8")  # pyright: ignore[reportArgumentType]
    assert path.read_text("utf-8") == "1"
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass  # nothing was written
    assert os.listdir(path.parent) == ["a.json"]


def test_only_temporary_files_are_removed(tmp_path):
    kept = {".lock", ".DS_Store", "a.json", ".hidden", "case.1.nii.gz"}
    for name in {".a.12.nii.gz", ".metrics.json.7.tmp", ".b.3.tmp.npz", ".folds.json.5"} | kept:
        (tmp_path / name).write_text("", encoding="utf-8")
    remove_temporary_files(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


class Device:
    def memory_stats(self):
        return {"bytes_limit": 2**30}


def test_step_that_cannot_fit_is_refused_with_two_options(monkeypatch, capsys):
    config = complete(PRESETS["volume3d"])
    monkeypatch.setattr(memory.jax.tree, "leaves", lambda state: [state])

    class State:
        sharding = types.SimpleNamespace(addressable_devices={Device()})

    def check(config, kept, temporary, **beside):
        needed = memory.Estimate(round(kept * 2**30), round(temporary * 2**30))
        monkeypatch.setattr(memory, "estimate", lambda *_: needed)
        assert memory.check(config, None, State(), None, **beside) == needed  # pyright: ignore

    check(config, 0.125, 0.375)
    assert capsys.readouterr().out == ("a step needs about 0.50 of 1.00 GiB on each device\n")
    message = r"about {} of 1.00 GiB on each device, asked for: batches of 2 crops .* Use {}\."
    with pytest.raises(
        RunError,
        match=message.format("1.62", "--train.accumulation=2 or --network.rematerialize=True"),
    ):
        check(config, 0.125, 1.5)
    with pytest.raises(  # a quarter is left: half of the batch is not enough
        RunError,
        match=message.format(
            "3.62",
            "--train.crop 20 64 64 with a new --output or --network.encoder.channels "
            "16 32 64 128 160 160 with a new --output",
        ),
    ):
        check(config, 0.125, 3.5)
    with pytest.raises(RunError, match=r"Use a device with more memory or --network\.enc"):
        check(config, 1.5, 0.125)
    with pytest.raises(
        RunError, match=r"0.75 of 1.00 GiB on each device, beside 0.50 GiB of cases, .* Use --data"
    ):
        check(config, 0.25, 0.5, resident_bytes=2**29)


def test_remedy_goes_on_from_what_is_used_already():
    config = complete(PRESETS["slice2d"])
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, accumulation=4),
        network=dataclasses.replace(config.network, rematerialize=True),
    )
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with (
        pytest.raises(RunError, match=r"=8 or --train.crop 1 128 128 with a new --output\.$"),
        memory.explained(config),
    ):
        raise error


def test_estimate_counts_arguments_results_and_temporary_arrays():
    step = jax.jit(lambda state, batch: state + batch.sum(), donate_argnums=0)
    found = memory.estimate(step, jnp.zeros(1000), jnp.zeros(500))
    assert found is not None
    assert 6000 <= found.bytes < 12_000
    assert memory.estimate(lambda state, batch: state, 1, 2) is None


def test_memory_that_runs_out_is_explained_and_other_errors_pass():
    config = complete(PRESETS["small"])
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with (
        pytest.raises(
            RunError,
            match=r"too little for it, estimated at 0.75 GiB, asked for: batches of 2 crops .* "
            r"allocating 9 bytes. Use --train.accumulation=2 or --network.remat",
        ),
        memory.explained(config, memory.Estimate(2**28, 2**29)),
    ):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


MANY_CALLS = """
import resource, sys
from experiments.process.accelerator import select_accelerator
if sys.argv[1] == "kept":
    select_accelerator("cpu")
import jax, jax.numpy as jnp
x = jnp.zeros(2**24)
double = jax.jit(lambda x: 2 * x).lower(x).compile()
for _ in range(40):
    double(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")
def test_memory_of_one_call_serves_the_next():
    """64 MiB a call are 16,384 pages of 4 KiB, which the system would have to fill anew."""

    def page_faults(how: str, **environment: str) -> int:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        shown = subprocess.run(
            [sys.executable, "-c", MANY_CALLS, how],
            cwd=Path(__file__).parents[2],
            env=inherited | environment,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        return int(shown.stdout)

    few = page_faults("kept")
    assert few < 2 * 16_384, "small blocks may still settle in between"
    # As the user's own setting has it: large blocks go back at once.
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 9 * 16_384
