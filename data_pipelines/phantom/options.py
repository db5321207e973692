"""What the phantom alone is asked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PhantomOptions:
    """The drawn patients."""

    num_cases: int = 100
    """Number of patients to make."""
    seed: int = 0
    """Which population to draw."""
