"""What a file sees in a slot of a zygote is what `python FILE` gives it.

Each row of the table is a program, run twice with the same workspace and request: by an interpreter that is started for
it (a cold slot), and by one that has waited for it (a slot of a zygote). Status, exit code, signal, message, stdout and
stderr have to be the same, byte for byte. So the table says little of what a program prints: the bare interpreter says
that. It says how it ends, lest two programs that fail alike pass for two that ran.

What differs, and why that is accepted:

- Addresses in memory, /proc/self/maps, and the seed of str's hash: the slots of a zygote share its own, for they are
  forks of it. `zygotes = false` in the settings file's [pool] gives every exec its own (tests below).
- In /proc/self/stat the flag PF_FORKNOEXEC and the times of the start; in /proc/self/auxv the name that was executed,
  which is the zygote's own command. The kernel has no call that would set these.
- sys.path in a further interpreter of the program's own (_xxsubinterpreters), which has two entries that lead nowhere;
  which codecs were looked up already (encodings._cache); the order of sys.modules.
- What the allocator and the collector count: sys.getallocatedblocks, the collections in gc.get_stats.
- The collector passes over what was there before the program (gc.get_freeze_count, gc.get_objects, gc.get_referrers):
  looking at it would copy it, page by page, at the end of each program. What is held by a module that was there already,
  and by nothing else, is not finalized at that end.
- Which CPU it runs on, and how much CPU time its start has taken: a part of that was the zygote's.
"""

# A program of the table is one line, or few.
# ruff: noqa: E501

import os
import re
import signal
import time
from base64 import b64decode
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes

MIB = 1 << 20
WITHIN_SECONDS = 120
# In an emulated machine (tools/vm) all takes ten times as long.
PATIENCE = MappingProxyType({"timeout": 300, "cpu_time": 300})
ADDRESS = re.compile(rb"0x[0-9a-f]{6,}")


class End(NamedTuple):
    """How an exec ends: three fields of its ExecResult."""

    status: str
    exit_code: int | None
    signal: str | None


class Row(NamedTuple):
    """A program in the file `name`, with all that it is given, and its end.

    errors: it writes to stderr, which no other row does. files are others of the workspace, by path. before is a
    program that a bare interpreter runs first, to put something into the workspace.
    """

    what: str
    source: str | bytes
    end: End = End("exited", 0, None)
    errors: bool = False
    name: bytes = b"main.py"
    args: tuple[bytes, ...] = ()
    env: Mapping[str, str] = MappingProxyType({})
    stdin: bytes = b""
    limits: Mapping[str, float] = MappingProxyType({})
    files: Mapping[str, str | bytes] = MappingProxyType({})
    before: str = ""


def exits(code):
    return End("exited", code, None)


def dies(number):
    return End("signaled", None, number.name)


FAILS = {"end": exits(1), "errors": True}


# --- the program, its names and its modules ---------------------------------------------------------------------

MAIN = [
    Row("nothing at all", ""),
    Row("one line without its end", 'print("one")'),
    Row(
        "what a module knows of itself",
        """
print(__name__, __file__, __spec__, __doc__, __package__, __cached__ if "__cached__" in globals() else None)
print(type(__loader__).__name__, getattr(__loader__, "path", None), getattr(__loader__, "name", None))
print(__builtins__, list(globals()))
""",
    ),
    Row("its doc string", '"""Says so."""\nprint(__doc__, __annotations__ if "__annotations__" in globals() else None)'),
    Row("annotations", "x: int = 1\nprint(__annotations__)"),
    Row("a future import", "from __future__ import annotations\ny: nothing = 1\nprint(__annotations__)"),
    Row("sys.argv", "import sys; print(sys.argv, sys.orig_argv)"),
    Row(
        "arguments of every kind",
        "import os, sys; print([os.fsencode(word) for word in sys.argv], sys.orig_argv)",
        args=(b"", b" ", b"a b", b"--help", b"-c", b"-m", b"line\nline", "ü€𝄞".encode(), b"\xff\xfe", b"-", b"'\"$HOME"),
    ),
    Row(
        "a long command line",
        "import sys, hashlib; print(len(sys.argv), hashlib.sha256(repr(sys.argv).encode()).hexdigest())\n"
        "print(len(open('/proc/self/cmdline', 'rb').read()))",
        args=tuple(b"%d" % number * 20 for number in range(3000)),
    ),
    Row("sys.path", "import sys; print(sys.path)"),
    Row("the path is a list of its own", "import sys; sys.path.append('/x'); print(sys.path, type(sys.path))"),
    Row("a file in a folder", "import sys, os; print(sys.path[0], __file__, os.getcwd())", name=b"a/b/main.py"),
    Row(
        "a file with a space, a quote and a line's end in its name",
        "import sys; print([__file__, sys.argv, sys.path[0], sys.orig_argv]); 1 / 0",
        name=b"a \"b'\n/c d.py",
        **FAILS,
    ),
    Row(
        "a file with a name that is not ASCII",
        "import sys; print(ascii([__file__, sys.argv, sys.path[0], sys.orig_argv])); 1 / 0",
        name="größe/日本語 🐍.py".encode(),
        **FAILS,
    ),
    Row(
        "a file with a name that is not UTF-8",
        "import sys; print(ascii([__file__, sys.argv, sys.path[0]])); print(open('/proc/self/cmdline', 'rb').read())\n"
        "1 / 0",
        name=b"\xff\xfe/\x80.py",
        **FAILS,
    ),
    Row("a file with a leading dash", "import sys; print(__file__, sys.argv)", name=b"-c.py", args=(b"-x",)),
    Row("a file with a leading dot", "import sys; print(__file__, sys.argv)", name=b".hidden.py"),
    Row("a file without an extension", "import sys; print(__file__, sys.argv)", name=b"program"),
    Row("a file without an extension, in a folder", "import sys; print(__file__, sys.path[0])", name=b"bin/program"),
    Row("a file with the extension of a window's", "import sys; print(__file__, sys.argv)", name=b"main.pyw"),
    Row(
        "a file that is a link to another folder's",
        b"",
        name=b"link.py",
        files={"lib/real.py": "import sys, os; print(__file__, sys.path[0]); import beside", "lib/beside.py": "print(1)"},
        before="import os; os.remove('link.py'); os.symlink('lib/real.py', 'link.py')",
    ),
    Row(
        "a file in a folder that is a link",
        b"",
        name=b"way/main.py",
        before="import os, shutil; shutil.rmtree('way'); os.mkdir('real'); os.symlink('real', 'way')\n"
        "open('real/main.py', 'w').write('import sys; print(__file__, sys.path[0], sys.argv)')",
    ),
    Row(
        "a byte code file",
        b"",
        name=b"main.pyc",
        files={"source.py": "print(__name__, __file__, __spec__, __loader__.__class__.__name__, __cached__)\n1 / 0"},
        before="import py_compile; py_compile.compile('source.py', 'main.pyc')",
        **FAILS,
    ),
    Row(
        "a byte code file of another version",
        b"\x00\x01\r\n" + b"\0" * 40,
        name=b"main.pyc",
        **FAILS,
    ),
    Row(
        "a zip application",
        b"",
        name=b"main.pyz",
        files={
            "app/__main__.py": "import sys, part\n"
            "print(__name__, __file__, __spec__.name, __package__, sys.path[0], sys.argv, __loader__.archive)\n"
            "print(sys.modules['__main__'] is sys.modules[__name__], list(sys.path_importer_cache)[:2])",
            "app/part.py": "print(__name__, __file__)",
        },
        before="import zipapp; zipapp.create_archive('app', 'main.pyz')",
        args=(b"a", b"b"),
    ),
    Row("a zip application that is none", b"PK no", name=b"main.pyz", **FAILS),
    Row("a mark of byte order at the front", b"\xef\xbb\xbfprint('marked', __file__)\n"),
    Row("a coding cookie", "# -*- coding: latin-1 -*-\nprint(ascii('ä'), 'ß')\n".encode("latin-1")),
    Row("a coding cookie that is unknown", "# -*- coding: nonsense -*-\nprint(1)\n", **FAILS),
    Row("bytes that are not UTF-8", b"print('\xe4')\n", **FAILS),
    Row("lines that end in a carriage return, too", b"print(1)\r\nif True:\r\n    print('''a\r\nb''')\r\n"),
    Row("tabs and form feeds", b"\x0cif 1:\n\tprint('tab')\n\x0c\nprint(2)\n"),
    Row("a first line for the shell", "#!/usr/bin/env nonsense\nprint(__file__)\n"),
    Row("a long file", "x = 1\n" * 20_000 + "print(x)"),
    Row("a long line", "print(len('" + "y" * 200_000 + "'))"),
    Row("names of the interpreter", "import sys; print(sys.executable, sys.prefix, sys.exec_prefix, sys.version)"),
    Row(
        "what sys says of the interpreter",
        """
import sys
print(sys.flags, sys.warnoptions, sys._xoptions, sys.dont_write_bytecode, sys.pycache_prefix, sys.platlibdir)
print(sys.implementation, sys.api_version, sys.hexversion, sys.byteorder, sys.base_prefix, sys._framework)
print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), sys.is_finalizing())
print(sys.getdefaultencoding(), sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
print(sys.get_asyncgen_hooks(), sys.get_coroutine_origin_tracking_depth(), sys.float_repr_style, sys.maxunicode)
print(sys.excepthook, sys.displayhook, sys.unraisablehook, sys.breakpointhook, hasattr(sys, "ps1"))
print(sys.exc_info(), sys.exception() if hasattr(sys, "exception") else None, hasattr(sys, "last_value"))
print(sys.thread_info, sys.hash_info, sys.int_info, sys.getdlopenflags(), sys.stdlib_module_names == set())
print(sys.builtin_module_names, sys.meta_path, [hook for hook in map(str, sys.path_hooks)])
""",
    ),
    Row("what sys has", "import sys; print(sorted(vars(sys)))"),
    Row("what builtins has", "import builtins; print(sorted(vars(builtins)))"),
    Row("which modules are loaded, in their order", "import sys; print(list(sys.modules))"),
    Row("the cache of importers", "import sys; print(list(sys.path_importer_cache))"),
    Row(
        "the importers themselves",
        "import sys; print([(type(importer).__name__, str(importer)) for importer in sys.path_importer_cache.values()"
        " if importer is not None])",
    ),
    Row(
        "no module of ours is to be had",
        """
import importlib.util
print([importlib.util.find_spec(name) for name in ("jhansi_runtime", "prctl", "pyseccomp", "msgspec")])
import sitecustomize
""",
        end=exits(1),
        errors=True,
    ),
    Row(
        "site",
        "import site, sys; print(site.ENABLE_USER_SITE, site.getusersitepackages(), site.getsitepackages())\n"
        "print([name for name in ('sitecustomize', 'usercustomize') if name in sys.modules], site.PREFIXES)",
    ),
    Row(
        "each module that is loaded is the one that an import gives",
        "import sys, importlib\n"
        "print([name for name in sys.modules if importlib.import_module(name) is not sys.modules[name]])\n"
        "import os, io, signal, ctypes, errno, gc, socket, resource\n"
        "print(os.path.__name__, io.open is open, signal.SIGINT, errno.EPERM)",
    ),
    Row("a module beside it", "import beside; print(beside.__file__)", files={"beside.py": "print(__name__)"}),
    Row(
        "a package beside it",
        "import package.part, package; print(package.__path__, package.part.__file__, package.part.value)",
        files={"package/__init__.py": "", "package/part.py": "from . import other\nvalue = other.value",
               "package/other.py": "value = 7"},
    ),
    Row(
        "a package without an __init__",
        "import space.part; print(list(space.__path__), space.part.__spec__.name)",
        files={"space/part.py": ""},
    ),
    Row("a module that is not there", "import nowhere", **FAILS),
    Row(
        "modules beside it with the names of the library's",
        "import json, random, prctl, sitecustomize; print(json.mine, random.mine, prctl.mine, sitecustomize.mine)",
        files={"json.py": "mine = 1", "random.py": "mine = 2", "prctl.py": "mine = 3", "sitecustomize.py": "mine = 4"},
    ),
    Row(
        "modules beside it with the names of ours and of what we use",
        "import jhansi_runtime, ctypes, signal, warnings; print(jhansi_runtime.mine, ctypes.mine, signal.mine)\n"
        "print(warnings.__file__)",
        files={f"{name}.py": "mine = 1" for name in ("jhansi_runtime", "ctypes", "signal", "warnings")},
    ),
    Row("byte code is kept beside a module", "import beside, os; print(sorted(os.listdir('__pycache__')))",
        files={"beside.py": ""}),
    Row("itself, as a module", "import main; print(__name__, main.__name__)\nif __name__ == '__main__': print('top')"),
    Row("__main__ as a module", "import __main__, sys; value = 5; print(__main__.value, __main__ is sys.modules[__name__])"),
    Row(
        "runpy",
        "import runpy, sys; print(sorted(runpy.run_path('other.py', run_name='__main__'))); print(sys.argv)\n"
        "runpy.run_module('other', run_name='there', alter_sys=True)",
        files={"other.py": "import sys; print(__name__, sys.argv, __file__)"},
    ),
    Row("a module loaded again", "import importlib, json, beside; importlib.reload(json); importlib.reload(beside)",
        files={"beside.py": "print('again', __name__)"}),
    Row("a module taken out of sys.modules", "import sys; del sys.modules['os']; import os; print(os.getcwd(), os.sep)"),
    Row("what of it is in its own frame", "import sys; f = sys._getframe(); print(f.f_back, f.f_code.co_name, f.f_lineno,"
        " f.f_globals is globals(), f.f_locals is globals(), f.f_code.co_filename, f.f_builtins is __builtins__.__dict__)"),
    Row("its source", "import inspect, sys, linecache\ndef f():\n    return 1\nprint(inspect.getsource(f))\n"
        "print(inspect.getsource(sys.modules['__main__'])[:9], inspect.getsourcefile(f), linecache.getline(__file__, 2))"),
    Row("interpreters of its own", "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', 'import sys; print(sys.argv, sys.path, sys.flags, list(sys.modules))'],"
        " capture_output=True, text=True))"),
    Row("executing itself", "import os, sys\nprint(sys.argv, flush=True)\n"
        "if len(sys.argv) < 3: os.execv(sys.executable, [*sys.orig_argv, 'more'])", args=(b"one",)),
    Row("executing another program", "import os; os.execvp('echo', ['echo', 'instead'])"),
]  # fmt: skip


# --- the process ------------------------------------------------------------------------------------------------

STATUS = [
    "Name",
    "Umask",
    "State",
    "Tgid",
    "Ngid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "Kthread",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "CoreDumping",
    "THP_enabled",
    "untag_mask",
    "Speculation_Store_Bypass",
    "SpeculationIndirectBranch",
    "Mems_allowed_list",
]

PROCESS = [
    Row("the command line", "print(open('/proc/self/cmdline', 'rb').read())", args=(b"", b"a b", b"\xff", b"-")),
    Row("the environment as it was at the start",
        "import os; os.environ['NEW'] = '1'; print(open('/proc/self/environ', 'rb').read())", env={"A": "b c", "E": ""}),
    Row("its name", "print(repr(open('/proc/self/comm').read()), repr(open('/proc/self/task/1/comm').read())"
        " if 0 else '')\nimport os; print(os.readlink('/proc/self/exe'), os.readlink('/proc/self/cwd'),"
        " os.readlink('/proc/self/root'))"),
    Row("its status", f"NAMES = {STATUS!r}\nlines = dict(l.rstrip().split(':', 1) for l in open('/proc/self/status'))\n"
        "print([(n, lines.get(n)) for n in NAMES])"),
    Row("which lines its status has", "print([l.split(':')[0] for l in open('/proc/self/status')])"),
    Row("its limits", "print(open('/proc/self/limits').read())"),
    Row("its limits as it is told them", "import resource as r\n"
        "print([(n, r.getrlimit(getattr(r, n))) for n in sorted(dir(r)) if n.startswith('RLIMIT')])",
        limits={"nofile": 100, "file_size": MIB, "pids": 50, "cpu_time": 77}),
    Row("flags of its descriptors", "import fcntl, os\nprint([(hex(fcntl.fcntl(n, fcntl.F_GETFL)),"
        " fcntl.fcntl(n, fcntl.F_GETFD), os.get_blocking(n), os.get_inheritable(n)) for n in range(3)])"),
    Row("its ids", "import os; print(os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0), os.getresuid(), os.getresgid(),"
        " os.getgroups(), os.getlogin() if 0 else '')"),
    Row("its working directory and umask", "import os; print(os.getcwd(), oct(os.umask(0))); open('f', 'w').close()\n"
        "os.mkdir('d'); print(oct(os.stat('f').st_mode), oct(os.stat('d').st_mode), os.stat('f').st_uid)"),
    Row("its place in /proc", "import os; print(sorted(n for n in os.listdir('/proc') if n.isdigit()),"
        " os.listdir('/proc/self/task') == [str(os.getpid())])"),
    Row("other files of its /proc", "import os\nfor n in ('oom_score_adj', 'loginuid', 'timerslack_ns', 'coredump_filter',"
        " 'personality', 'setgroups', 'uid_map', 'gid_map', 'projid_map', 'wchan', 'sessionid', 'timers', 'patch_state'):\n"
        "    try: print(n, open(f'/proc/self/{n}').read())\n    except OSError as error: print(n, error)"),
    Row("its cgroup and what is mounted", "print(len(open('/proc/self/cgroup').read().splitlines()))\n"
        "for l in open('/proc/self/mountinfo'):\n    w = l.split(); i = w.index('-')\n    print(w[4], w[5], w[i + 1], w[i + 3:]"
        " if w[i + 1] not in ('ext4', 'overlay', 'fuse', 'xfs', 'btrfs') else '')"),
    Row("what prctl tells", "import ctypes\nlibc = ctypes.CDLL(None)\nv = ctypes.c_int(-1)\n"
        "print([libc.prctl(n, 0, 0, 0, 0) for n in (3, 7, 21, 23, 27, 30, 34, 39, 42)], libc.prctl(2, ctypes.byref(v)), v,"
        " libc.prctl(37, ctypes.byref(v)), v)"),
    Row("how it is scheduled", "import os; print(os.sched_getscheduler(0), os.nice(0), os.getpriority(os.PRIO_PROCESS, 0),"
        " len(os.sched_getaffinity(0)), os.cpu_count(), os.sched_getparam(0))"),
    Row("children and their time", "import os, resource; print(os.times()[2:4], resource.getrusage(resource.RUSAGE_CHILDREN))\n"
        "try: os.wait()\nexcept ChildProcessError as error: print(error)"),
    Row("its own time is its own", "import time, resource; print(time.process_time() < 60, time.thread_time() < 60)"),
    Row("its timers", "import signal; print([signal.getitimer(n) for n in range(3)], signal.alarm(0))"),
    Row("files of /proc that nobody else may read", "import os\nfor n in ('mem', 'maps', 'environ', 'auxv', 'pagemap', 'io',"
        " 'stack', 'syscall', 'map_files', 'clear_refs'):\n    try:\n        os.close(os.open(f'/proc/self/{n}', os.O_RDONLY));"
        " print(n, 'opens')\n    except OSError as error: print(n, error)"),
    Row("the owner of its files in /proc", "import os; print([os.stat(f'/proc/self/{n}').st_uid for n in ('mem', 'fd', 'environ')])"),
    Row("init, as it sees it", "import os\nfor n in ('cmdline', 'environ', 'exe', 'fd', 'maps', 'root', 'cwd', 'status'):\n"
        "    try: print(n, os.readlink(f'/proc/1/{n}') if n in ('exe', 'root', 'cwd') else os.listdir('/proc/1/fd') if n == 'fd'"
        " else len(open(f'/proc/1/{n}').read()) and '')\n    except OSError as error: print(error)"),
    Row("the session's keyring", "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.syscall(250, 0, -3, 0, 0, 0), ctypes.get_errno())"),
    Row("memory it has locked, and mapped with rights to execute", "print([l.split()[0] for l in open('/proc/self/status')"
        " if l.startswith('VmLck')], sorted({l.split()[1] for l in open('/proc/self/maps')} & {'rwxp', 'rwxs'}))"),
    Row("which libraries are loaded", "print(sorted({l.split()[5] for l in open('/proc/self/maps') if '/' in l and"
        " 'python3' in l and '.so' not in l}))"),
    Row("os.environ", "import os; print(list(os.environ.items()), os.environb.keys() == {k.encode() for k in os.environ},"
        " os.getenv('HOME'))"),
    Row("os.environ with the request's", "import os; print(list(os.environ.items()))",
        env={"A": "1", "ZYGOTE": "ü", "A_LONG_ONE": "x" * 9999, "B": "", "JHANSI_PRELOAD": "json", "with space": "="}),
    Row("os.environ with bytes", "import os; print(os.environb)", env={"RAW": os.fsdecode(b"\xff\x80")}),
    Row("the environment of C", "import ctypes, os; libc = ctypes.CDLL(None); libc.getenv.restype = ctypes.c_char_p\n"
        "print([libc.getenv(n) for n in (b'A', b'PATH', b'HOME', b'LANG', b'PYTHONPATH', b'JHANSI_PRELOAD')])\n"
        "os.environ['A'] = '2'; print(libc.getenv(b'A')); del os.environ['A']; print(libc.getenv(b'A'))",
        env={"A": "1"}),
    Row("the environment of a child", "import os, subprocess; os.environ['NEW'] = '1'\n"
        "print(subprocess.run(['env'], capture_output=True).stdout)", env={"A": "1"}),
    Row("a child of its own", "import os\npid = os.fork()\nif pid == 0:\n    os._exit(7)\nprint(os.waitpid(pid, 0)[1], pid)"),
    Row("at-fork handlers", "import os; os.register_at_fork(before=lambda: print('before'), after_in_parent=lambda:"
        " print('parent'))\nif os.fork() == 0: os._exit(0)\nos.wait()"),
    Row("a child that runs to its end", "import os, sys, atexit\natexit.register(lambda: print('bye', os.getppid() == 1))\n"
        "if os.fork(): os.wait()"),
    Row("a child that outlives it", "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint('left', flush=True)"),
    Row("its process group killed", "import os, signal; os.killpg(0, signal.SIGKILL)", end=dies(signal.SIGKILL)),
]  # fmt: skip


# --- streams ----------------------------------------------------------------------------------------------------

STREAMS = [
    Row("what the streams are", """
import sys
for name in ("stdin", "stdout", "stderr"):
    s, k = getattr(sys, name), getattr(sys, f"__{name}__")
    print(s is k, s, s.encoding, s.errors, s.newlines, s.line_buffering, s.write_through, s.mode, s.name, s.fileno(),
          s.isatty(), s.buffer, s.buffer.raw, s.buffer.raw.mode, s.buffer.raw.closefd, s.buffer.raw.name, s.readable(),
          s.writable(), s.seekable(), s.closed, type(s.buffer).__name__, sorted(vars(s)), s._CHUNK_SIZE)
""", errors=False),
    Row("print", "print('a', 1, sep='-', end='|'); print(); print('ü€𝄞')"),
    Row("big output", "for n in range(20000): print(n, 'x' * 30)", limits={"output": 4 * MIB}),
    Row("both streams", "import sys\nfor n in range(50): print(n); print(n, file=sys.stderr)", errors=True),
    Row("what was not flushed is lost", "import os; print('lost', end=''); os._exit(3)", end=exits(3)),
    Row("what was not flushed is written at the end", "print('kept', end='')"),
    Row("what was not flushed is written twice by a fork", "import os; print('twice', end='')\nif os.fork(): os.wait()"),
    Row("stdout closed", "import sys; print('a'); sys.stdout.close(); print('b')", **FAILS),
    Row("stdout's descriptor closed", "import os; os.close(1); print('a')", end=exits(120), errors=True),
    Row("stdout and stderr closed", "import os; os.close(2); os.close(1); print('a')", end=exits(120)),
    Row("stdin closed", "import os; os.close(0); input()", **FAILS),
    Row("stdout replaced", "import io, sys; sys.stdout = io.StringIO(); print('a'); sys.__stdout__.write(sys.stdout.getvalue())"),
    Row("stdout set up anew", "import sys; sys.stdout.reconfigure(encoding='latin-1', newline='\\r\\n'); print('ä')"),
    Row("bytes", "import sys; sys.stdout.buffer.write(bytes(range(256)))"),
    Row("text that cannot be encoded", "print('\\udcff\\ud800')", **FAILS),
    Row("text that cannot be encoded, on stderr", "import sys; print('\\udcff\\ud800', file=sys.stderr)", errors=True),
    Row("writing past a pipe that is closed", "import os; r, w = os.pipe(); os.close(r)\nos.write(w, b'a')", **FAILS),
    Row("input", "print(repr(input()), repr(input('prompt ')), repr(input()))", stdin=b"one\ntwo\r\nthree"),
    Row("input at the end", "print(repr(input())); input()", stdin=b"one\n", **FAILS),
    Row("no input", "import sys; print(repr(sys.stdin.read())); input()", **FAILS),
    Row("stdin as text", "import sys; print([l for l in sys.stdin], sys.stdin.read())", stdin="a\r\nü\rb\n".encode()),
    Row("stdin as bytes", "import sys; print(sys.stdin.buffer.read())", stdin=bytes(range(256))),
    Row("stdin that is not UTF-8", "import sys; print(ascii(sys.stdin.read()))", stdin=b"a\xff\xfe\n"),
    Row("much of stdin", "import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())", stdin=b"ab\0" * 999_999),
    Row("stdin that nobody reads", "print('ok')", stdin=b"x" * 300_000),
    Row("stdin by descriptor", "import os; print(os.read(0, 3), open(0, closefd=False).read())", stdin=b"abcdef"),
    Row("stdin by its device", "print(open('/dev/stdin').read())", stdin=b"abc"),
    Row("stdout by its device", "open('/dev/stdout', 'w').write('written'); open('/dev/fd/1', 'w').write(' twice')"),
    Row("fileinput", "import fileinput; print([l for l in fileinput.input()])", stdin=b"a\nb\n"),
    Row("a child's streams", "import subprocess, sys\nprint('first', flush=True); subprocess.run(['cat'])\n"
        "subprocess.run(['sh', '-c', 'echo err >&2'])", stdin=b"through\n", errors=True),
    Row("encodings", """
import locale, sys, os, time
print(locale.getpreferredencoding(), locale.getlocale(), locale.setlocale(locale.LC_ALL), locale.getencoding())
print(open("f", "w").encoding, sys.flags.utf8_mode, os.device_encoding(1), time.tzname, locale.localeconv())
print(locale.setlocale(locale.LC_ALL, ""), [locale.setlocale(n) for n in range(6)])
"""),
    Row("the time of day's zone", "import time; print(time.tzname, time.timezone, time.strftime('%Z', time.gmtime(0)),"
        " time.localtime(0))"),
]  # fmt: skip


# --- what goes wrong, and how it ends ---------------------------------------------------------------------------

ENDS = [
    Row("an exception", "def f():\n    g()\ndef g():\n    raise ValueError('no')\nf()", **FAILS),
    Row("an exception with a note and a group", "e = ValueError('no'); e.add_note('note')\n"
        "raise ExceptionGroup('several', [e, TypeError('other')])", **FAILS),
    Row("a chain of exceptions", "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('k') from error", **FAILS),
    Row("an exception in the handling of another", "try:\n    1 / 0\nexcept ZeroDivisionError:\n    None.x", **FAILS),
    Row("a syntax error", "print(1)\nif True print(2)\n", **FAILS),
    Row("an indentation error", "if True:\nprint(2)\n", **FAILS),
    Row("a syntax error of a module", "import beside", files={"beside.py": "def ("}, **FAILS),
    Row("an exception of a module", "import beside", files={"beside.py": "1 / 0"}, **FAILS),
    Row("an exception in a thread", "import threading\nt = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()", errors=True),
    Row("an exception at the exit", "import atexit; atexit.register(lambda: 1 / 0)", errors=True),
    Row("an exception that nobody can catch", "class A:\n    def __del__(self): 1 / 0\na = A(); del a", errors=True),
    Row("a recursion without end", "def f(): f()\nf()", **FAILS),
    Row("how deep a recursion goes", "def f(n):\n    try: return f(n + 1)\n    except RecursionError: return n\nprint(f(0))"),
    Row("a deeper recursion", "import sys; sys.setrecursionlimit(20000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(15000))"),
    Row("a recursion of C's, caught", "x = []\nfor _ in range(100000): x = [x]\ntry: repr(x)\nexcept RecursionError: print('deep')"),
    Row("a big stack of a thread's", "import threading; threading.stack_size(64 << 20)\nimport sys; sys.setrecursionlimit(10 ** 5)\n"
        "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(30000))); t.start(); t.join()"),
    Row("sys.excepthook", "import sys, traceback\n"
        "def hook(kind, error, tb):\n    print(kind.__name__, error, [f.filename for f in traceback.extract_tb(tb)])\n"
        "sys.excepthook = hook\n1 / 0", end=exits(1)),
    Row("the stack", "import traceback, inspect\ntraceback.print_stack(); print(len(inspect.stack()), inspect.stack()[0][1:4])", errors=True),
    Row("the stack, by faulthandler", "import faulthandler; print(faulthandler.is_enabled(), flush=True)\nfaulthandler.dump_traceback()",
        errors=True),
    Row("a traceback through exec and eval", "exec(compile('1 / 0', '<made>', 'exec'))", **FAILS),
    Row("the last exception", "import sys\ntry: 1 / 0\nexcept ZeroDivisionError: pass\nprint(sys.exc_info(), hasattr(sys, 'last_exc'))"),
    Row("an exception's context is nobody else's", "raise ValueError().with_traceback(None)", **FAILS),
    *(Row(f"sys.exit({value})", f"import sys; sys.exit({value})", end=exits(code), errors=errors) for value, code, errors in (
        ("", 0, False), ("0", 0, False), ("3", 3, False), ("255", 255, False), ("256", 0, False), ("-1", 255, False),
        ("None", 0, False), ("True", 1, False), ("'said'", 1, True), ("2 ** 70", 255, False), ("(1, 2)", 1, True),
        ("1.5", 1, True), ("b'x'", 1, True), ("{}", 1, True),
    )),
    Row("SystemExit raised", "raise SystemExit(4)", end=exits(4)),
    Row("SystemExit in a thread", "import threading, sys\nt = threading.Thread(target=sys.exit, args=(5,)); t.start(); t.join()"),
    Row("SystemExit caught", "import sys\ntry: sys.exit(5)\nexcept SystemExit as e: print(e.code)"),
    Row("quit", "quit(6)", end=exits(6)),
    Row("quit with stdin open", "import sys\ntry: exit()\nfinally: print(sys.stdin.closed)", stdin=b"abc"),
    Row("os._exit", "import os; os._exit(9)", end=exits(9)),
    Row("abort", "import os; os.abort()", end=dies(signal.SIGABRT)),
    Row("abort with faulthandler", "import faulthandler, os; faulthandler.enable(); os.abort()", end=dies(signal.SIGABRT), errors=True),
    Row("a fault", "import ctypes; ctypes.string_at(0)", end=dies(signal.SIGSEGV)),
    Row("a fault with faulthandler", "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)",
        end=dies(signal.SIGSEGV), errors=True),
    Row("atexit, in its order", "import atexit\nfor n in range(4): atexit.register(print, n)\nprint('main')"),
    Row("nothing was registered at the exit", "import atexit; print(atexit._ncallbacks())"),
    Row("atexit after sys.exit", "import atexit, sys; atexit.register(print, 'end'); sys.exit(2)", end=exits(2)),
    Row("finalizers at the end", "class A:\n    def __del__(self): print('gone', __name__)\na = A(); b = [A()]; b.append(b)"),
    Row("weak references and finalize", "import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'finalized')"),
    Row("a thread that goes on at the end", "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()"),
    Row("a daemon thread at the end", "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()"),
    *(Row(f"ended by {number.name}", f"import os; os.kill(os.getpid(), {int(number)})\nimport time; time.sleep(60)", end=dies(number))
      for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT)),
    Row("an interrupt", "import os, signal; os.kill(os.getpid(), signal.SIGINT)\nprint('not here')",
        end=dies(signal.SIGINT), errors=True),
    Row("an interrupt caught", "import os, signal\ntry: os.kill(os.getpid(), 2); print('no')\nexcept KeyboardInterrupt: print('caught')"),
    Row("what becomes of each signal", "import signal\nprint([(int(n), signal.getsignal(n)) for n in sorted(signal.valid_signals())])\n"
        "print(signal.pthread_sigmask(0, []), signal.sigpending(), signal.set_wakeup_fd(-1))"),
    Row("what becomes of each signal in a child", "import subprocess, sys\n"
        "print(subprocess.run(['grep', 'Sig', '/proc/self/status'], capture_output=True).stdout)\n"
        "print(subprocess.run(['grep', 'Sig', '/proc/self/status'], capture_output=True, restore_signals=False).stdout)"),
    Row("a handler", "import os, signal\nsignal.signal(signal.SIGUSR1, lambda n, f: print(n, f.f_code.co_name))\nos.kill(os.getpid(), 10)"),
    Row("a child's end", "import os, signal\nsignal.signal(signal.SIGCHLD, lambda n, f: print('child'))\nif os.fork() == 0: os._exit(0)\n"
        "os.waitpid(-1, 0)"),
    Row("an alarm", "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: print('rang'))\nsignal.setitimer(0, 0.05); time.sleep(0.3)"),
    Row("SIGPIPE with its default", "import os, signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\nr, w = os.pipe(); os.close(r); os.write(w, b'a')",
        end=dies(signal.SIGPIPE)),
    Row("a file grown too large", "import os; f = os.open('f', 65); os.write(f, b'x' * 5000); os.write(f, b'y')", limits={"file_size": 5000}, **FAILS),
    Row("too many open files", "import os\nk = []\ntry:\n    while True: k.append(os.dup(0))\nexcept OSError as e: print(len(k), e)", limits={"nofile": 40}),
    Row("too many processes", "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(600)\n        n += 1\n"
        "except OSError as e: print(n, e)", limits={"pids": 10}),
    Row("too much memory at once", "x = bytearray(1 << 46)", **FAILS),
    Row("too much memory", "k = []\nwhile True: k.append(bytearray(b'x' * (8 << 20)))", end=End("oom_killed", None, "SIGKILL"), limits={"memory": 96 * MIB}),
    Row("too much CPU time", "while True: pass", end=End("cpu_time_exceeded", None, "SIGXCPU"), limits={"cpu_time": 1}),
    Row("too much time", "import time; time.sleep(600)", end=End("timed_out", None, "SIGKILL"), limits={"timeout": 0.3}),
    Row("too much output", "import sys, time\nwhile sys.stdout.write('x' * 1000): pass", end=End("output_limit", None, "SIGKILL"), limits={"output": 5000}),
    Row("too much in /tmp", "open('/tmp/f', 'wb').write(bytes(2 << 20))", limits={"tmp": MIB}, **FAILS),
]  # fmt: skip


# --- the library ------------------------------------------------------------------------------------------------

LIBRARY = [
    Row("threads", """
import threading, os, _thread
m = threading.main_thread()
print(m is threading.current_thread(), m.name, m.native_id == os.getpid(), m.ident == _thread.get_ident(), m.daemon)
print(threading.active_count(), threading.enumerate() == [m], threading.stack_size(), threading.excepthook.__name__)
names = []
ts = [threading.Thread(target=lambda: names.append(threading.current_thread().name)) for _ in range(5)]
[t.start() for t in ts]; [t.join() for t in ts]
print(sorted(names))
"""),
    Row("a pool of threads", "from concurrent.futures import ThreadPoolExecutor as E\nwith E(4) as e: print(list(e.map(abs, range(-5, 0))))"),
    *(Row(f"multiprocessing by {how}", f"""
import multiprocessing as mp
class Point:
    def __init__(self, x): self.x = x
def double(p): return Point(p.x * 2), __name__, mp.parent_process() is not None
if __name__ == "__main__":
    print(mp.get_start_method(allow_none=True), mp.current_process().name, mp.parent_process())
    with mp.get_context({how!r}).Pool(2) as pool:
        r = pool.map(double, [Point(1), Point(2)])
    print([(p.x, type(p) is Point, n, c) for p, n, c in r])
""", limits={"memory": 512 * MIB}) for how in ("fork", "spawn", "forkserver")),
    Row("a pool of processes", "from concurrent.futures import ProcessPoolExecutor as E\nimport multiprocessing\n"
        "def f(n): return n * n\nif __name__ == '__main__':\n    with E(2, multiprocessing.get_context('fork')) as e: print(list(e.map(f, range(5))))"),
    Row("shared memory and queues", "from multiprocessing import shared_memory, Queue, Process, Value\n"
        "def f(q, v): v.value += 1; q.put('there')\n"
        "if __name__ == '__main__':\n    m = shared_memory.SharedMemory(create=True, size=10); m.buf[0] = 7; print(m.buf[0]); m.close(); m.unlink()\n"
        "    import multiprocessing as mp; c = mp.get_context('fork'); q, v = c.Queue(), c.Value('i', 1)\n"
        "    p = c.Process(target=f, args=(q, v)); p.start(); print(q.get(), p.join(), v.value, p.exitcode)"),
    Row("pickles of what is in __main__", "import pickle, copy\nclass A: pass\nb = pickle.dumps(A); print(b, pickle.loads(b) is A, A.__module__, A.__qualname__)"),
    Row("asyncio", """
import asyncio
async def one(n):
    await asyncio.sleep(0); return n
async def main():
    p = await asyncio.create_subprocess_exec("echo", "child", stdout=asyncio.subprocess.PIPE)
    print(await p.communicate(), p.returncode)
    print(await asyncio.gather(*map(one, range(5))), await asyncio.to_thread(len, "abc"))
    async with asyncio.TaskGroup() as g:
        g.create_task(one(1))
    print(type(asyncio.get_running_loop()).__name__)
asyncio.run(main())
"""),
    Row("an interrupt of asyncio", "import asyncio, os\nasync def m():\n    try:\n        os.kill(os.getpid(), 2); await asyncio.sleep(60)\n"
        "    except asyncio.CancelledError: print('cancelled'); raise\ntry: asyncio.run(m())\nexcept KeyboardInterrupt: print('interrupted')"),
    Row("subprocesses", "import subprocess, os\nprint(subprocess.check_output('echo $0 $$ $PPID; pwd; ls', shell=True))\n"
        "print(subprocess.run(['sleep', '60'], timeout=None) if 0 else os.popen('echo popen').read(), os.system('exit 3'))\n"
        "try: subprocess.run(['nowhere'])\nexcept FileNotFoundError as e: print(e)"),
    Row("sockets", "import socket\na, b = socket.socketpair(); a.send(b'x'); print(b.recv(1), socket.gethostname(), socket.getdefaulttimeout())\n"
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); print(s.accept()[1][0])"),
    Row("ctypes", "import ctypes, ctypes.util\nlibc = ctypes.CDLL(None, use_errno=True); print(ctypes.get_errno(), libc.getpid(), libc.close(-1), ctypes.get_errno())\n"
        "print(ctypes.pythonapi.Py_IsInitialized(), ctypes.sizeof(ctypes.c_long), ctypes._pointer_type_cache and len(ctypes._pointer_type_cache))\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda n: n + 1); print(f(1), ctypes.pythonapi.PyMem_RawMalloc.restype,"
        " ctypes.pythonapi.PyMem_RawMalloc.argtypes)"),
    Row("what ctypes has at first", "import ctypes; print(sorted(vars(ctypes)), sorted(vars(ctypes.pythonapi)), ctypes.get_errno())"),
    Row("sqlite", "import sqlite3\nd = sqlite3.connect('x.db'); d.execute('create table t (a)'); d.execute('insert into t values (1)'); d.commit()\n"
        "print(d.execute('select * from t').fetchall(), sqlite3.connect(':memory:').execute('select 1 + 1').fetchone())"),
    Row("decimals, fractions, dates", "import decimal, fractions, datetime; print(decimal.getcontext(), fractions.Fraction(1, 3), datetime.date(2026, 1, 1))"),
    Row("context variables", "import contextvars; print(list(contextvars.copy_context().items()))"),
    Row("warnings", "import warnings, sys\nprint(warnings.filters, sys.warnoptions)\nwarnings.warn('old', DeprecationWarning); warnings.warn('plain')\n"
        "warnings.warn('pending', PendingDeprecationWarning); warnings.warn('resource', ResourceWarning)", errors=True),
    Row("a warning of the compiler", "x = 1\nif x is 1: print('\\d')", errors=True),
    Row("a warning once for each place", "import warnings\nfor n in range(3): warnings.warn('again')\nprint(__warningregistry__.keys())", errors=True),
    Row("a warning of a module that is deprecated", "import importlib\nfor n in ('imp', 'cgi', 'asyncore'):\n    try: importlib.import_module(n)\n"
        "    except ImportError as e: print(e)\nimport beside", files={"beside.py": "import warnings; warnings.warn('x', DeprecationWarning, 2)"}, errors=True),
    Row("a file that was not closed", "open('f', 'w')\nprint('ok')"),
    Row("the collector", "import gc\nprint(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.callbacks, gc.garbage)\n"
        "class A: pass\nimport weakref\na = A(); a.a = a; r = weakref.ref(a); del a; print(gc.collect() > 0, r())"),
    Row("who refers to what", "import gc, json; print(any(r is json.__dict__ for r in gc.get_referrers(json.loads)), any(o is json for o in gc.get_objects()))"),
    Row("the collector collects by itself", "import gc\nn = []\ngc.callbacks.append(lambda p, i: n.append(p))\nx = [[] for _ in range(20000)]\nprint('stop' in n)"),
    Row("objects that live for ever", "import sys; print(sys.getrefcount(object()), sys.intern('a') is 'a'[:])"),
    Row("tracing and profiling", "import sys, cProfile\nprint(sys.gettrace(), sys.getprofile()); l = []\n"
        "def f(): pass\nsys.settrace(lambda fr, e, a: l.append((fr.f_code.co_name, e))); f(); sys.settrace(None); print(l)"),
    Row("audit hooks", "import sys; l = []\nsys.addaudithook(lambda e, a: l.append(e)); open('/dev/null').close(); print(l[:3])"),
    Row("pdb", "import pdb\npdb.Pdb(nosigint=True).set_trace()\nx = 1\nprint(x)", stdin=b"w\nn\np 40 + 2\nc\n"),
    Row("breakpoint, at the end of stdin", "breakpoint()\nprint('after')", **FAILS),
    Row("code.interact", "import code; code.interact(local={'a': 5})", stdin=b"a + 1\nimport sys\nsys.argv\n1/0\n", errors=True),
    Row("readline and the interactive start", "import sys; print('readline' in sys.modules, hasattr(sys, '__interactivehook__'))"),
    Row("unittest", "import unittest\nclass T(unittest.TestCase):\n    def test_it(self): self.assertEqual(1, 2)\n"
        "r = unittest.TextTestRunner(open('/dev/null', 'w')).run(unittest.defaultTestLoader.loadTestsFromModule(__import__('__main__')))\n"
        "print(len(r.failures), r.failures[0][1])"),
    Row("doctest", 'def f():\n    """\n    >>> f()\n    2\n    """\n    return 1\nimport doctest; print(doctest.testmod())'),
    Row("dataclasses and typing", "import dataclasses, typing\n@dataclasses.dataclass\nclass A:\n    x: int\n    y: 'A | None' = None\n"
        "print(A(1), typing.get_type_hints(A))"),
    Row("enum, re, json", "import enum, re, json\nclass C(enum.Enum):\n    A = 1\nprint(C.A, re.sub('a', 'b', 'cat'), json.dumps({'a': [1]}))"),
    Row("logging", "import logging; logging.warning('w'); print(logging.root.handlers, logging.getLevelName(30)); logging.getLogger('a').error('e')", errors=True),
    Row("argparse", "import argparse; p = argparse.ArgumentParser(); p.add_argument('x', type=int); p.parse_args()", args=(b"no",), end=exits(2), errors=True),
    Row("argparse's help", "import argparse; p = argparse.ArgumentParser(); p.add_argument('x'); p.parse_args()", args=(b"--help",)),
    Row("importlib.resources and pkgutil", "import importlib.resources as r, pkgutil, package\nprint((r.files('package') / 'data').read_text(),"
        " pkgutil.get_data('package', 'data'), [m.name for m in pkgutil.iter_modules()][:3])",
        files={"package/__init__.py": "", "package/data": "text"}),
    Row("importlib.metadata", "import importlib.metadata as m; print(sorted(d.name for d in m.distributions()))"),
    Row("sysconfig and platform", "import sysconfig, platform; print(sysconfig.get_paths(), platform.python_version(), platform.libc_ver())"),
    Row("a virtual environment of its own", "import venv, subprocess; venv.create('v', with_pip=False)\n"
        "print(subprocess.run(['v/bin/python', '-c', 'import sys; print(sys.prefix, sys.path)'], capture_output=True))"),
    Row("tempfile", "import tempfile, os; print(tempfile.gettempdir(), tempfile.tempdir); f = tempfile.NamedTemporaryFile(); print(os.path.dirname(f.name))"),
    Row("random with a seed", "import random; random.seed(1); print(random.random())"),
    Row("help", "import sys; help(len)"),
    Row("the Zen", "import this"),
    Row("curses without a terminal", "import curses; print(curses.tigetnum)\ntry: curses.setupterm('xterm', 1); print(curses.tigetnum('colors'))\nexcept curses.error as e: print(e)"),
    Row("terminals", "import os, shutil, sys\ntry: os.get_terminal_size()\nexcept OSError as e: print(e)\nprint(shutil.get_terminal_size(), [os.isatty(n) for n in range(3)])\n"
        "try: os.open('/dev/tty', os.O_RDWR)\nexcept OSError as e: print(e)"),
]  # fmt: skip

TABLE = [*MAIN, *PROCESS, *STREAMS, *ENDS, *LIBRARY]

# An interpreter reads these as it starts, so it has to be started for them.
BARE = [
    Row("PYTHONPATH", "import sys; print(sys.path)", env={"PYTHONPATH": "/workspace/lib:/tmp"}),
    Row("PYTHONHASHSEED", "print(hash('a'), {'a', 'b', 'c'})", env={"PYTHONHASHSEED": "0"}),
    Row("PYTHONWARNINGS", "import warnings, sys; print(sys.warnoptions); warnings.warn('x')", env={"PYTHONWARNINGS": "error"}, **FAILS),
    Row("PYTHONUNBUFFERED", "import sys, os; print(sys.stdout.write_through); print('kept', end=''); os._exit(0)", env={"PYTHONUNBUFFERED": "1"}),
    Row("PYTHONDONTWRITEBYTECODE", "import sys; print(sys.flags)", env={"PYTHONDONTWRITEBYTECODE": "1"}),
    Row("PYTHONOPTIMIZE", "assert 0\nprint(__debug__)", env={"PYTHONOPTIMIZE": "2"}),
    Row("PYTHONIOENCODING", "print('ä')", env={"PYTHONIOENCODING": "latin-1"}),
    Row("PYTHONUTF8", "import sys; print(sys.flags.utf8_mode, sys.getfilesystemencoding())", env={"PYTHONUTF8": "1"}),
    Row("PYTHONINSPECT", "x = 5", env={"PYTHONINSPECT": "1"}, stdin=b"x\n", errors=True),
    Row("PYTHONSTARTUP", "print(1)", env={"PYTHONSTARTUP": "/workspace/nowhere"}),
    Row("PYTHONFAULTHANDLER", "import faulthandler; print(faulthandler.is_enabled())", env={"PYTHONFAULTHANDLER": "1"}),
    Row("PYTHONHOME", "print(1)", env={"PYTHONHOME": "/nowhere"}, **FAILS),
    Row("LANG", "import sys, locale; print(sys.stdout.encoding, locale.getpreferredencoding())", env={"LANG": "C"}),
    Row("LC_ALL", "import sys, locale; print(sys.stdout.encoding, locale.getlocale())", env={"LC_ALL": "POSIX"}),
    Row("TZ", "import time; print(time.tzname, time.localtime(0).tm_hour)", env={"TZ": "Asia/Tokyo"}),
    Row("LD_LIBRARY_PATH", "import os; print(os.environ['LD_LIBRARY_PATH'])", env={"LD_LIBRARY_PATH": "/workspace"}),
    Row("LD_PRELOAD", "print(1)", env={"LD_PRELOAD": "/workspace/nowhere.so"}, errors=True),
    Row("MALLOC_ARENA_MAX", "print(1)", env={"MALLOC_ARENA_MAX": "1"}),
]  # fmt: skip


# --- the two ways to run it -------------------------------------------------------------------------------------


class Ways(NamedTuple):
    """A runtime whose execs get an interpreter each, one whose execs get a zygote's, and a sandbox of both."""

    cold: Runtime
    warm: Runtime
    pool: Pool


@pytest.fixture(scope="module")
def ways(runtime_environment):
    paths = Paths.from_environment(runtime_environment)
    pool = Pool(LauncherProcess(), Sizes(minimum=2, maximum=4))
    with Runtime(paths, launcher=LauncherProcess()) as cold, Runtime(paths, slots=pool) as warm:
        yield Ways(cold, warm, pool)


def ran(row, ways, *, warm):
    """The result of a row's program in a sandbox of its own, whose id is taken out of what it says."""
    runtime = ways.warm if warm else ways.cold
    sandbox = runtime.create(rootfs="host")
    try:
        name = os.fsdecode(row.name)
        for path, content in {**row.files, name: row.source}.items():
            runtime.write(sandbox.id, path, content if isinstance(content, bytes) else content.encode())
        if row.before:
            runtime.write(sandbox.id, "before.py", row.before.encode())
            before = ways.cold.exec(ExecRequest(sandbox=sandbox.id, filename="before.py", limits=PATIENCE))
            assert (before.exit_code, before.stderr) == (0, "")
            runtime.remove_file(sandbox.id, "before.py")
        request = ExecRequest(
            sandbox=sandbox.id,
            filename=name,
            args=[os.fsdecode(word) for word in row.args],
            env=dict(row.env),
            stdin=row.stdin,
            encoding="base64",
            limits={**PATIENCE, **row.limits},
        )
        result = runtime.exec(request)
    finally:
        runtime.remove(sandbox.id)
    output = [ADDRESS.sub(b"0x", b64decode(stream)) for stream in (result.stdout, result.stderr)]
    # The kernel counts the job's first process, and the cgroup or the watchdog all of them: one of them is first.
    signal = "SIGXCPU" if result.status == "cpu_time_exceeded" else result.signal
    return End(result.status, result.exit_code, signal), result.message, *output


def in_a_zygotes_slot(row, ways):
    """As `ran`, by an interpreter that was there: until a zygote is ready for the first, it is run again."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while True:
        before = ways.pool.figures().interpreters
        told = ran(row, ways, warm=True)
        if ways.pool.figures().interpreters > before:
            return told
        assert time.monotonic() < deadline, "no zygote is ready"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what)
def test_a_file_sees_what_an_interpreter_of_its_own_would_show_it(row, ways):
    bare = ran(row, ways, warm=False)

    assert bare[0] == row.end, bare
    assert bool(bare[3]) == row.errors, bare
    assert in_a_zygotes_slot(row, ways) == bare


@pytest.mark.parametrize("row", BARE, ids=lambda row: row.what)
def test_what_an_interpreter_goes_by_as_it_starts_starts_one(row, ways):
    bare = ran(row, ways, warm=False)
    before = ways.pool.figures().interpreters

    assert ran(row, ways, warm=True) == bare
    assert ways.pool.figures().interpreters == before
