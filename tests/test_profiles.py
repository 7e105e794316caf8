"""Seccomp profiles: by name, from a file, kept with a sandbox; compiled once, and taken from nobody else."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pyseccomp
import pytest
from conftest import CHECKOUT, environment_with

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.errors import HostError, InvalidRequestError, NotExecutableError, NotFoundError
from jhansi_runtime.spec import SandboxChange

PROFILES = pathlib.Path(CHECKOUT, "seccomp")
WITHOUT_UNAME = {"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 61}  # ENODATA, which it never answers
ASK_UNAME = "import os\ntry:\n    os.uname()\n    print('told')\nexcept OSError as error:\n    print(error.errno)\n"


def digest_of(path):
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def runtime(tmp_path):
    with Runtime(Paths.from_environment(environment_with(tmp_path / "home"))) as runtime:
        yield runtime


@pytest.fixture
def box(runtime):
    """A sandbox whose program tells whether uname(2) answers it."""
    sandbox = runtime.create(rootfs="host").id
    runtime.write(sandbox, "main.py", ASK_UNAME.encode())
    return sandbox


@pytest.fixture
def own(tmp_path):
    """A profile in a file: the default one, under which uname(2) answers 61."""
    profile = json.loads((PROFILES / "default.json").read_text())
    profile["syscalls"].append(WITHOUT_UNAME)
    path = tmp_path / "own profile.json"
    path.write_text(json.dumps(profile))
    return path


def run(runtime, sandbox, **fields):
    return runtime.exec(ExecRequest(sandbox=sandbox, filename="main.py", **fields))


def test_the_shipped_profiles_are_as_their_tool_wants_them():
    tool = os.path.join(CHECKOUT, "tools", "seccomp")
    answer = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_the_tool_names_what_is_amiss(tmp_path):
    path = tmp_path / "amiss.json"
    rules = [{"names": ["read", "raed"], "action": "SCMP_ACT_ALLOW"}, {"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
    tool = os.path.join(CHECKOUT, "tools", "seccomp")
    answer = subprocess.run([sys.executable, tool, "--check", path], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert f"{path}: no reason is given for ['read']" in answer.stderr
    assert f"{path}: libseccomp knows no 'raed'" in answer.stderr
    assert f"{path}: 'read' stands there twice" in answer.stderr


# --- which one ------------------------------------------------------------------------------------------------


def test_the_result_and_the_log_say_which_profile_was_enforced(runtime, box):
    for name in ("default", "strict"):
        result = run(runtime, box, seccomp=name)
        assert (result.seccomp, result.seccomp_digest) == (name, digest_of(PROFILES / f"{name}.json"))
        (begun,) = [record for record in runtime.records(run_id=result.run_id) if record["event"] == "exec.start"]
        assert (begun["seccomp"], begun["profile"]) == (result.seccomp, result.seccomp_digest)


def test_a_sandbox_keeps_its_profile_and_an_exec_may_have_another(runtime, own):
    name = runtime.profile_add(str(own))
    sandbox = runtime.create(rootfs="host", seccomp=name)
    runtime.write(sandbox.id, "main.py", ASK_UNAME.encode())
    assert sandbox.seccomp == name
    assert run(runtime, sandbox.id).stdout == "61\n"
    assert run(runtime, sandbox.id, seccomp="default").stdout == "told\n"
    runtime.change(sandbox.id, SandboxChange(seccomp="default"))
    assert run(runtime, sandbox.id).stdout == "told\n"


def test_a_file_is_taken_as_it_was_when_it_was_named(tmp_path, own):
    environment = environment_with(tmp_path / "home")
    program = tmp_path / "main.py"
    program.write_text(ASK_UNAME)

    def jhansi(*words):
        argv = [sys.executable, "-m", "jhansi_runtime", *words]
        return subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    one_shot = jhansi("run", "--rootfs", "host", "--seccomp", own.name, program)  # a relative path
    assert (one_shot.stdout, one_shot.stderr) == ("61\n", "")
    box = jhansi("create", "--rootfs", "host", "--seccomp", own).stdout.strip()
    jhansi("put", box, program)
    kept = digest_of(own)
    own.unlink()
    answer = json.loads(jhansi("exec", "--json", box, "main.py").stdout)
    assert (answer["stdout"], answer["seccomp_digest"]) == ("61\n", kept)
    assert f"seccomp    sha256-{kept.removeprefix('sha256:')}" in jhansi("show", box).stdout
    assert jhansi("exec", "--seccomp", "default", box, "main.py").stdout == "told\n"


@pytest.mark.parametrize("name", ["laxest", "", "../seccomp/default", "/etc/passwd", "default.json", "."])
def test_a_name_that_is_none_leads_nowhere(runtime, box, name):
    with pytest.raises(NotFoundError, match="no seccomp profile"):
        runtime.create(rootfs="host", seccomp=name)
    if name:  # which stands for the sandbox's own
        with pytest.raises(NotFoundError, match="no seccomp profile"):
            run(runtime, box, seccomp=name)
    with pytest.raises(NotFoundError, match="no seccomp profile"):
        runtime.change(box, SandboxChange(seccomp=name))


def test_over_http_a_profile_is_a_name_and_never_a_file(make, api):
    sandbox = make({"main.py": ASK_UNAME}, seccomp="strict")
    answer = api.post(f"{sandbox}/exec", json={"filename": "main.py"}).json()
    assert (answer["stdout"], answer["seccomp"]) == ("told\n", "strict")
    answer = api.post(f"{sandbox}/exec", json={"filename": "main.py", "seccomp": "default"}).json()
    assert answer["seccomp"] == "default"
    for name, status in (("laxest", 404), (str(PROFILES / "default.json"), 422), ("../default", 422)):
        body = {"filename": "main.py", "seccomp": name}
        assert api.post(f"{sandbox}/exec", json=body).status_code == status
        assert api.post(f"{sandbox}/exec", json=body | {"detach": True}).status_code == status
        assert api.post("/v1/sandboxes", json={"rootfs": "host", "seccomp": name}).status_code == status
        assert api.patch(sandbox, json={"seccomp": name}).status_code == status
    assert api.patch(sandbox, json={"seccomp": "default"}).json()["seccomp"] == "default"


# --- what is no profile ---------------------------------------------------------------------------------------

RULE = {"names": ["read"], "action": "SCMP_ACT_ALLOW"}
REFUSED = {
    "not JSON": ("{", "not JSON"),
    "not a profile": ("[]", "Expected `object`, got `array`"),
    "no rules": ({"defaultAction": "SCMP_ACT_ERRNO"}, "missing required field `syscalls`"),
    "allows what it does not name": ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}, "defaultAction"),
    "asks somebody else": ({"syscalls": [RULE | {"action": "SCMP_ACT_NOTIFY"}]}, "action"),
    "Docker's, whose rules depend on capabilities": ({"syscalls": [RULE | {"includes": {}}]}, "`includes`"),
    "no names": ({"syscalls": [RULE | {"names": []}]}, "names"),
    "an errno that is none": ({"syscalls": [RULE | {"errnoRet": 4096}]}, "errnoRet"),
    "an argument that is none": (
        {"syscalls": [RULE | {"args": [{"index": 6, "op": "SCMP_CMP_EQ", "value": 0}]}]},
        "index",
    ),
    "a value of more than 64 bits": (
        {"syscalls": [RULE | {"args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1 << 64}]}]},
        "more than 64 bits",
    ),
    "one argument compared twice": (
        {"syscalls": [RULE | {"args": [{"index": 0, "op": "SCMP_CMP_GE", "value": n} for n in (1, 2)]}]},
        "libseccomp takes no such rule of 'read'",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_profile_is_refused_before_anything_runs(runtime, tmp_path, content, message):
    path = tmp_path / "profile.json"
    text = content if isinstance(content, str) else json.dumps({"defaultAction": "SCMP_ACT_ERRNO"} | content)
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        runtime.profile_add(str(path))
    assert not os.path.exists(runtime.paths.profiles)


def test_a_file_that_is_none_is_refused_and_nobody_waits_for_it(runtime, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(InvalidRequestError, match="is not a file"):
        runtime.profile_add(str(tmp_path / "fifo"))
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        runtime.profile_add(str(tmp_path))
    with pytest.raises(InvalidRequestError, match="larger"):
        runtime.profile_add(str(tmp_path / "large"))
    with pytest.raises(NotFoundError, match="there is no seccomp profile"):
        runtime.profile_add(str(tmp_path / "none"))


INSTALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
print(libc.prctl(22, 2, None), errno.errorcode[ctypes.get_errno()])
print(libc.syscall({seccomp}, 1, 0, None), errno.errorcode[ctypes.get_errno()])
"""


@pytest.mark.parametrize("refused_with", [None, 1, 38])
def test_a_profile_may_refuse_the_call_that_installs_it(runtime, box, tmp_path, refused_with):
    profile = json.loads((PROFILES / "default.json").read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "seccomp"]
    if refused_with is not None:
        profile["syscalls"].append({"names": ["seccomp"], "action": "SCMP_ACT_ERRNO", "errnoRet": refused_with})
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "seccomp")
    runtime.write(box, "main.py", INSTALL.replace("{seccomp}", str(number)).encode())
    assert run(runtime, box).stdout == "-1 EFAULT\n-1 EFAULT\n"
    result = run(runtime, box, seccomp=runtime.profile_add(str(path)))
    assert result.stdout == f"-1 EFAULT\n-1 {'ENOSYS' if refused_with == 38 else 'EPERM'}\n"


def test_a_profile_that_lets_the_program_do_nothing_ends_it_and_never_lets_it_run(runtime, box, tmp_path):
    path = tmp_path / "nothing.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [RULE]}))
    name = runtime.profile_add(str(path))
    with pytest.raises(HostError):
        run(runtime, box, seccomp=name)


# --- what is kept of it ---------------------------------------------------------------------------------------


def cached(runtime, digest):
    (path,) = pathlib.Path(runtime.paths.cache).glob(f"seccomp-{digest.removeprefix('sha256:')}.*.bpf")
    return path


def of_others(path, _lax):
    path.chmod(0o666)


def a_link(path, lax):
    path.unlink()
    path.symlink_to(lax)


def flipped(path, _lax):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path, _lax):
    path.write_bytes(path.read_bytes()[:40])


def empty(path, _lax):
    path.write_bytes(b"")


def of_another_profile(path, lax):
    path.write_bytes(lax.read_bytes())


ALTERATIONS = [of_others, a_link, flipped, cut_off, empty, of_another_profile]


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_a_compiled_profile_that_was_altered_is_not_installed(runtime, box, own, alter):
    name = runtime.profile_add(str(own))
    result = run(runtime, box, seccomp=name)
    assert result.stdout == "61\n"
    lax = cached(runtime, run(runtime, box).seccomp_digest)
    genuine = cached(runtime, result.seccomp_digest)
    content = genuine.read_bytes()
    alter(genuine, lax)
    with Runtime(runtime.paths) as another:
        assert run(another, box, seccomp=name).stdout == "61\n"
    assert genuine.read_bytes() == content
    assert (genuine.is_symlink(), genuine.stat().st_mode & 0o777) == (False, 0o600)
    assert lax.read_bytes() != content


def test_an_added_profile_that_was_altered_runs_nothing_and_can_be_added_again(runtime, box, own):
    name = runtime.profile_add(str(own))
    kept = pathlib.Path(runtime.paths.profiles, f"{name}.json")
    kept.write_bytes((PROFILES / "default.json").read_bytes())
    with pytest.raises(HostError, match="not what it was"):
        run(runtime, box, seccomp=name)
    assert runtime.profile_add(str(own)) == name
    assert run(runtime, box, seccomp=name).stdout == "61\n"


# --- strict ---------------------------------------------------------------------------------------------------

COMPUTING = """
import hashlib, json, multiprocessing, os, sqlite3, tempfile, threading, zlib
found = []
threads = [threading.Thread(target=lambda n=n: found.append(sum(range(n)))) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(found) == [sum(range(n)) for n in range(8)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, range(-50, 0)) == list(range(50, 0, -1))
base = sqlite3.connect("/workspace/base.sqlite")
base.execute("create table t (n)"); base.execute("insert into t values (7)"); base.commit()
with tempfile.TemporaryDirectory() as folder:
    os.mkdir(f"{folder}/one"); os.mkdir(f"{folder}/other"); open(f"{folder}/one/file", "w").close()
    os.rename(f"{folder}/one/file", f"{folder}/other/file")
digest = hashlib.sha256(zlib.decompress(zlib.compress(b"a" * 100000)))
print(digest.hexdigest()[:8], base.execute("select n from t").fetchone())
"""
REACHING_OUT = """
import ctypes, errno, os, socket, subprocess, sys
def tried(name, attempt):
    try:
        attempt()
        print(name, "went through")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
for family in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"):
    tried(family, lambda: socket.socket(getattr(socket, family), socket.SOCK_DGRAM))
tried("socketpair", socket.socketpair)
tried("memfd_create", lambda: os.memfd_create("program"))
def another():
    pid = os.fork()
    if pid == 0:
        try:
            os.execv("/bin/true", ["true"])
        except OSError as error:
            os._exit(error.errno)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "")
tried("another program", another)
open("/workspace/copy", "wb").write(open("/bin/true", "rb").read())
os.chmod("/workspace/copy", 0o755)
tried("a copy of one", lambda: os.execv("/workspace/copy", ["true"]))
tried("execveat", lambda: os.execve(os.open("/bin/true", os.O_RDONLY), ["true"], {}))
if len(sys.argv) == 1:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-c", "print('the interpreter itself')"])
"""


def test_a_program_that_computes_runs_under_strict(runtime, box):
    runtime.write(box, "main.py", COMPUTING.encode())
    assert (result := run(runtime, box, seccomp="strict")).stderr == ""
    assert result.stdout == "6d1cf22d (7,)\n"


def test_under_strict_there_is_no_socket_and_no_other_program(runtime, box, require):
    require("landlock", "what may be executed is Landlock's to say")
    runtime.write(box, "main.py", REACHING_OUT.encode())
    result = run(runtime, box, seccomp="strict")
    assert result.stdout.splitlines() == [
        *(f"{name} EPERM" for name in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "socketpair", "memfd_create")),
        *("another program EACCES", "a copy of one EACCES", "execveat EPERM", "the interpreter itself"),
    ]
    assert result.stderr == ""


def test_under_strict_a_script_takes_its_interpreter_along_and_a_missing_program_is_told(runtime, box, require):
    require("landlock", "what may be executed is Landlock's to say")
    runtime.write(box, "script", b"#!/bin/sh\necho $((6 * 7)); /bin/true || echo $?\n")
    runtime.exec(ExecRequest(sandbox=box, command=["chmod", "+x", "script"]))
    result = runtime.exec(ExecRequest(sandbox=box, filename="script", seccomp="strict"))
    assert result.stdout == "42\n126\n"
    for command, error in (("none", NotFoundError), ("/usr/bin/none", NotFoundError), ("/tmp", NotExecutableError)):
        with pytest.raises(error, match=command):
            runtime.exec(ExecRequest(sandbox=box, command=[command], seccomp="strict"))


# --- without Landlock -----------------------------------------------------------------------------------------

# As in a container around us whose filter knows no Landlock.
OUTER_FILTER = """
import errno, os, sys
import pyseccomp
outer = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
outer.add_rule(pyseccomp.ERRNO(int(sys.argv[1])), "landlock_create_ruleset")
outer.load()
os.execv(sys.executable, [sys.executable, "-m", "jhansi_runtime", *sys.argv[2:]])
"""


@pytest.fixture(params=["ENOSYS", "EPERM", "EOPNOTSUPP"])
def without_landlock(request, tmp_path):
    """`without_landlock(*words, **variables)` is jhansi-run on a host whose kernel says that of Landlock."""
    import errno

    environment = environment_with(tmp_path / "home")
    argv = [sys.executable, "-c", OUTER_FILTER, str(getattr(errno, request.param))]

    def jhansi(*words, **variables):
        return subprocess.run([*argv, *words], env=environment | variables, capture_output=True, text=True, check=False)

    return jhansi


def test_without_landlock_an_exec_goes_on_and_says_so(without_landlock, tmp_path):
    program = tmp_path / "main.py"
    program.write_text("print(open('/etc/hostname').read())")
    answer = without_landlock("run", "--json", "--rootfs", "host", program)
    assert (json.loads(answer.stdout)["landlock"], json.loads(answer.stdout)["exit_code"]) == (0, 0)
    checks = {check["name"]: check for check in json.loads(without_landlock("doctor", "--json").stdout)}
    assert not checks["landlock"]["ok"]
    assert "lsm=" in checks["landlock"]["remedy"]
    assert checks["seccomp"]["ok"]


def test_without_landlock_what_depends_on_it_is_refused(without_landlock, tmp_path):
    program = tmp_path / "main.py"
    program.write_text("print('ran')")
    for words, variables in ((["--seccomp=strict"], {}), ([], {"JHANSI_REQUIRE": "landlock"})):
        answer = without_landlock("run", "--rootfs", "host", *words, program, **variables)
        assert (answer.returncode, answer.stdout) == (125, "")
        assert "Landlock" in answer.stderr
        assert "lsm=" in answer.stderr
