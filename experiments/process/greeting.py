"""The first line of a command, before the packages are loaded that take seconds."""

import sys

SILENT = ("--help", "-h", "--help-all", "--tyro-print-completion", "--tyro-write-completion")
"""Words of a command line whose answer is the only thing printed."""


def greet(package: str) -> None:
    """Say which command this process was started as, if it is one of ``package``."""
    words = sys.orig_argv[1:]
    started = words[:1] == ["-m"] and words[1:2] and words[1].startswith(f"{package}.")
    if started and not any(word in SILENT for word in words[2:]):
        say_start(words[1].rpartition(".")[2])


def say_start(command: str) -> None:
    """The line itself."""
    from cmsad_jax import __version__  # loads nothing else

    print(f"cmsad {command}, version {__version__}; loading packages", flush=True)
