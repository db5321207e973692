"""Signals that ask a run to end: it finishes its step and saves first."""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ClassVar

import jax
from jax.experimental import multihost_utils

from data_pipelines.process import say


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end, and all that it had is saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Whether a signal has asked to stop; ``number`` is that signal, or None."""

    number: int | None = None
    nothing_to_save: bool = False
    """Whether all that was done is saved, so that a signal may end the process at once."""
    unanswered: ClassVar[int | None] = None
    """A signal whose ``Interrupted`` may have been raised where Python drops exceptions, such as a
    callback of the garbage collector."""

    def after_step(self) -> bool:
        """Whether to stop now, at the end of a step; of several processes, all say so at the same.

        They agree through JAX's preemption service, a few steps after the signal came to any of
        them. Each calls this once for each step that it makes, whatever the fold.
        """
        if not jax.distributed.is_initialized():
            return self.number is not None
        if self.number is not None:
            _preemption.notify()
        if not multihost_utils.reached_preemption_sync_point(next(_preemption.steps)):
            return False
        self.number = self.number or signal.SIGTERM
        return True


class _PreemptionService:
    """What JAX's service needs of a process: a notice of the signal, and the count of its steps.

    ``jax.distributed.initialize`` takes SIGTERM away from Python without telling it. The C function
    that it puts there notes that the signal came, and nothing else; here it is called instead of
    being left to the kernel, so that both know.
    """

    def __init__(self):
        self.steps = itertools.count(1)
        self._notice: Callable[[int], None] | None = None

    def take_over(self) -> None:
        """Keep the function that JAX put there, and give SIGTERM back to Python."""
        previous = signal.getsignal(signal.SIGTERM)
        exchange = ctypes.CDLL(None).signal
        exchange.argtypes, exchange.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        address = exchange(signal.SIGTERM, None)  # SIG_DFL
        signal.signal(signal.SIGTERM, previous)
        if address:
            self._notice = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

    def notify(self) -> None:
        """Tell the service, as the kernel would; again changes nothing."""
        if self._notice is not None:
            self._notice(signal.SIGTERM)


_preemption = _PreemptionService()


def share_signals() -> None:
    """Let the processes of a run stop at one step; once, after ``jax.distributed.initialize``.

    Without it SIGTERM does nothing in such a process, as JAX has taken it.
    """
    _preemption.take_over()


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, the signals that are heeded are handled; afterwards as before.

    A handler that raises must not stay while Python ends: its exception would be printed with a
    traceback, and change nothing.
    """
    before = {number: signal.signal(number, handler) for number in heeded()}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


GRACE_S = 8.0
"""After a signal, how long a process may take to come to a place where it can end by itself."""


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Inside, signals are answered at once, and end the process soon whatever it does.

    Python raises ``Interrupted`` only between two of its own instructions, and XLA may compile for
    minutes: after ``GRACE_S``, or a second signal, the process ends where it is. All files are
    written whole or not at all. ``deferred_signals`` inside takes over. Outside the main thread
    nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        number = 0
        while True:
            try:
                received = receiver.recv(1)
            except TimeoutError:
                received = bytes([number])
            if not received:
                return
            if received[0] not in SIGNALS:
                continue
            if number:
                say("interrupted; what is done is kept, run again to continue")
                os._exit(128 + number)
            number = received[0]
            say(f"{signal.Signals(number).name}: stopping; again to quit now")
            receiver.settimeout(GRACE_S)

    thread = threading.Thread(target=listen, name="answers", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        sender.close()
        thread.join()
        receiver.close()


@contextlib.contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Inside, ``SIGNALS`` only set ``number``, for the code to save and leave at its time.

    A second signal ends the process at once, also while XLA compiles, when Python runs no handler:
    a thread reads the signals from a socket. ``Interrupted`` is raised at the end if one came.
    Outside the main thread, which alone may handle signals, nothing is changed.
    """
    if Stop.unanswered is not None:
        raise Interrupted(Stop.unanswered)
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while received := receiver.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if stop.number is not None:
                os._exit(128 + number)
            name = signal.Signals(number).name
            if stop.nothing_to_save:
                say(f"{name}: interrupted; what is done is kept, run again to continue")
                os._exit(128 + number)
            with contextlib.suppress(OSError):  # nobody reads stdout any more
                # Not log(), which starts JAX's backend in a process of several and waits for it.
                print(
                    f"{name}: finishing this step and saving; again to quit now\n",
                    end="",
                    flush=True,
                )
            stop.number = number

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        with handled(lambda *_: None):
            wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            try:
                yield stop
            finally:
                signal.set_wakeup_fd(wakeup)
    finally:
        sender.close()
        thread.join()
        receiver.close()
    if stop.number is not None:
        raise Interrupted(stop.number)


_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *(() if _HANGUP is None else (_HANGUP,)))
"""Ctrl-C, a scheduler or service that wants the machine, a terminal that was closed."""


def heeded() -> list[signal.Signals]:
    """``SIGNALS``, but for SIGHUP where whoever started the process has it ignored (``nohup``)."""
    ignored = _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number != _HANGUP or not ignored]
