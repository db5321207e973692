import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cmsad_jax.training import TrainState
from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError, MissingDataError
from experiments.prediction.windows import weights_sha256
from experiments.settings.config import Config
from experiments.settings.stored import from_json
from experiments.training import checkpoints
from experiments.training.checkpoints import (
    Checkpoints,
    CorruptCheckpointError,
    load_params,
    read_record,
)
from tests.faults.corruption import DAMAGES, filled, survives
from tests.faults.job import tiny

FAULTS = Path(__file__).parents[1] / "faults"


def state(value: float = 0.0) -> TrainState:
    """A state like a network's, of one value."""
    params = {"conv": {"kernel": jnp.full((3, 4), float(value)), "bias": jnp.full(4, 0.5)}}
    return TrainState(
        step=jnp.asarray(int(value), jnp.int32),
        params=params,
        average=jax.tree.map(lambda leaf: leaf + 1, params),
        opt_state=({"mu": params}, (), jnp.asarray(7, jnp.int32)),
    )


@pytest.fixture
def config(tmp_path):
    return tiny(tmp_path / "run", tmp_path / "cache", steps=3)


def saved(config, *steps: int, fold: int = 0, name: str = "last") -> Checkpoints:
    kept = Checkpoints(config.output / f"fold_{fold}" / "checkpoints", config, fold=fold)
    for step in steps:
        kept.save(name, state(step), progress={"history": [{"loss": 0.1 + 0.2}]})
    kept.wait()
    return kept


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_state_comes_back_with_its_progress_bit_for_bit(config):
    values = jax.random.normal(jax.random.key(0), (3, 4))
    original = state().replace(average={"conv": {"kernel": values, "bias": values[0]}})
    kept = saved(config)
    kept.save("last", original, step=9, progress={"loss": float(values[0, 0])})
    restored, record = kept.resume(state())
    assert same(restored, original)
    assert jax.tree.structure(restored) == jax.tree.structure(original)
    assert record["step"] == 9
    assert np.float32(record["progress"]["loss"]) == values[0, 0]
    kept.close()


def test_what_is_saved_is_a_copy_that_the_next_step_cannot_change(config):
    kept = saved(config)
    change = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 - 5, s), donate_argnums=0)
    original = jax.tree.map(jnp.copy, state(3))
    kept.save("last", original)
    change(original)
    kept.close()
    assert same(kept.resume(state())[0], state(3))


def test_two_last_ones_are_kept_and_one_best(config):
    folder = config.output / "fold_0" / "checkpoints"
    saved(config, 1, 2, 3).close()
    saved(config, 1, 2, 3, name="best").close()
    assert sorted(os.listdir(folder / "last")) == ["00000002", "00000003"]
    assert os.listdir(folder / "best") == ["00000003"]


def test_nothing_saved_is_nothing_to_resume(config):
    kept = saved(config)
    assert kept.resume(state()) is None
    with pytest.raises(MissingDataError, match="a checkpoint 'best' is needed; none in"):
        kept.restore("best", state())


@pytest.mark.parametrize("seed", range(2 * len(DAMAGES)))
def test_damage_is_noticed_and_the_one_before_is_used(config, tmp_path, seed):
    states = [filled(jax.device_get(state()), value) for value in (1, 2)]

    def save(folder):
        kept = Checkpoints(folder, config)
        for step, one in enumerate(states, 1):
            kept.save("last", one, step=step)
        kept.close()
        return lambda: Checkpoints(folder, config).resume(state())

    assert survives(tmp_path / "checkpoints", save, states, seed) == ""


def test_saving_after_a_damaged_one_replaces_it(config):
    kept = saved(config, 1, 2)
    folder = config.output / "fold_0" / "checkpoints" / "last"
    (folder / "00000002" / "record.json").write_text("{}", encoding="utf-8")
    kept.save("last", state(2))
    kept.close()
    assert read_record(folder / "00000002")["step"] == 2
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_all_damaged_is_an_error_that_names_the_folder(config):
    kept = saved(config, 1)
    folder = config.output / "fold_0" / "checkpoints" / "last"
    (folder / "00000001" / "manifest.json").write_text("null", encoding="utf-8")
    with pytest.raises(CorruptCheckpointError, match=f"one checkpoint in {folder} must be intact"):
        kept.resume(state())


def test_checkpoint_of_another_fold_or_configuration_is_refused(config):
    saved(config, 1, fold=1).close()
    folder = config.output / "fold_1" / "checkpoints"
    with pytest.raises(ConfigError, match=r"(?s)must belong to the run.*fold: 1 -> 0"):
        Checkpoints(folder, config, fold=0).resume(state())
    with pytest.raises(ConfigError, match=r"(?s)data_fingerprint:  -> abc"):
        Checkpoints(folder, config, fold=1, data_fingerprint="abc").resume(state())
    other = tiny(config.output, config.data.cache, steps=4)
    with pytest.raises(ConfigError, match=r"(?s)train.steps: 3 -> 4"):
        Checkpoints(folder, other, fold=1).resume(state())


def test_checkpoint_of_another_network_is_refused(config):
    kept = saved(config, 1)
    wider = state().replace(params={"conv": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(4)}})
    with pytest.raises(ConfigError, match=r"must hold the weights of the network.*kernel"):
        kept.resume(wider)
    more = state().replace(params={**state().params, "head": jnp.zeros(2)})
    with pytest.raises(ConfigError, match="must hold the weights of the network"):
        kept.resume(more)


def test_params_to_predict_with_are_the_average_of_a_fold_that_ended(config):
    kept = saved(config, 2)
    with pytest.raises(DataError, match=r"training must have ended; .* is of step 2 of 3"):
        load_params(config.output, 0)
    kept.save("last", state(3))
    kept.close()
    assert same(load_params(config.output, 0), state(3).average)
    with pytest.raises(MissingDataError, match="fold 4 must have a checkpoint 'best'"):
        load_params(config.output, 4, checkpoint="best")


def test_older_schema_is_migrated_and_a_newer_one_refused(config, monkeypatch):
    saved(config, 1).close()
    path = config.output / "fold_0" / "checkpoints" / "last" / "00000001"
    now = checkpoints.SCHEMA
    monkeypatch.setattr(checkpoints, "SCHEMA", now + 2)
    monkeypatch.setitem(checkpoints.MIGRATIONS, now, lambda record: record | {"added": [1]})
    monkeypatch.setitem(
        checkpoints.MIGRATIONS, now + 1, lambda record: record | {"added": [*record["added"], 2]}
    )
    record = read_record(path)
    assert (record["schema"], record["added"]) == (now + 2, [1, 2])
    assert record["written_schema"] == now
    monkeypatch.setattr(checkpoints, "SCHEMA", now - 1)
    with pytest.raises(DataError, match=f"checkpoints of schema {now - 1} and before can be read"):
        read_record(path)


def test_every_schema_before_this_one_has_a_migration():
    assert sorted(checkpoints.MIGRATIONS) == list(range(1, checkpoints.SCHEMA))


def golden(schema, tmp_path):
    """The state of the golden checkpoint of a schema, resumed, and its record."""
    packed = FAULTS / f"golden_{schema}.tar.xz"
    assert packed.stat().st_size < 100_000
    run = tmp_path / str(schema) / "run"
    with tarfile.open(packed) as archive:
        archive.extractall(run.parent, filter="data")
    facts = json.loads((run / "facts.json").read_text("utf-8"))
    params = load_params(run, 0)
    assert weights_sha256(params) == facts["weights"]
    folder = run / "fold_0/checkpoints"
    config = from_json(Config, read_record(folder / "last/00000002")["config"])
    kept = Checkpoints(folder, config, data_fingerprint=facts["data"])
    optimizer = config.train.optimizer.optimizer(2)
    like = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.zeros_like, params),
        average=jax.tree.map(jnp.zeros_like, params),
        opt_state=optimizer.init(jax.tree.map(jnp.zeros_like, params)),
    )
    resumed, record = kept.resume(like)
    assert same(resumed.average, params)
    return resumed, record


@pytest.mark.parametrize("schema", range(1, checkpoints.SCHEMA + 1))
def test_golden_checkpoint_is_read(tmp_path, schema):
    resumed, record = golden(schema, tmp_path)
    assert int(resumed.step) == record["step"] == 2
    assert len(record["progress"]["history"]) == 2


def test_golden_moments_of_separate_weights_are_those_of_all_in_one_array(tmp_path):
    # Both versions trained the same two steps, up to the order of sums. Were the weights in another
    # order, nothing would correlate.
    old, new = (jax.tree.leaves(golden(schema, tmp_path)[0].opt_state) for schema in (1, 2))
    moments = [pair for pair in zip(old, new, strict=True) if pair[1].size > 1]
    assert len(moments) == 2
    for pair in moments:
        assert np.corrcoef(*map(np.asarray, pair))[0, 1] > 0.99


@pytest.mark.parametrize("where", ["folder", "file", "room"])
def test_storage_that_fails_is_named_and_the_last_good_one_is_intact(config, monkeypatch, where):
    kept = saved(config, 1)
    if where == "file":

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        monkeypatch.setattr(ocp.Checkpointer, "save", full)
    elif where == "room":
        little = SimpleNamespace(free=100)
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: little)
        monkeypatch.setattr(ocp.Checkpointer, "save", None)  # is not reached
    else:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints.Path, "mkdir", full)
    kept.save("last", state(2))
    with pytest.raises(OSError, match="No space left") as error:
        kept.close()
    assert error.value.errno == errno.ENOSPC
    assert str(error.value.filename).endswith("last/00000002")
    monkeypatch.undo()
    assert os.listdir(config.output / "fold_0/checkpoints/last") == ["00000001"]
    assert same(saved(config).resume(state())[0], state(1))


def test_nothing_is_written_behind_a_write_that_failed(config, monkeypatch):
    """A ``last`` that waited its turn would be gone on from, without the ``best`` before it."""
    begun, write = threading.Event(), Checkpoints._write

    def fails_for_best(self, name, *rest):
        assert begun.wait(60)
        if name == "best":
            raise OSError(errno.ENOSPC, "full")
        write(self, name, *rest)

    monkeypatch.setattr(Checkpoints, "_write", fails_for_best)
    kept = Checkpoints(config.output / "fold_0" / "checkpoints", config)
    kept.save("best", state(1), step=1)
    kept.save("last", state(1), step=1)
    begun.set()
    with pytest.raises(OSError, match="full"):
        kept.wait()
    kept.close()
    assert not (config.output / "fold_0" / "checkpoints" / "last").exists()


def test_tracebacks_that_orbax_logs_of_what_it_raises_are_left_out(caplog):
    logger = logging.getLogger("absl")
    logger.error("[thread=a] _SignalingThread.run() raised an exception: %s", "disk full")
    logger.error("other news")
    assert [record.getMessage() for record in caplog.records] == ["other news"]


KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from experiments.training.checkpoints import Checkpoints
from tests.experiments.test_checkpoints import state, tiny
folder = Path(sys.argv[1])
kept = Checkpoints(folder / "checkpoints", tiny(folder, folder))
for step in range(1, 10**6):
    kept.save("last", state(step))
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_checkpoint(config, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for _ in range(6):
            last = int(process.stdout.readline())
        time.sleep(0.01 * (os.getpid() % 10))
        process.send_signal(signal.SIGKILL)
    kept = Checkpoints(tmp_path / "checkpoints", tiny(tmp_path, tmp_path))
    resumed, record = kept.resume(state())
    assert record["step"] >= last - 3  # two may have waited to be written
    assert same(resumed, state(record["step"]))
    kept.save("last", state(record["step"] + 1))
    kept.close()
    names = os.listdir(tmp_path / "checkpoints" / "last")
    assert not [name for name in names if name.startswith(".")]


OTHER_DEVICES = """
import sys, jax
from jax.sharding import NamedSharding, PartitionSpec
from pathlib import Path
from types import SimpleNamespace
from cmsad_jax.parallel import data_mesh
from experiments.training.checkpoints import Checkpoints
from tests.experiments.test_checkpoints import same, state, tiny
assert len(jax.devices()) == 4
folder = Path(sys.argv[1])
everywhere = NamedSharding(data_mesh(), PartitionSpec())
kept = Checkpoints(folder / "checkpoints", tiny(folder, folder))
restored, _ = kept.resume(jax.device_put(state(), everywhere))
assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(restored))
assert same(restored, state(5))
kept.save("last", restored, step=6)
kept.close()
"""


def test_another_device_count_reads_and_writes_the_same(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", tiny(tmp_path, tmp_path))
    kept.save("last", state(5))
    kept.close()
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", OTHER_DEVICES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    resumed, record = Checkpoints(kept._directory, tiny(tmp_path, tmp_path)).resume(state())
    assert record["step"] == 6
    assert same(resumed, state(5))


def test_only_late_answers_of_a_failed_write_are_passed_over(monkeypatch):
    told = []
    monkeypatch.setattr(checkpoints, "_report_unraisable", told.append)

    def fault(text, of=None):
        return SimpleNamespace(exc_value=RuntimeError(text), object=of)

    checkpoints._without_late_answers(fault("Event loop is closed"))
    assert told == []
    others = [fault("Event loop is closed", of=print), fault("another")]
    for other in others:
        checkpoints._without_late_answers(other)
    assert told == others
