"""The doctor on hosts that cannot isolate: each is this one, changed for a few processes in namespaces of their own.

Nothing is pretended: the kernel refuses, the doctor says what and why, its remedy is followed to the letter, and an
exec that fails quotes the same remedy and has run nothing.
"""

import ast
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import CHECKOUT, environment_with, host_lacks

from jhansi_runtime import doctor
from jhansi_runtime.isolation.job import EXECVE

DOCTOR = [sys.executable, "-m", "jhansi_runtime", "doctor", "--json"]
# Replace this process by another, for which these calls fail with this errno.
WITHOUT = """
import os, pyseccomp, sys
error, calls, *words = sys.argv[1:]
filtered = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for call in calls.split():
    filtered.add_rule(pyseccomp.ERRNO(int(error)), call)
filtered.load()
os.execvp(words[0], words)
"""
SUPERUSER_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# The shell holds all capabilities over its namespaces, and a program of the user's must not have them.
AS_USER = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all"]


class Host:
    """This host as a shell in fresh namespaces sees it, which may change them. Call it with the words of a command."""

    def __init__(self, environment, folder):
        self._folder = folder
        kept = ["--map-current-user", "--keep-caps"]
        self._shell = subprocess.Popen(
            ["unshare", *kept, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, line):
        """Run one line as the namespaces' own root would; what it printed. Its exit status must be 0."""
        status, output, error = self._run(line)
        assert status == 0, error
        return output

    def follow(self, remedy):
        """Do what a remedy says, to the letter."""
        command = re.fullmatch(r"run as root: (.+?)(?: \(.*\))?", remedy)[1]
        if shutil.which("sysctl", path=SUPERUSER_PATH) is None:
            host_lacks("sysctl", "it is in the Debian package procps")
        self(f"PATH={SUPERUSER_PATH} {command}")

    def program(self, *words):
        """Run a program as the user; (exit status, stdout, stderr)."""
        return self._run(shlex.join([*AS_USER, *map(str, words)]))

    def doctor(self):
        """The doctor's checks, by name."""
        status, output, error = self.program(*DOCTOR)
        checks = by_name(output)
        assert error == ""
        assert status == (0 if all(check["ok"] for check in checks.values()) else 1)
        return checks

    def close(self):
        self._shell.communicate()

    def _run(self, line):
        output, error = self._folder / "stdout", self._folder / "stderr"
        self._shell.stdin.write(f"( {line}\n) </dev/null >{output} 2>{error}; echo $?\n")
        self._shell.stdin.flush()
        status = self._shell.stdout.readline()
        if not status:
            host_lacks("namespaces", f"they cannot be nested here: {self._shell.communicate()[1]}")
        return int(status), output.read_text(), error.read_text()


def by_name(output):
    checks = json.loads(output)
    named = {check["name"]: check for check in checks}
    assert len(named) == len(checks)
    assert all(check["ok"] or check["remedy"] for check in checks)
    return named


def failed_step(checks):
    """The step that failed, None if none did: every step before it is ok, every one after it was not tried."""
    states = [(checks[step]["ok"], checks[step]["detail"]) for step in doctor.STEPS]
    position = next((position for position, (ok, _) in enumerate(states) if not ok), None)
    if position is None:
        return None
    assert {ok for ok, _ in states[position + 1 :]} <= {False}
    assert {detail for _, detail in states[position + 1 :]} <= {"not tried"}
    return doctor.STEPS[position]


def problems(checks):
    """What is wrong besides the steps and the lack of cgroups, which tests/root/test_cgroup_remedies.py is about.

    In namespaces of its own nobody sees systemd, which would give one.
    """
    return {name for name, check in checks.items() if not check["ok"]} - {*doctor.STEPS, "cgroup"}


@pytest.fixture(autouse=True)
def _started_by_whom(request):
    if (request.node.get_closest_marker("root") is not None) != (os.geteuid() == 0):
        pytest.skip("it is about another user than the one that runs it")


def assert_fit(checks):
    assert [check for check in checks.values() if not check["ok"] and check["name"] != "cgroup"] == []


@pytest.fixture
def environment(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return environment_with(tmp_path / "home") | {"TMPDIR": str(scratch)}


@pytest.fixture
def host(environment, tmp_path):
    changed = Host(environment, tmp_path)
    yield changed
    changed.close()


@pytest.fixture
def nothing_runs(tmp_path):
    """`nothing_runs(program)` tries to run a file that would leave a trace, and did not; the error line."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "main.py").write_text("open('ran', 'w')")

    def nothing_runs(program):
        words = ["run", "--rootfs", "host", "--workspace", workspace, "main.py"]
        status, output, error = program(sys.executable, "-m", "jhansi_runtime", *words)
        assert (status, output) == (125, "")
        assert error.startswith("jhansi-run: error: ")
        assert not (workspace / "ran").exists()
        return error.rstrip("\n")

    return nothing_runs


@pytest.fixture
def without(environment):
    """`without(calls, *words, error=...)` runs a program for which these calls fail; (exit status, stdout, stderr)."""

    def without(calls, *words, error=errno.ENOSYS, before=()):
        argv = [*before, sys.executable, "-c", WITHOUT, str(int(error)), calls, *map(str, words)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return without


# --- a fit host ---------------------------------------------------------------------------------------------


def test_on_a_fit_host_every_step_is_done_and_nothing_is_left_behind(host, tmp_path):
    checks = host.doctor()

    assert_fit(checks)
    assert {checks[step]["detail"] for step in doctor.STEPS} == {"done"}
    assert os.listdir(tmp_path / "scratch") == []
    assert not (tmp_path / "home").exists()


@pytest.mark.root
def test_started_by_root_every_step_is_done_for_the_unprivileged_id(environment):
    done = subprocess.run(DOCTOR, env=environment, umask=0o077, capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert_fit(by_name(done.stdout))


# Where init waits for the job, and the steps that the job has done by then.
WAITS_FOR = {"_await_job": ["_prepare"], "_start_job": ["_equip", "_confine"]}


def named_calls(source):
    """Every call of a plain name in a piece of source, in the order of its lines."""
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return sorted(calls, key=lambda call: call.lineno)


def steps_of(module, function):
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
    for call in named_calls(found[0]):
        if call.func.id == "step":
            yield call.args[0].value
        elif call.func.id in WAITS_FOR:
            for name in WAITS_FOR[call.func.id]:
                yield from steps_of(parsed("job"), name)


def parsed(module):
    with open(os.path.join(CHECKOUT, "jhansi_runtime", "isolation", f"{module}.py"), encoding="utf-8") as source:
        return ast.parse(source.read())


def test_the_doctor_knows_the_steps_of_isolation_by_name_and_in_order():
    launch, inside, job = parsed("launch"), parsed("inside"), parsed("job")
    of_init = [step for function in ("_begin", "_build", "_say_ready", "_run") for step in steps_of(inside, function)]
    of_launcher = [*steps_of(launch, "begin"), *steps_of(launch, "launch")]
    of_zygote = [*steps_of(launch, "launch_zygote"), *steps_of(job, "_become")]
    in_order = [*(step for step in of_launcher if step not in doctor.CGROUP_STEPS), *of_init, EXECVE]
    calls = [call for module in (launch, inside, job) for call in named_calls(module)]
    failures = {ast.unparse(call.args[0]) for call in calls if call.func.id == "Failure"}

    assert tuple(in_order) == doctor.STEPS
    assert set(doctor.CGROUP_STEPS) <= set(of_launcher)
    of_container = [*doctor.STEPS, *doctor.CGROUP_STEPS]
    assert len([call for call in calls if call.func.id == "step"]) == len(of_container) - 1 + len(of_zygote)
    assert failures <= {"EXECVE", *map(repr, doctor.STEPS)}


# --- settings -----------------------------------------------------------------------------------------------


def test_no_user_namespaces_are_named_and_the_remedy_followed_to_the_letter_mends_it(host, nothing_runs):
    host("echo 0 >/proc/sys/user/max_user_namespaces")

    checks = host.doctor()

    assert failed_step(checks) == "namespaces"
    assert problems(checks) == {"user.max_user_namespaces", "user namespaces"}
    remedy = checks["namespaces"]["remedy"]
    assert {checks[name]["remedy"] for name in problems(checks)} == {remedy}
    assert "No space left on device" in checks["namespaces"]["detail"]
    assert nothing_runs(host.program).endswith(remedy)

    host.follow(remedy)

    assert_fit(host.doctor())


@pytest.mark.parametrize("kind", ["mnt", "pid", "net", "ipc", "uts", "cgroup"])
def test_a_namespace_of_another_kind_that_is_forbidden_is_named_alone(host, kind):
    host(f"echo 0 >/proc/sys/user/max_{kind}_namespaces")

    checks = host.doctor()

    assert problems(checks) == {f"user.max_{kind}_namespaces", f"{kind} namespaces"}
    assert failed_step(checks) == "namespaces"
    host.follow(checks["namespaces"]["remedy"])
    assert_fit(host.doctor())


def test_one_user_namespace_that_is_allowed_is_not_enough_for_the_job_to_have_its_own(host):
    host("echo 1 >/proc/sys/user/max_user_namespaces")

    checks = host.doctor()

    step = failed_step(checks)
    assert step in {"fork", "user namespace"}
    assert "run as root: sysctl -w user.max_user_namespaces=15000" in checks[step]["remedy"]


# --- a container around -------------------------------------------------------------------------------------


def test_a_masked_proc_fails_at_the_mounts_and_the_remedy_is_the_container_s(host, nothing_runs, tmp_path):
    (tmp_path / "mask").mkdir()
    host(f"mount --bind {tmp_path}/mask /proc/irq")

    checks = host.doctor()

    assert failed_step(checks) == "mounts"
    assert problems(checks) == {"/proc"}
    assert checks["/proc"]["detail"] == "covered: /proc/irq"
    remedy = checks["mounts"]["remedy"]
    assert "masks parts of /proc" in remedy
    assert remedy == checks["/proc"]["remedy"]
    assert nothing_runs(host.program).endswith(remedy)

    host("umount /proc/irq")

    assert_fit(host.doctor())


def test_a_read_only_proc_sys_fails_at_the_limit_and_the_remedy_is_the_container_s(host, nothing_runs):
    host("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys")

    checks = host.doctor()

    assert failed_step(checks) == "user namespace limit"
    assert problems(checks) == {"/proc"}
    assert "masks parts of /proc" in checks["user namespace limit"]["remedy"]
    assert nothing_runs(host.program).endswith(checks["user namespace limit"]["remedy"])


def test_a_root_that_has_one_id_is_told_to_be_an_ordinary_user(environment):
    done = subprocess.run(
        ["unshare", "--map-root-user", *DOCTOR], env=environment, capture_output=True, text=True, check=False
    )
    if done.stderr:
        host_lacks("namespaces", done.stderr)
    checks = by_name(done.stdout)

    assert failed_step(checks) == "id map"
    assert checks["id map"]["remedy"].endswith("run it as an ordinary user")


# --- system calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["clone3", "openat2", "mount_setattr"])
def test_a_call_that_a_new_kernel_hides_is_named_and_the_remedy_is_the_filter_s(without, nothing_runs, call):
    status, output, _ = without(call, *DOCTOR)
    checks = by_name(output)

    assert status == 1
    assert not checks[call]["ok"]
    assert problems(checks) - {"user namespaces"} == {call, "container"}
    assert checks["cgroup"]["detail"] == "not tried"
    assert checks["container"]["detail"] == "not tried"
    assert "seccomp=unconfined" in checks[call]["remedy"]
    assert nothing_runs(lambda *words: without(call, *words)).endswith(checks[call]["remedy"])


@pytest.mark.parametrize("call", ["clone3", "openat2", "mount_setattr"])
def test_a_call_that_an_old_kernel_lacks_is_named_and_the_remedy_is_a_new_kernel(without, call):
    # The kernel itself then says that its version is 2.6 (personality(2), UNAME26).
    status, output, _ = without(call, *DOCTOR, before=["setarch", "--uname-2.6"])
    checks = by_name(output)

    assert status == 1
    assert checks["kernel"]["detail"].startswith("Linux 2.6.")
    assert not checks["kernel"]["ok"]
    assert checks[call]["remedy"].startswith("boot Linux 5.14 or newer")


@pytest.mark.parametrize(
    ("calls", "step"),
    [
        ("fsopen fsmount move_mount", "mounts"),
        ("pivot_root", "pivot_root"),
        ("sethostname", "hostname"),
        ("capset", "capabilities"),
    ],
)
def test_a_step_that_is_forbidden_from_outside_is_named_with_the_remedy(without, nothing_runs, calls, step):
    status, output, _ = without(calls, *DOCTOR, error=errno.EPERM)
    checks = by_name(output)

    assert status == 1
    assert failed_step(checks) == step
    assert checks[step]["detail"].startswith("[Errno 1] Operation not permitted")
    assert "seccomp=unconfined" in checks[step]["remedy"]
    error = nothing_runs(lambda *words: without(calls, *words, error=errno.EPERM))
    assert f"'{step}'" in error
    assert error.endswith(checks[step]["remedy"])


# --- what the stores need -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "detail", "remedy"),
    [
        ("ro", "cannot be written", "set JHANSI_HOME to another folder"),
        ("noexec", "mounted noexec", "set JHANSI_HOME to another folder"),
        ("size=16M", "16M free", "free disk space until there are 512M"),
    ],
)
def test_an_unfit_home_is_named(host, tmp_path, options, detail, remedy):
    (tmp_path / "home").mkdir()
    host(f"mount -t tmpfs -o {options} tmpfs {tmp_path}/home")

    checks = host.doctor()

    assert problems(checks) - {"PETRI_WORKSPACE_ROOT"} == {"JHANSI_HOME"}
    assert detail in checks["JHANSI_HOME"]["detail"]
    assert checks["JHANSI_HOME"]["remedy"].startswith(remedy)


def test_a_home_that_is_a_file_is_named(host, tmp_path):
    (tmp_path / "home").touch()

    checks = host.doctor()

    assert checks["JHANSI_HOME"]["detail"] == f"{tmp_path}/home is not a folder"


def test_a_temporary_folder_without_room_is_told_apart_from_isolation(host, tmp_path):
    host(f"mount -t tmpfs -o size=4k tmpfs {tmp_path}/scratch")

    checks = host.doctor()

    assert {name for name, check in checks.items() if not check["ok"]} - {"cgroup"} == {"temporary folder"}
    assert checks["temporary folder"]["detail"] == "No space left on device"
    assert checks["temporary folder"]["remedy"].startswith("set TMPDIR")
    assert os.listdir(tmp_path / "scratch") == []


def test_a_rootfs_store_that_cannot_be_read_is_named(host, tmp_path):
    (tmp_path / "home" / "rootfs").mkdir(parents=True)
    (tmp_path / "home" / "rootfs" / "python.json").write_text("{}")

    checks = host.doctor()

    assert problems(checks) == {"rootfs"}
    assert checks["rootfs"]["remedy"] == "build it again: jhansi-run rootfs build python"
