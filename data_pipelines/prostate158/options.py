"""What Prostate158 alone is asked."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Prostate158Options:
    """Labels of two readers."""

    reader: Literal[1, 2] = 1
    """Whose labels are used."""
