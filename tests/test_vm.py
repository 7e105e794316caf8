"""tools/vm as far as it goes without booting: its arguments, what it is made from, and that nothing outlives it."""

import os
import select
import socket
import subprocess
import sys
import threading
import time
from importlib.machinery import SourceFileLoader
from types import ModuleType

import pytest
from conftest import CHECKOUT

TOOLS = os.path.join(CHECKOUT, "tools")
MARKER = b"\0a marker "


@pytest.fixture
def vm(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = ModuleType("vm")
    module.__file__ = os.path.join(TOOLS, "vm")
    SourceFileLoader("vm", module.__file__).exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["true"], "unrecognized arguments: true"),
        ([], "a command is missing: it comes after --"),
        (["--root", "--"], "a command is missing: it comes after --"),
        (["--user", "--root", "--", "true"], "not allowed with argument"),
        (["--suite", "sid", "--", "true"], "invalid choice: 'sid'"),
        (["--sysctl", "kernel.panic", "--", "true"], "'kernel.panic' is not NAME=VALUE"),
        (["--swap", "much", "--", "true"], "'much' is not a size like 512M"),
        (["--service", "--no-dbus", "--", "true"], "--service needs the session bus"),
        (["--no-delegation", "--delegate", "pids", "--", "true"], "not allowed with argument"),
    ],
)
def test_arguments_that_make_no_sense_start_nothing(arguments, complaint):
    answer = subprocess.run(
        [sys.executable, os.path.join(TOOLS, "vm"), *arguments], capture_output=True, text=True, check=False
    )

    assert (answer.returncode, answer.stdout) == (2, "")
    assert complaint in answer.stderr


def test_the_words_after_the_dashes_are_the_commands_own(vm):
    options = vm.parse(["--root", "--", "sh", "-c", "--root", "--"])

    assert options.command == ["sh", "-c", "--root", "--"]


def test_an_image_is_named_by_all_that_it_is_made_from(vm, monkeypatch):
    names = [vm.vm_image.digest("bookworm"), vm.vm_image.digest("trixie")]
    for constant, value in (("CUSTOMIZE", "true"), ("FILES", {}), ("IMAGE_PACKAGES", ("vim",)), ("MASKED", ())):
        with monkeypatch.context() as changed:
            changed.setattr(vm.vm_image, constant, value)
            names.append(vm.vm_image.digest("bookworm"))

    assert len(set(names)) == 6
    assert vm.vm_image.digest("bookworm") == names[0]


def test_the_command_meets_what_was_asked_for_and_nothing_of_how_pip_is_configured_here(vm, monkeypatch):
    monkeypatch.setenv("JHANSI_REQUIRE", "all of it")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    monkeypatch.setenv("SECRET", "kept here")
    script = vm.command(vm.parse(["--", "echo", "two words"]))

    assert "export JHANSI_REQUIRE='all of it'\n" in script
    assert "export PIP_FIND_LINKS=/wheels\n" in script
    assert "SECRET" not in script
    assert script.endswith("exec echo 'two words'\n")


def test_output_passes_byte_for_byte_and_the_status_is_taken_from_its_end(vm, capfdbinary):
    output = b"\xff\0\0a" + MARKER + b"mark" + MARKER[:-1] + b"\n" + MARKER + b"en"

    assert conversation(vm, b"noise " + MARKER + b"begin\n" + output + MARKER + b"end 42\n") == 42
    assert capfdbinary.readouterr().out == output


def test_a_machine_that_ends_before_its_command_is_an_error_after_the_output_so_far(vm, capfdbinary):
    with pytest.raises(EOFError, match="the machine ended while it was running"):
        conversation(vm, MARKER + b"begin\nhalf")

    assert capfdbinary.readouterr().out == b"half"


def test_a_machine_that_says_nothing_is_ended_in_time(vm):
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(EOFError, match="still booting after 0 s"):
        vm.Conversation(ours, MARKER, 0.01).result()


def test_what_was_started_ends_with_a_caller_that_is_killed():
    program = f"""
import sys, time, types, importlib.machinery
sys.dont_write_bytecode = True
sys.path.insert(0, {TOOLS!r})
vm = types.ModuleType("vm")
vm.__file__ = {os.path.join(TOOLS, "vm")!r}
importlib.machinery.SourceFileLoader("vm", vm.__file__).exec_module(vm)
print(vm.start(["sleep", "300"], []).pid, flush=True)
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as caller:
        pid = int(caller.stdout.readline())
        started = os.pidfd_open(pid)
        try:
            # Before that setpriv has not asked for it yet.
            while command_of(pid) != "sleep":
                time.sleep(0.01)
            caller.kill()
            assert select.select([started], [], [], 30)[0]
        finally:
            os.close(started)


def command_of(pid):
    with open(f"/proc/{pid}/comm", encoding="ascii") as text:
        return text.read().strip()


def conversation(vm, said):
    """What comes of a machine that says this, one byte at a time."""
    ours, theirs = socket.socketpair()

    def speak():
        with theirs:
            for byte in said:
                theirs.send(bytes([byte]))

    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        with ours:
            return vm.Conversation(ours, MARKER, 60).result()
    finally:
        speaker.join()
