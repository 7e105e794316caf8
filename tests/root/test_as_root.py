"""Started by root: the job is an unprivileged id of the host's, whose files are nobody else's; and it reads none of root's."""

import json
import os
import pwd
import stat
import subprocess
import sys

import psutil
import pytest
from conftest import environment_with, run

pytestmark = pytest.mark.root

HOST_ID = 1_900_000_000
USER = 4242  # an id that owns a folder need not be anybody's

# Says that it is up, and stays until its stdin ends.
STAYING = """
import os, sys
open("/workspace/left", "w").close()
os.mkdir("/workspace/closed", 0)
os.write(1, b"up\\n")
sys.stdin.read()
"""
SHOW = """
import os
def told(call, path):
    try:
        return call(path)
    except OSError as error:
        return type(error).__name__
print(os.getresuid(), os.getresgid(), os.getgroups(), *(told(open, path) for path in {paths!r}))
"""


@pytest.fixture
def environment(tmp_path):
    return environment_with(tmp_path / "home")


@pytest.fixture
def jhansi(environment):
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def box(jhansi):
    answer = jhansi("create", "--rootfs", "host")
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()
