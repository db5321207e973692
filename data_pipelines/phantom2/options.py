"""What the harder phantom alone is asked."""

import dataclasses
from typing import Literal

from data_pipelines.phantom.options import PhantomOptions


@dataclasses.dataclass(frozen=True)
class Phantom2Options(PhantomOptions):
    """The harder drawn patients, with the labels of two readers."""

    reader: Literal[1, 2] = 1
    """Whose labels are used."""
