"""Signal dispositions and mask, as a fresh process has them."""

# The C module under `signal`: its Python wrappers make an enum member of every number, 10 microseconds a call.
import _signal

from jhansi_runtime.isolation.syscalls import signal_default

__all__ = ["reset"]

_OF_THE_C_LIBRARY = (32, 33)  # to cancel threads, and to change the ids of all; nptl(7)
_UNCATCHABLE = frozenset({_signal.SIGKILL, _signal.SIGSTOP})


def reset() -> None:
    """Give every signal its default action and unblock it.

    init must not run a handler of the launcher's, which a job could then trigger: the kernel shields PID 1 only from
    signals that have no handler. A job must not inherit what Python ignores (SIGPIPE, SIGXFSZ).
    """
    for number in _signal.valid_signals() - _UNCATCHABLE:
        if _signal.getsignal(number) != _signal.SIG_DFL:
            _signal.signal(number, _signal.SIG_DFL)
    # posix_spawn(3) of the C library leaves these ignored in what it starts, as the launcher was.
    for number in _OF_THE_C_LIBRARY:
        signal_default(number)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
