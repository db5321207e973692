"""The former name of ``experiments.missing_modalities``: it warns, and runs that."""

import runpy
import warnings


def main() -> None:
    """Command line of ``experiments.missing_modalities``."""
    warnings.warn(
        "python -m experiments.missing is python -m experiments.missing_modalities now; the former "
        "name goes with the next version.",
        FutureWarning,
        stacklevel=2,
    )
    runpy.run_module("experiments.missing_modalities", run_name="__main__")


if __name__ == "__main__":
    main()
