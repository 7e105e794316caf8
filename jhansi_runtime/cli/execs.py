"""One program in one container, with our own stdio, signals and exit status as its own.

The engine moves the bytes; this module tells it which descriptors, passes on which signals came, and turns the result
into an exit status (CONTRACT: Exit status of exec and run). It knows nothing of options: what was asked for comes as
fields of an ExecRequest.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from jhansi_runtime.cli.opening import open_runtime, profile_name
from jhansi_runtime.cli.records import discard_record, print_json, write_record
from jhansi_runtime.rendering import printable

if TYPE_CHECKING:
    from jhansi_runtime.cli.opening import Source
    from jhansi_runtime.engine import Streams
    from jhansi_runtime.runtime import Runtime
    from jhansi_runtime.spec import ExecResult

__all__ = ["OneShot", "exec_and_report"]

OUT_OF_TIME = 124
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PASSED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


class OneShot(NamedTuple):
    """What `run` names in place of a sandbox: a file of the host, its language, the folder it is to work in."""

    file: str
    language: str = "python"
    workspace: str | None = None


class _Signals:
    """The signals that came while an exec was under way, for us to report and, byte by byte, for the engine."""

    def __init__(self, control: int) -> None:
        self.control = control
        self.ended_by: int | None = None

    def note(self, number: int, _frame: object) -> None:
        """Python's part of a signal handler; the byte was written before, by the interpreter's own."""
        if self.ended_by is None and number in ENDING_SIGNALS:
            self.ended_by = number


def exec_and_report(
    request: dict[str, Any],
    one_shot: OneShot | None = None,
    *,
    source: "Source | None" = None,
    stdin_path: str | None = None,
    as_json: bool = False,
    result_path: str | None = None,
) -> int:
    """Run the program, report, and return the exit status.

    request holds fields of ExecRequest, which name a sandbox unless one_shot is given; source is where the
    container comes from. The result goes to stdout as_json, and to the file result_path, if that is wanted.
    """
    if result_path is not None:
        discard_record(result_path)
    with open_runtime(source=source) as runtime, _stdin(stdin_path) as stdin:
        from jhansi_runtime.spec import ExecRequest  # noqa: PLC0415 - see open_runtime

        request = request | {"seccomp": profile_name(runtime, request.get("seccomp"))}
        _build_missing_rootfs(runtime, request, one_shot)
        with _forwarded_signals() as signals:
            streams = _streams(stdin, signals.control, captured=as_json)
            record = ExecRequest(**(request | {"env": _terminal_type(streams) | request.get("env", {})}))
            if one_shot is None:
                result = runtime.exec(record, streams)
            else:
                result = runtime.run(request=record, streams=streams, **one_shot._asdict())
    if result_path is not None:
        write_record(result_path, result)
    if as_json:
        print_json(result)
    elif result.status not in {"exited", "signaled", "cancelled"}:
        print(_reason(result), file=sys.stderr)
    return _exit_status(result, signals.ended_by)


def _build_missing_rootfs(runtime: "Runtime", request: dict[str, Any], one_shot: OneShot | None) -> None:
    """Build now what the exec would build first: a signal still ends us at once here, and there is no job to end."""
    if one_shot is None:
        sandbox = runtime.sandbox(request["sandbox"])
        language, rootfs = sandbox.language, request.get("rootfs") or sandbox.rootfs
    else:
        language, rootfs = one_shot.language, request.get("rootfs") or "recipe"
    if rootfs == "recipe" and all(tree.language != language for tree in runtime.rootfs_infos()):
        _refuse_what_is_not_there(runtime, request, one_shot)
        runtime.rootfs_build(language)


def _refuse_what_is_not_there(runtime: "Runtime", request: dict[str, Any], one_shot: OneShot | None) -> None:
    """Raise what the exec would raise for a file that is not there: half a minute's work before that helps nobody."""
    from jhansi_runtime.places import require_file  # noqa: PLC0415 - see open_runtime
    from jhansi_runtime.spec import ExecRequest  # noqa: PLC0415 - likewise

    if one_shot is None:
        runtime.check(ExecRequest(**request))
    else:
        require_file(one_shot.file, one_shot.workspace)


def _streams(stdin: int, control: int, *, captured: bool) -> "Streams":
    """Our own stdio as the job's, and a terminal of its own for what of ours is one; or the output in the result."""
    from jhansi_runtime.engine import Streams  # noqa: PLC0415 - a usage error needs no engine

    if captured:
        return Streams(stdin=stdin, stdout=None, stderr=None, control=control, terminal=False)
    return Streams(stdin=stdin, stdout=1, stderr=2, control=control, terminal=True)


def _terminal_type(streams: "Streams") -> dict[str, str]:
    """TERM as it is here, for a job with a terminal; nothing else of our environment reaches it unasked."""
    terminal = any(
        stream is not None and os.isatty(stream) for stream in (streams.stdin, streams.stdout, streams.stderr)
    )
    return {"TERM": os.environ["TERM"]} if terminal and "TERM" in os.environ else {}


@contextmanager
def _stdin(path: str | None) -> Iterator[int]:
    """The descriptor the job's stdin is read from."""
    if path is None:
        yield 0
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _forwarded_signals() -> Iterator[_Signals]:
    """Within, signals do nothing here but arrive as bytes on a pipe, which the engine reads.

    One that was ignored when we were started (nohup, a shell's background job) stays ignored.
    """
    control, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signals = _Signals(control)
    before = {number: signal.getsignal(number) for number in (*ENDING_SIGNALS, *PASSED_SIGNALS)}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        for number, disposition in before.items():
            if disposition is not signal.SIG_IGN:
                signal.signal(number, signals.note)
        yield signals
    finally:
        for number, disposition in before.items():
            signal.signal(number, disposition)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        os.close(control)


def _reason(result: "ExecResult") -> str:
    severity = "error: " if result.status == "failed" else ""
    return f"jhansi-run: {severity}{printable(result.message)}"


def _exit_status(result: "ExecResult", ended_by: int | None) -> int:
    """CONTRACT: Exit status of exec and run."""
    match result.status:
        case "exited" if result.exit_code is not None:
            return result.exit_code
        case "signaled" if result.signal is not None:
            return 128 + _signal_number(result.signal)
        case "timed_out" | "cpu_time_exceeded":
            return OUT_OF_TIME
        case "oom_killed" | "output_limit" | "disk_limit":
            return 128 + signal.SIGKILL
        case "cancelled":
            return 128 + (ended_by or signal.SIGTERM)
    return 125


def _signal_number(name: str) -> int:
    """SIGKILL is 9; SIGRTMIN+3, the only form without a constant, counts from SIGRTMIN."""
    base, _, offset = name.partition("+")
    return signal.Signals[base] + int(offset or 0)
