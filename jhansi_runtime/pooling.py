"""What the settings say of the containers that wait for execs."""

from collections.abc import Sequence

from jhansi_runtime.engine import Cold, LauncherProcess, Slots
from jhansi_runtime.rootfs import Rootfs
from jhansi_runtime.spec import PoolSettings, Sandbox

__all__ = ["FOR_A_SERVER", "modules_ahead", "slots"]

FOR_A_SERVER = 8  # slots that wait, where the settings do not say how many


def slots(settings: PoolSettings, *, unless_said: int = 0) -> Slots:
    """Return where execs get their containers from: a pool, or a launcher that builds each when it is wanted.

    unless_said is the pool's maximum where the settings name none; 0 is no pool.
    """
    maximum = unless_said if settings.maximum is None else settings.maximum
    if maximum == 0:
        return Cold(LauncherProcess())
    from jhansi_runtime.engine.pool import Pool, Sizes  # noqa: PLC0415 - not for a command that runs once

    return Pool(LauncherProcess(), Sizes(settings.minimum, maximum, memory=settings.memory))


def modules_ahead(settings: PoolSettings, rootfs: Rootfs, sandbox: Sandbox | None) -> Sequence[str] | None:
    """Return what a zygote is to import ahead of an exec, or "auto"; None where there is to be no zygote."""
    zygotes = settings.zygotes
    is_wanted = zygotes if isinstance(zygotes, bool) else zygotes.get(rootfs.language, True)
    if not is_wanted or (sandbox is not None and not sandbox.zygote):
        return None
    if sandbox is not None and sandbox.preload is not None:
        return sandbox.preload
    return settings.preload.get(rootfs.language, rootfs.recipe.preload)
