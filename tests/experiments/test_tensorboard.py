import math
from typing import NamedTuple

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from experiments.training.tensorboard import write_events


class Scalar(NamedTuple):
    tag: str
    step: int
    value: float


def read_events(path):
    """Scalars of a TensorBoard file: records of length, its checksum, data, their checksum."""
    content, offset, scalars = path.read_bytes(), 0, []
    while offset < len(content):
        (length,) = np.frombuffer(content, "<u8", 1, offset)
        event = Event.FromString(content[offset + 12 : offset + 12 + int(length)])
        scalars += [Scalar(v.tag, event.step, v.simple_value) for v in event.summary.value]
        offset += int(length) + 16
    return scalars


def test_every_curve_is_written_where_it_was_measured(tmp_path):
    history = tmp_path / "history.csv"
    history.write_text(
        "step,loss,validation_dice\n5,1.5,\n10,0.5,0.25\n15,nan,\n", encoding="utf-8"
    )
    for _ in range(2):  # written anew: not appended to
        write_events(history, tmp_path / "tensorboard")
    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = read_events(file)
    assert scalars[:3] == [("loss", 5, 1.5), ("loss", 10, 0.5), ("validation_dice", 10, 0.25)]
    assert math.isnan(scalars[3].value)
    assert len(scalars) == 4
