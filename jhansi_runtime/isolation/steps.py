"""A step of confinement, by name: it succeeds, or it ends the exec and is named in the report. Nothing fails open."""

from types import TracebackType

from jhansi_runtime.isolation.channel import Failure

__all__ = ["StepError", "step"]


class StepError(Exception):
    """A step that the kernel refused."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.step)
        self.failure = failure


class step:  # noqa: N801 - reads as the statement it is: `with step("seccomp"):`
    """Turn an OSError of the block into a StepError that names the step."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        """Begin the step."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise StepError(Failure(self._name, error.errno or 0, str(error))) from error
