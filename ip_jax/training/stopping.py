"""SIGTERM, what a preempted machine sends, as an exception at a moment of the program's choice, the
same in every process.
"""

import contextlib
import signal
import threading

from ip_jax.training import hosts

_open: list["Sigterm"] = []  # innermost last, like the handlers


class Interrupted(SystemExit):
    """SIGTERM arrived and everything worth keeping is saved; the message says what. No `except
    Exception` swallows it, and uncaught it ends with code 143.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.message, self.code = message, 128 + signal.SIGTERM


class Sigterm:
    """While open, SIGTERM raises Interrupted(`message`) at once, or, where there is no message, is
    only remembered.

    With several processes it is always remembered, and all compare notes where they call `agreed`
    or `heed`: one that left alone would leave the others waiting for it. Handlers nest. Outside the
    main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self, message: str | None = None):
        self.asked, self.message = False, message
        self._answer: object = False

    def __enter__(self):
        self.asked = bool(_open) and _open[-1].asked
        _open.append(self)
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_):
        _open.remove(self)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous)

    def _handle(self, *_):
        self.asked = True
        if self.message is not None and not hosts.several():
            raise Interrupted(self.message)

    def agreed(self, after: object) -> bool:
        """Whether to stop, alike in every process, which all call this once a step with what the
        step computes (`hosts.ask`).

        With several, the answer is to the question of the call before: it came while the devices
        computed, and no step waits for it.
        """
        before, self._answer = self._answer, hosts.ask(self.asked, after)
        return bool(before) if hosts.several() else self.asked

    @contextlib.contextmanager
    def at_once(self, message: str):
        """Inside, where nothing is left to save, SIGTERM raises at once (with several processes at
        the next `heed`); also one that was remembered before.
        """
        self.message = message
        try:
            if hosts.anywhere(self.asked):
                raise Interrupted(message)
            yield
        finally:
            self.message = None


def heed() -> None:
    """Raises Interrupted in every process if one of several has got a SIGTERM that is to raise at
    once. All call this at the same place.
    """
    if (
        hosts.several()
        and _open
        and _open[-1].message is not None
        and hosts.anywhere(_open[-1].asked)
    ):
        raise Interrupted(_open[-1].message)
