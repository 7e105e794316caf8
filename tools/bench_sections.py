"""The sections of tools/bench: each measures one thing on a stage, and returns what belongs in the JSON."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from bench_measure import (
    PAUSE,
    Figures,
    available,
    compared,
    family,
    figures_of,
    memory_of,
    quantile,
    rates,
    status_of,
    timed,
)
from bench_ways import (
    IN_THE_POOL,
    Missing,
    Stage,
    Way,
    box,
    clean,
    command,
    in_process,
    post,
    program,
    variants,
    warmed,
    ways_to_run,
)

from jhansi_runtime import ExecRequest, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Section = dict[str, Any]

CALLERS = (1, 2, 8, 32)
RATED = ("bare", "bwrap", "Runtime cold", "Runtime warm", "POST warm")
EXISTING = (10, 1000, 10_000)
IDLE = 16  # slots, of which one is worth that part of what all take
OF_A_ROUND = {"hello": 1.0, "data": 0.2, "node": 0.5, "binary": 1.0}  # of the rounds asked for


def of_program(name: str, at: Stage, rounds: int) -> Section:
    """Every way to run one program."""
    of = program(name, at.folder)
    with box(at, of) as sandbox:
        wanted = ExecRequest(sandbox=sandbox, **of.what)
        if "filename" in of.what and of.file.endswith(".py"):
            warmed(at.pool, lambda: at.warm.exec(wanted))
        ways = list(ways_to_run(of, at, sandbox))
        taken = max(2, round(rounds * OF_A_ROUND[name]))
        return {"rounds": taken, "first": ways[0].name, "ways": compared(ways, taken)}


def of_variants(at: Stage, rounds: int) -> Section:
    """What single parts of an exec cost."""
    rounds = max(2, rounds // 2)
    with box(at, program("hello", at.folder)) as sandbox, variants(at, sandbox) as ways:
        return {"rounds": rounds, "first": ways[0].name, "ways": compared(ways, rounds)}


def of_callers(at: Stage, rounds: int) -> Section:
    """Execs a second at several callers at once, hello.py; the ratio is to what the same callers get done bare."""
    seconds = min(1.0, rounds / 50)
    of = program("hello", at.folder)
    found: dict[str, dict[str, float]] = {}
    with box(at, of) as sandbox:
        warmed(at.pool, lambda: at.warm.exec(ExecRequest(sandbox=sandbox, **of.what)))

        def ways() -> Iterator[Way]:
            return (way for way in ways_to_run(of, at, sandbox) if way.name in RATED)

        for callers in CALLERS:
            rates(callers, ways, seconds / 4)  # a pool learns how many it is to have
            for name, per_second in rates(callers, ways, seconds).items():
                found.setdefault(name, {})[str(callers)] = per_second
    return {"seconds": seconds, "first": RATED[0], "execs_per_second": found}


def of_memory(at: Stage, _: int) -> Section:
    """What a launcher, a zygote and a slot that waits take: from the difference between many slots and one."""
    languages = {info.language for info in at.cold.rootfs_infos()}
    found: Section = {}
    for name, language in (("hello", "python"), ("data", "python-data")):
        if language in languages:
            found[language] = _memory_of(at, name, preloaded=name == "data")
    return {"slots": IDLE, "as_root": os.geteuid() == 0, "languages": found}


def _memory_of(at: Stage, name: str, *, preloaded: bool) -> Section:
    with box(at, program(name, at.folder)) as sandbox:
        plain = [_taken_by(at, sandbox, name, count, zygotes=False) for count in (1, 1 + IDLE)]
        forked = [_taken_by(at, sandbox, name, count, zygotes=True) for count in (1, 1 + IDLE)]
    slot, warm_slot = ((many["bytes"] - one["bytes"]) / IDLE for one, many in (plain, forked))
    return {
        "is_pss": all(each["is_pss"] for each in (*plain, *forked)),
        "launcher_bytes": plain[0]["bytes"] - slot,
        "zygote_bytes": forked[0]["bytes"] - warm_slot - (plain[0]["bytes"] - slot),
        "slot_bytes": slot,
        "zygote_slot_bytes": warm_slot,
        # With what the kernel keeps for it: page tables, namespaces, mounts.
        "slot_of_the_machine_bytes": (plain[0]["available"] - plain[1]["available"]) / IDLE,
        "zygote_slot_of_the_machine_bytes": (forked[0]["available"] - forked[1]["available"]) / IDLE,
        "preloaded": preloaded,
    }


def _taken_by(at: Stage, sandbox: str, name: str, count: int, *, zygotes: bool) -> dict[str, Any]:
    """Open a runtime whose pool has so many slots of one kind, and look at all that is below this process for it."""
    others = {process.pid for process in family(os.getpid())}
    config = os.path.join(at.folder, "memory.toml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"[pool]\nmaximum = {count}\nzygotes = {'true' if zygotes else 'false'}\n")
    pool = Pool(LauncherProcess(), Sizes(minimum=count, maximum=count))
    with Runtime(at.paths._replace(config=config), slots=pool) as runtime:
        wanted = ExecRequest(sandbox=sandbox, filename="hello.py" if name == "hello" else "data.py")
        for _ in range(2):
            runtime.exec(wanted)
        deadline = time.monotonic() + 60
        while (pool.figures().idle, pool.figures().zygotes) != (count, int(zygotes)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{count} slots never came to wait: {pool.figures()}")
            time.sleep(0.05)
        time.sleep(1)
        taken, is_pss = memory_of(process.pid for process in family(os.getpid()) if process.pid not in others)
        return {"bytes": taken, "is_pss": is_pss, "available": available()}


def of_existing(at: Stage, rounds: int, counts: tuple[int, ...] = EXISTING) -> Section:
    """What an exec, a listing, and making and removing a sandbox take when so many exist; ratios are to the fewest."""
    times: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        verbs = {count: stack.enter_context(_verbs_among(at, count)) for count in counts}
        for number in range(rounds):
            turn = number % len(counts)
            for name in verbs[counts[0]]:
                for count in (*counts[turn:], *counts[:turn]):  # none always comes after the same one
                    times.setdefault(name, {}).setdefault(count, []).append(_milliseconds(verbs[count][name]))
                    time.sleep(PAUSE)
    found = {
        name: {str(count): figures_of(taken, by_count[counts[0]]) for count, taken in by_count.items()}
        for name, by_count in times.items()
    }
    return {"rounds": rounds, "first": str(counts[0]), "verbs": found}


@contextmanager
def _verbs_among(at: Stage, count: int) -> Iterator[dict[str, Callable[[], object]]]:
    """Have so many sandboxes in a folder of their own; yield what is to be timed there, by name."""
    with tempfile.TemporaryDirectory(prefix="existing-", dir=at.folder) as folder:
        os.chmod(folder, 0o755)  # noqa: S103 - as root, the program in the sandbox is somebody else
        paths = at.paths._replace(workspaces=folder)
        pool = Pool(LauncherProcess(), Sizes(maximum=IN_THE_POOL))
        with Runtime(paths) as cold, Runtime(paths, slots=pool) as warm:
            sandbox = cold.create().id
            for _ in range(count - 1):
                cold.create()
            cold.write(sandbox, "hello.py", b'print("hello")\n')
            wanted = ExecRequest(sandbox=sandbox, filename="hello.py")
            warmed(pool, lambda: warm.exec(wanted))
            yield {
                "Runtime cold": in_process(cold, wanted),
                "Runtime warm": in_process(warm, wanted),
                "create and remove": lambda: cold.remove(cold.create().id),
                "list all": cold.sandboxes,
            }


def _milliseconds(verb: Callable[[], object]) -> float:
    began = time.perf_counter()
    verb()
    return (time.perf_counter() - began) * 1000


def of_long(at: Stage, execs: int) -> Section:
    """So many execs in a row through one server: what it holds and how long they take, at first and in the end."""
    of = program("hello", at.folder)
    block = min(1000, max(1, execs // 2))
    with box(at, of) as sandbox:
        way = Way("POST warm", post(at.warm_server, sandbox, of.what))
        bare = Way("bare", command([*of.start, os.path.join(at.folder, of.file)], clean()))
        first = _block(way, bare, block)
        held = {"first": _held_by(at.warm_server.process.pid)}
        for _ in range(execs - 2 * block):
            timed(way)
        last = _block(way, bare, block)
        held["last"] = _held_by(at.warm_server.process.pid)
    return {"execs": execs, "block": block, "first": first, "last": last, "held": held}


def _block(way: Way, bare: Way, count: int) -> Figures:
    """Run it so often, and now and then the bare program, which tells how fast the machine is at the time."""
    times, others = [], []
    for number in range(count):
        times.append(timed(way))
        if number % 10 == 0:
            others.append(timed(bare))
    return figures_of(times) | {"bare_p50_ms": quantile(others, 0.5)}


def _held_by(pid: int) -> Mapping[str, int]:
    """What a server and all below it hold: counts, and bytes of memory."""
    time.sleep(1)  # in which what has ended is taken down
    members = family(pid)
    pids = [process.pid for process in members]
    memory, is_pss = memory_of([pid])
    return {
        ("server_pss_bytes" if is_pss else "server_rss_bytes"): memory,
        "all_bytes": memory_of(pids)[0],
        "machine_slab_bytes": status_of("/proc/meminfo")["Slab"],
        "processes": len(members),
        "threads": members[0].num_threads(),
        "descriptors": members[0].num_fds(),
        "mounts": _lines(f"/proc/{pid}/mountinfo"),
        "cgroups": _cgroups(pids),
        "namespaces": len(_namespaces(pids)),
    }


def _lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _cgroups(pids: list[int]) -> int:
    """How many cgroups are below those that these processes are in, and those themselves."""
    found = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
                path = next((line[3:].strip() for line in file if line.startswith("0::")), None)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if path is not None and path != "/":
            top = f"/sys/fs/cgroup{path}"
            found |= {folder for folder, _, _ in os.walk(top)}
    return len(found)


def _namespaces(pids: list[int]) -> set[str]:
    """The namespaces of these processes, as far as this user may look."""
    found = set()
    for pid in pids:
        try:
            found |= {os.readlink(f"/proc/{pid}/ns/{name}") for name in os.listdir(f"/proc/{pid}/ns")}
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return found


SECTIONS: dict[str, Callable[[Stage, int], Section]] = {
    "hello": lambda at, rounds: of_program("hello", at, rounds),
    "data": lambda at, rounds: of_program("data", at, rounds),
    "node": lambda at, rounds: of_program("node", at, rounds),
    "binary": lambda at, rounds: of_program("binary", at, rounds),
    "variants": of_variants,
    "callers": of_callers,
    "memory": of_memory,
    "existing": of_existing,
}
__all__ = ["SECTIONS", "Missing", "of_long"]
