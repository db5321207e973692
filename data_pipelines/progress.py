"""What a program says while it works: lines, bars, a sign of life where nothing else is said."""

import contextlib
import io
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

TERMINAL_S, FILE_S = 2.5, 28.0
"""Longest silence on a terminal and in a file, less what a look at the clock takes."""

MOST_LINES = 1000
"""Lines that are kept for a record that is opened later."""


class _Voice:
    """What was said last, what is being done, and where it is recorded; one for a process."""

    def __init__(self):
        self.lock = threading.RLock()
        self.spoke_s = time.monotonic()
        self.status_shown = False
        self.work: list[tuple[str, float]] = []
        self.bars: list[Bar] = []
        self.lines: list[str] = []
        self.record: TextIO | None = None

    def note(self, text: str) -> None:
        """Write a line into the record, or keep it for one that is opened later."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
        with self.lock:
            if self.record is None:
                self.lines = [*self.lines[-MOST_LINES + 1 :], line]
                return
            with contextlib.suppress(OSError):  # a full disk is said where results are written
                self.record.write(line)
                self.record.flush()


_voice = _Voice()


def note(text: str) -> None:
    """Record a line that is printed by someone else, or by no one."""
    _voice.note(text)


def say_line(message: str) -> None:
    """Print a line on stdout, at once and in one piece, whichever thread says it; it is recorded.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OSError: it can be written nowhere; named "standard output".
    """
    with _voice.lock:
        _clear_status()
        _voice.spoke_s = time.monotonic()
        _voice.note(message)
        try:
            if any(bar.on_terminal for bar in _voice.bars):
                with tqdm.external_write_mode(file=sys.stdout):
                    print(f"{message}\n", end="", flush=True)
            else:
                print(f"{message}\n", end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside, ``what`` is done, which the sign of life names."""
    work = (what, time.monotonic())
    _voice.work.append(work)
    try:
        yield
    finally:
        _voice.work.remove(work)


class Bar(tqdm):
    """A progress bar on a terminal; where output goes to a file the sign of life tells of it.

    Attributes:
        on_terminal: whether it is drawn.
        remark: what is said after the numbers, of what follows.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.on_terminal = sys.stderr.isatty()
        self.remark: Callable[[], str] = lambda: ""
        if not self.on_terminal:
            options["file"] = io.StringIO()  # counts, and shows nothing
            options["mininterval"] = 1.0
        super().__init__(*arguments, leave=False, dynamic_ncols=True, smoothing=0.1, **options)
        _voice.bars.append(self)

    def close(self) -> None:
        """Take it off the screen."""
        if self in _voice.bars:
            _voice.bars.remove(self)
        super().close()

    def without_start(self) -> None:
        """Let what was made and spent so far count for no rate: a program was compiled."""
        made = self.n
        self.reset()
        self.n = self.initial = self.last_print_n = made

    @property
    def left_s(self) -> float | None:
        """Time to the end by the rate so far; None if it is not known."""
        facts = self.format_dict
        made = self.n - self.initial
        if not made or not self.total or facts["elapsed"] <= 0:
            return None
        return (self.total - self.n) * facts["elapsed"] / made

    def in_words(self) -> str:
        """What it shows, as a line."""
        words = f"{self.desc.removesuffix(': ')}: {self.n} of {self.total}"
        if (left := self.left_s) is not None:
            words += f", about {duration(left)} left"
        return words + self.remark()


def progress(
    items: Iterable[T] = (), *, description: str, total: int | None = None, initial: int = 0
) -> "Bar":
    """A progress bar over items."""
    return Bar(items, desc=description, total=total, initial=initial)


def duration(seconds: float) -> str:
    """A length of time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def alive(program: str) -> Iterator[None]:
    """Inside, a sign of life is given where nothing else is said, and warnings are recorded.

    On a terminal a line below the others that stays no longer than until the next; in a file a line
    after ``FILE_S``. Both go to stderr.
    """
    over = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(OSError, ValueError):  # a closed terminal takes none
                _sign_of_life(program, started)

    thread = threading.Thread(target=beat, name="alive", daemon=True)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def recorded(message, category, filename, lineno, file=None, line=None) -> None:
            note(f"{category.__name__}: {message} ({filename}:{lineno})")
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = recorded
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with _voice.lock, contextlib.suppress(OSError, ValueError):
                _clear_status()


def _sign_of_life(program: str, started: float) -> None:
    with _voice.lock:
        now = time.monotonic()
        silent_s = now - _voice.spoke_s
        bar = _voice.bars[-1] if _voice.bars else None
        if sys.stderr.isatty():
            if bar is not None and bar.on_terminal:
                bar.refresh()
                if not _voice.work:
                    return
            if silent_s >= TERMINAL_S and bar is None:
                sys.stderr.write(f"\r\033[K{_what(program, started, now)}")
                sys.stderr.flush()
                _voice.status_shown = True
        elif silent_s >= FILE_S:
            text = bar.in_words() if bar is not None else ""
            if _voice.work or not text:
                text = "; ".join(filter(None, (text, _what(program, started, now))))
            sys.stderr.write(f"... {text}\n")
            sys.stderr.flush()
            _voice.spoke_s = now


def _what(program: str, started: float, now: float) -> str:
    what, since = _voice.work[-1] if _voice.work else (program, started)
    return f"{what}, {duration(now - since)}"


def _clear_status() -> None:
    if _voice.status_shown:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
        _voice.status_shown = False


@contextlib.contextmanager
def recorded(path: Path, head: Sequence[str]) -> Iterator[None]:
    """Inside, and from the start of the process on, all lines are recorded in ``path`` as well.

    It is appended to. ``head`` follows the command line of the process. Of a record within another
    the inner one holds what is said in it.
    """
    with path.open("a", encoding="utf-8") as file:
        with _voice.lock:
            file.write(f"$ {shlex.join(_words())}\n")
            file.writelines(f"{line}\n" for line in head)
            file.writelines(_voice.lines)
            file.flush()
            _voice.lines, before, _voice.record = [], _voice.record, file
        try:
            yield
        except BaseException as error:
            _voice.note(f"ended by {type(error).__name__}: {error}")
            raise
        finally:
            with _voice.lock:
                _voice.record = before


def _words() -> list[str]:
    """The command line, the interpreter by its bare name."""
    name, *rest = sys.orig_argv or ["python"]
    return [os.path.basename(name), *rest]
