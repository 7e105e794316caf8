"""A program that people run, as a row of a table: a workspace, what is run in it, and all that this prints."""

import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from jhansi_runtime import ExecRequest

# In an emulated machine (tools/vm) all takes ten times as long. No other limit is raised.
PATIENCE = {"timeout": 600, "cpu_time": 600}


class Command(NamedTuple):
    """One exec of a program of the root tree, and all that it prints."""

    words: str
    stdout: str = ""


class Row(NamedTuple):
    """What is in the workspace at first, by path, and the execs that follow one another: files by name, or commands."""

    what: str
    files: Mapping[str, str | bytes]
    execs: tuple[str | Command, ...]
    limits: Mapping[str, float] = MappingProxyType({})


def python(what, source, **files):
    """A row of one Python program."""
    return Row(what, {"main.py": source, **files}, ("main.py",))


def shell(what, source, **files):
    """A row of one shell script, which ends where a command fails."""
    return Row(what, {"main": f"#!/bin/sh -eu\n{source}", **files}, ("main",))


def printed_by(source):
    """What a program says of itself that it prints."""
    return "".join(f"{line}\n" for line in re.findall(r"(?:#|//)> (.*)", source))


OF_EMULATED_PROCESSORS = "OpenBLAS WARNING - could not determine the L2 cache size on this system, assuming 256k\n"


def run(row, runtime):
    """Make a sandbox of the row, and see each of its execs print what it is to print, and nothing on stderr."""
    sandbox = runtime.create()
    workspace = pathlib.Path(runtime.paths.workspaces, sandbox.id, "workspace")
    for name, content in row.files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_bytes(data)
        (workspace / name).chmod(0o755 if data.startswith(b"#!") else 0o644)
    for step in row.execs:
        if isinstance(step, Command):
            what, expected = {"command": step.words.split()}, step.stdout
        else:
            what, expected = {"filename": step}, printed_by(row.files[step])
        result = runtime.exec(ExecRequest(sandbox=sandbox.id, **what, limits=PATIENCE | row.limits))
        stderr = result.stderr.removeprefix(OF_EMULATED_PROCESSORS)
        told = (result.status, result.exit_code, result.stdout, stderr)
        assert told == ("exited", 0, expected, ""), f"{step}: {told}"
    runtime.remove(sandbox.id)
