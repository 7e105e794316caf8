"""What is imported ahead, and who has nothing started ahead: by sandbox, by language; and whose module comes first."""

import os
import time

import pytest

from jhansi_runtime import ExecRequest, Paths, Runtime, imports
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine import pool as pools
from jhansi_runtime.engine.pool import Pool, Sizes
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.imports import imported
from jhansi_runtime.spec import SandboxChange

WITHIN_SECONDS = 60
PATIENCE = {"timeout": 300, "cpu_time": 300}
# Nobody imports these but who means them.
TOLD = "import sys; print(*sorted({'colorsys', 'sched', 'wave'} & set(sys.modules)))"
OWN = "import colorsys; print(getattr(colorsys, 'whose', 'of the library'), len(colorsys.__name__))"


@pytest.fixture
def pooled(runtime_environment, tmp_path, monkeypatch):
    """`pooled(settings, **sizes)` opens a Runtime of those [pool] settings, with a pool, its attribute `pool`."""
    monkeypatch.setattr(pools, "_TURN_SECONDS", 0.05)
    opened, made = [], []

    def open_runtime(settings="", **sizes):
        (tmp_path / "config.toml").write_text(f"[pool]\n{settings}")
        paths = Paths.from_environment(runtime_environment)._replace(config=str(tmp_path / "config.toml"))
        pool = Pool(LauncherProcess(), Sizes(**({"minimum": 1} | sizes)))
        runtime = Runtime(paths, slots=pool)
        runtime.pool = pool
        opened.append(runtime)
        return runtime

    def box(runtime, files, **options):
        sandbox = runtime.create(rootfs="host", **options)
        made.append((runtime, sandbox.id))
        for path, content in files.items():
            runtime.write(sandbox.id, path, content.encode())
        return sandbox.id

    open_runtime.box = box
    yield open_runtime
    for runtime, sandbox_id in made:
        runtime.remove(sandbox_id)
    for runtime in opened:
        runtime.close()


def ran(runtime, box, name="main.py"):
    result = runtime.exec(ExecRequest(sandbox=box, filename=name, limits=PATIENCE))
    assert (result.exit_code, result.stderr) == (0, ""), result
    return result.stdout


def by_a_zygote(runtime, box, name="main.py"):
    """As `ran`, by an interpreter that was there."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while True:
        before = runtime.pool_figures().interpreters
        told = ran(runtime, box, name)
        if runtime.pool_figures().interpreters > before:
            return told
        assert time.monotonic() < deadline, "no zygote is ready"


def never_by_a_zygote(runtime, box):
    before = runtime.pool_figures()
    for _ in range(10):
        ran(runtime, box)
        time.sleep(0.05)
    now = runtime.pool_figures()
    return now.hits > before.hits and (now.interpreters, now.zygotes) == (before.interpreters, before.zygotes)


def test_each_sandbox_finds_imported_what_it_named_or_else_its_language(pooled):
    runtime = pooled('preload.python = ["sched"]\n')
    language = pooled.box(runtime, {"main.py": TOLD})
    own = pooled.box(runtime, {"main.py": TOLD}, preload=["colorsys", "wave"])
    nothing = pooled.box(runtime, {"main.py": TOLD}, preload=[])

    assert by_a_zygote(runtime, language) == "sched\n"
    assert by_a_zygote(runtime, own) == "colorsys wave\n"
    assert by_a_zygote(runtime, nothing) == "\n"
    runtime.change(nothing, SandboxChange(preload=None))
    assert by_a_zygote(runtime, nothing) == "sched\n"


def test_what_the_rootfs_has_not_got_is_passed_over_and_told(pooled):
    runtime = pooled()
    box = pooled.box(runtime, {"main.py": TOLD}, preload=["nowhere", "colorsys.nowhere", "colorsys"])

    assert by_a_zygote(runtime, box) == "colorsys\n"
    assert runtime.pool_figures().skipped == ("colorsys.nowhere", "nowhere")


def test_a_sandbox_without_zygotes_has_an_interpreter_for_each_exec(pooled):
    runtime = pooled()
    box = pooled.box(runtime, {"main.py": TOLD}, zygote=False, preload=["colorsys"])

    assert never_by_a_zygote(runtime, box)
    runtime.change(box, SandboxChange(zygote=True))
    assert by_a_zygote(runtime, box) == "colorsys\n"


@pytest.mark.parametrize("settings", ["zygotes = false", "zygotes = {python = false}"])
def test_a_language_without_zygotes_has_none_whatever_a_sandbox_says(pooled, settings):
    runtime = pooled(settings)

    assert never_by_a_zygote(runtime, pooled.box(runtime, {"main.py": TOLD}, preload=["colorsys"]))


def test_another_language_without_zygotes_is_no_matter(pooled):
    runtime = pooled('zygotes = {"python-data" = false}')

    assert by_a_zygote(runtime, pooled.box(runtime, {"main.py": TOLD})) == "\n"


def test_there_are_no_more_zygotes_than_there_may_be(pooled):
    runtime = pooled(zygotes=1)
    first, second = (pooled.box(runtime, {"main.py": TOLD}, preload=[name]) for name in ("colorsys", "wave"))
    by_a_zygote(runtime, first)

    assert never_by_a_zygote(runtime, second)
    assert by_a_zygote(runtime, first) == "colorsys\n"


@pytest.mark.parametrize(
    ("files", "whose"),
    [
        ({}, "of the library"),
        ({"colorsys.py": "whose = 'its own'"}, "its own"),
        ({"colorsys/__init__.py": "whose = 'its own'"}, "its own"),
        ({"colorsys/data": "", "colorsys.txt": ""}, "of the library"),
        ({"elsewhere/colorsys.py": "whose = 'of nobody'"}, "of the library"),
    ],
)
@pytest.mark.parametrize("folder", ["", "deep/"])
def test_a_module_beside_the_program_comes_before_what_was_imported_ahead(pooled, folder, files, whose):
    runtime = pooled()
    own = {f"{folder}{path}": content for path, content in files.items()}
    box = pooled.box(runtime, {f"{folder}main.py": OWN, **own}, preload=["colorsys"])

    assert by_a_zygote(runtime, box, f"{folder}main.py") == ran(runtime, box, f"{folder}main.py") == f"{whose} 8\n"


def test_nothing_is_imported_ahead_for_an_archive_which_may_hold_modules_of_that_name(pooled):
    runtime = pooled()
    zipped = "import zipfile\nwith zipfile.ZipFile('main.pyz', 'w') as file:\n"
    members = {"__main__.py": OWN, "colorsys.py": "whose = 'its own'"}
    zipped += "".join(f"    file.writestr({name!r}, {text!r})\n" for name, text in members.items())
    box = pooled.box(runtime, {"zip.py": zipped}, preload=["colorsys"])
    ran(runtime, box, "zip.py")

    assert by_a_zygote(runtime, box, "main.pyz") == "its own 8\n"


NOT_MODULES = ["", "a b", "a,b", "os;x", "../x", "a..b", ".a", "a.", "1a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "a\n"]
NOT_THESE = [
    "__main__",
    "antigravity",
    "venv.__main__",
    "test",
    "test.support",
    "numpy.tests",
    "numpy.tests.test_ufunc",
    "a" * 101,
]


@pytest.mark.parametrize("preload", [*([name] for name in NOT_MODULES + NOT_THESE), ["a"] * 33], ids=repr)
def test_what_is_no_name_of_a_module_to_import_is_refused(pooled, preload):
    runtime = pooled()
    box = pooled.box(runtime, {}, preload=["testing", "unittest.mock", "_thread"])

    with pytest.raises(InvalidRequestError, match="preload"):
        runtime.create(preload=preload)
    with pytest.raises(InvalidRequestError, match="preload"):
        runtime.change(box, SandboxChange(preload=preload))
    assert runtime.sandbox(box).preload == ["testing", "unittest.mock", "_thread"]


def test_a_sandbox_of_before_there_was_a_choice_is_as_by_default(pooled):
    runtime = pooled()
    box = pooled.box(runtime, {})
    path = f"{runtime.paths.workspaces}/{box}/sandbox.json"
    with open(path) as file:
        lines = [line for line in file if '"zygote"' not in line and '"preload"' not in line]
    with open(path, "w") as file:
        file.write("".join(lines).replace(",\n}", "\n}"))

    assert (runtime.sandbox(box).zygote, runtime.sandbox(box).preload) == (True, None)


# --- auto ---


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import numpy", ("numpy",)),
        ("import numpy as np, pandas.core as core ,scipy # x\r\n", ("numpy", "pandas.core", "scipy")),
        ("from pandas.core import (\n  frame)\nfrom numpy import*", ("numpy", "pandas.core")),
        ("x = 1; import numpy;import pandas\nimport\tscipy", ("numpy", "pandas", "scipy")),
        ("import os, json.decoder, _thread\nfrom asyncio import run", ()),
        ("if True:\n  import numpy\n# import pandas\nimportnumpy\nfromx import y", ()),
        ("from . import numpy\nfrom .pandas import x\nfrom numpy", ()),
        ("import numpy..core, .x, numpy., 3d, __main__, numpy.tests, antigravity", ()),
        ("import beside, module, beside.deeper\nfrom module.x import y\nimport numpy", ("numpy",)),
        ("import " + "n" * 100 + "," + "n" * 101, ("n" * 100,)),
        (
            "import " + ", ".join(f"n{number:02}" for number in range(40)),
            tuple(f"n{number:02}" for number in range(32)),
        ),
        ("import num\u00e9ro, \udcff", ()),
        ("\0\0import numpy\0", ()),
        ("import numpy, \\\n  pandas", ("numpy",)),
        ("", ()),
    ],
)
@pytest.mark.parametrize("path", ["main.py", "deep/main.py"])
def test_what_a_file_imports_is_read_off_its_lines(tmp_path, path, source, names):
    program = tmp_path / path
    program.parent.mkdir(exist_ok=True)
    (program.parent / "beside").mkdir()
    (program.parent / "module.py").write_text("")
    folder = os.open(tmp_path, os.O_PATH)
    try:
        assert imported(source.encode(errors="surrogateescape"), folder, path) == names
    finally:
        os.close(folder)


@pytest.mark.parametrize("by", ["sandbox", "language"])
def test_what_the_file_imports_is_imported_ahead_where_that_is_wanted(pooled, monkeypatch, by):
    monkeypatch.setattr(imports.sys, "stdlib_module_names", {"sys", "sched"})  # not everybody has others
    runtime = pooled('preload.python = "auto"' if by == "language" else "")
    files = {
        "main.py": f"{TOLD}\nimport colorsys, sched, own\nfrom wave import open",
        "other.py": f"{TOLD}\nfrom colorsys import rgb_to_hls",
        "own.py": "",
    }
    box = pooled.box(runtime, files, preload="auto" if by == "sandbox" else None)

    assert by_a_zygote(runtime, box) == "colorsys wave\n"
    assert by_a_zygote(runtime, box, "other.py") == "colorsys\n"
    assert runtime.pool_figures().skipped == ()
