"""SIGTERM, what a preempted machine sends, as an exception at a moment of the program's choice."""
import contextlib
import signal
import threading


class Interrupted(SystemExit):
    """SIGTERM arrived and everything worth keeping is saved; the message says what. No `except Exception` swallows it, and uncaught it ends with code 143."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message, self.code = message, 128 + signal.SIGTERM


class Sigterm:
    """While open, SIGTERM raises Interrupted(`message`) at once, or, where there is no message, is only remembered in `asked`.

    Handlers nest. Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self, message: str | None = None):
        self.asked, self.message = False, message

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous)

    def _handle(self, *_):
        self.asked = True
        if self.message is not None:
            raise Interrupted(self.message)

    @contextlib.contextmanager
    def at_once(self, message: str):
        """Inside, where nothing is left to save, SIGTERM raises at once; also one that was remembered before."""
        self.message = message
        try:
            if self.asked:
                raise Interrupted(message)
            yield
        finally:
            self.message = None
