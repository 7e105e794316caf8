"""Ends what killed processes could not end themselves: their runs."""

from contextlib import ExitStack
from itertools import islice

from jhansi_runtime.audit import AuditLog
from jhansi_runtime.runs import LostRun, Runs
from jhansi_runtime.sandboxes import Sandboxes

__all__ = ["settle_lost_runs"]

_AT_ONCE = 100  # runs: each is a descriptor, and each time the whole log is read


def settle_lost_runs(runs: Runs, audit: AuditLog, sandboxes: Sandboxes, actor: str) -> None:
    """Write the exec.end of each run whose process was killed, and remove its one-shot workspace."""
    lost_runs = runs.lost()
    while batch := list(islice(lost_runs, _AT_ONCE)):
        with ExitStack() as stack:
            for lost in batch:
                stack.callback(lost.release)
            _settle(batch, audit, sandboxes, actor)


def _settle(lost_runs: list[LostRun], audit: AuditLog, sandboxes: Sandboxes, actor: str) -> None:
    unended = audit.unended(lost.run_id for lost in lost_runs)
    for lost in lost_runs:
        if lost.run_id in unended:
            audit.append(
                "exec.end",
                actor=actor,
                sandbox_id=lost.note.get("sandbox_id"),
                run_id=lost.run_id,
                status="lost",
                message="the process that ran it was killed",
            )
        if "ephemeral" in lost.note:
            sandboxes.discard(lost.note["ephemeral"])
        lost.settle()
