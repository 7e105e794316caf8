"""A zygote: the launcher once more, in the interpreter of a rootfs, inside its outer container (outer.py).

`main` is called as that interpreter starts (interpreter/sitecustomize.py). It imports what is to be there ahead, and
then launches containers as any launcher does; init and the job of each are forks of it. A job that is to run a file of
its workspace executes nothing: it leaves `main`, confined as every job is, and its interpreter runs that file.

Nothing that a job could notice is left of this: neither modules, nor search paths, nor frames, nor descriptors.
"""

import _socket
import errno
import gc
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from types import ModuleType
from typing import NoReturn

import prctl

from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation import cpython, job, memory, mounts
from jhansi_runtime.isolation.cgroup import Branch
from jhansi_runtime.isolation.channel import PLACEHOLDER, Channel, Failure
from jhansi_runtime.isolation.inside import JobLeft, StartJob
from jhansi_runtime.isolation.launcher import Launcher
from jhansi_runtime.isolation.outer import BRANCH, PRELOAD, PROCESSORS
from jhansi_runtime.isolation.spawn import CONNECTION

__all__ = ["main"]

_SITE = "sitecustomize"
_OURS = (f"/{mounts.ZYGOTES_PACKAGE}/isolation/interpreter", f"/{mounts.ZYGOTES_SITE}")


def main(modules: frozenset[str], importers: frozenset[str]) -> None:
    """Be a zygote, until whoever wanted it is gone. Returns in a job alone, which is to run the file of its order.

    modules and importers name what was there before any of ours: sys.modules, sys.path_importer_cache. ImportError,
    there too, where the rootfs has no sitecustomize, which this stood in for.
    """
    channel = Channel(_socket.socket(fileno=CONNECTION))
    try:
        site, interpreter, skipped = _prepared(modules, importers)
        kept = frozenset(sys.modules), frozenset(sys.path_importer_cache)  # with what was preloaded
        written = memory.rehearse()
    except OSError as error:
        channel.send(messages.FAILED, messages.encode_failure(Failure("zygote", error.errno or 0, str(error))))
        os._exit(1)
    branch = Branch("", BRANCH) if _is_open(BRANCH) else None
    if written is None:
        words = [*sys.orig_argv]
        words[interpreter.position] = os.devnull
        cpython.run_next(interpreter, [os.fsencode(word) for word in words], dict(os.environb))
    else:
        channel.send(messages.READY, ",".join(skipped).encode())
        try:
            Launcher(None, StartJob(os.fork, _leave), branch).serve(channel)
            os._exit(0)
        except JobLeft as left:
            waiting = left.waiting
        channel.close()
        job.confined(
            *waiting,
            lambda order: cpython.run_next(interpreter, order.argv, order.environment),
            meanwhile=lambda: memory.copy_ahead(written),
        )
    _forget_all_but(*kept)
    _give_way(kept[0].difference(modules))
    _renew_main()
    gc.enable()
    if site is None:
        raise ImportError(f"No module named {_SITE!r}", name=_SITE)
    sys.modules[_SITE] = site


def _leave(channel: Channel, report: int, host_id: int | None) -> NoReturn:
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:  # its global generator is the only state of chance that no at-fork handler renews
        numpy_random.seed()
    raise JobLeft(channel, report, host_id)


def _prepared(
    modules: frozenset[str], importers: frozenset[str]
) -> tuple[ModuleType | None, cpython.Interpreter, list[str]]:
    """Make this interpreter what its jobs are to start from.

    Return the rootfs's own sitecustomize, None where it has none; where the interpreter keeps its file; what of the
    modules to preload could not be imported.
    """
    interpreter = cpython.find(PLACEHOLDER)
    prctl.set_dumpable(0)  # its own memory, in which that looks, is closed to it from now on
    cpython.show([os.fsencode(word) for word in sys.orig_argv], {})  # whether the kernel lets a job do so
    preload = [name for name in os.environ.pop(PRELOAD, "").split(",") if name]
    processors = int(os.environ.pop(PROCESSORS))
    del os.environ["PYTHONPATH"]
    _forget_all_but(modules, importers)
    sys.path[:] = [entry for entry in sys.path if entry not in _OURS]
    site = _imported(_SITE)
    skipped = _preloaded(preload, processors)
    _end_threads()
    gc.collect()
    gc.disable()
    gc.freeze()
    return site, interpreter, skipped


def _forget_all_but(modules: Collection[str], importers: Collection[str]) -> None:
    """Leave no trace of this package in what an import sees; a module that we use as well is loaded again by others."""
    for name in set(sys.modules).difference(modules) | {_SITE}:
        sys.modules.pop(name, None)
    for entry in set(sys.path_importer_cache).difference(importers).union(_OURS):
        sys.path_importer_cache.pop(entry, None)


def _renew_main() -> None:
    """Let the program's names live in a module that is not frozen.

    At its end the collector looks at what has come since the zygote froze, and need not write to all that was there
    before. It has to come upon the program's own module, for what that holds to be finalized.
    """
    main = ModuleType("__main__")
    vars(main).update(vars(sys.modules["__main__"]))
    sys.modules["__main__"] = main


def _preloaded(names: Sequence[str], processors: int) -> list[str]:
    """Import these on as many CPUs as jobs will see, and return what could not be imported.

    OpenBLAS and OpenMP count them as they are loaded, and later start a thread for each.
    """
    ours = os.sched_getaffinity(0)
    if names:
        os.sched_setaffinity(0, sorted(ours)[:processors])
    try:
        return [name for name in names if not (_can_be_imported(name) and _imported(name))]
    finally:
        os.sched_setaffinity(0, ours)


def _imported(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def _can_be_imported(name: str) -> bool:
    """Say so of a module after trying it in a fork: what a failed import leaves behind would be in a program's way."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            import_module(name)
            status = 0
        finally:  # whatever it raises
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def _give_way(preloaded: Collection[str]) -> None:
    """Forget what was preloaded and the program has its own of, beside its file, where an import looks first."""
    if not preloaded:
        return
    folder = os.path.dirname(os.path.realpath(sys.argv[0]))
    try:
        names = {name.partition(".")[0] for name in os.listdir(folder)}
    except OSError:  # a job may not be let to list what it may run
        names = {name.partition(".")[0] for name in preloaded}
    finder = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, [".py", ".pyc"]))
    own = {name for name in names.intersection(preloaded) if getattr(finder.find_spec(name), "loader", None)}
    for name in preloaded:
        if name.partition(".")[0] in own:
            sys.modules.pop(name, None)


def _end_threads() -> None:
    """See to it that this process has one thread, which alone is in a fork. OSError: a module to preload keeps others.

    Libraries that start threads as they are loaded, OpenBLAS for one, end them before a fork, and start them again in
    whoever uses them next (pthread_atfork(3)).
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise OSError(errno.EDEADLK, f"what is preloaded keeps {threads - 1} threads, and only one can be forked")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
    return True
