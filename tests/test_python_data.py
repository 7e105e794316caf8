"""The language python-data: numpy, pandas and matplotlib work in its containers, and in the forks of its zygote."""

import json
import os
import time
import tomllib

import pytest
from conftest import CHECKOUT
from programs import OF_EMULATED_PROCESSORS

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.rootfs import RootfsStore
from jhansi_runtime.spec import Recipe, from_builtins

WITHIN_SECONDS = 300
PATIENCE = {"timeout": 300, "cpu_time": 300}

FRAME = """
import io, sys
import pandas
frame = pandas.read_csv(io.StringIO("day,value\\n2026-01-01,1\\n2026-01-02,3\\n"), parse_dates=["day"])
print(frame.value.mean(), frame.day.dt.tz_localize("Europe/Berlin")[0])
"""
PLOT = """
import os
import matplotlib, matplotlib.pyplot as plot
plot.plot([1, 2, 3])
plot.title("three")
plot.savefig("three.png")
print(matplotlib.get_backend(), open("three.png", "rb").read(4), matplotlib.get_configdir(), matplotlib.get_cachedir())
"""
# What is drawn by chance, in every way there is: all that two runs print has to differ.
CHANCE = """
import os, random, secrets, ssl, tempfile, uuid
import numpy
print(random.random(), random.SystemRandom().random(), secrets.token_hex(), uuid.uuid4(), uuid.uuid1())
print(ssl.RAND_bytes(16).hex(), os.urandom(16).hex(), next(tempfile._get_candidate_names()))
print(numpy.random.random(), numpy.random.default_rng().random(), numpy.random.RandomState().random())
print(numpy.random.permutation(1000)[:5].tobytes().hex())
"""
# Threads as the job begins, results and threads of a product large enough for all of them, CPUs that are seen.
PRODUCT = """
import os
before = len(os.listdir("/proc/self/task"))
import numpy
left = numpy.arange(640_000, dtype=float).reshape(800, 800) % 7
is_right = [bool((left @ left)[17, 4] == sum(a * b for a, b in zip(left[17], left[:, 4]))) for _ in range(3)]
print(before, is_right, len(os.listdir("/proc/self/task")), len(os.sched_getaffinity(0)))
"""
PROGRAMS = {"frame.py": FRAME, "plot.py": PLOT, "chance.py": CHANCE, "product.py": PRODUCT, "nothing.py": ""}
PRELOAD = ("matplotlib", "numpy", "pandas", "random", "secrets", "ssl", "tempfile", "uuid")


LEFT_OUT = (
    "usr/include",
    "usr/lib/gcc",
    "usr/lib/python3/dist-packages/sympy",
    "usr/lib/python3/dist-packages/pandas/tests",
)


class Data:
    """A sandbox of python-data with all the programs, run by interpreters of their own, or by a zygote's jobs."""

    def __init__(self, cold, warm, pool):
        self._cold, self._warm, self.pool = cold, warm, pool
        self.sandbox = cold.create("python-data").id
        for name, source in PROGRAMS.items():
            cold.write(self.sandbox, name, source.encode())

    def cold(self, name, **limits):
        return self._told(self._cold, name, limits)

    def warm(self, name, **limits):
        """As cold, by an interpreter that was there: until a zygote is ready, a program that does nothing is run."""
        deadline = time.monotonic() + WITHIN_SECONDS
        while True:
            before = self.pool.figures().interpreters
            self._told(self._warm, "nothing.py", limits)
            if self.pool.figures().interpreters > before:
                break
            assert time.monotonic() < deadline, "no zygote is ready"
            time.sleep(0.05)
        told = self._told(self._warm, name, limits)
        assert self.pool.figures().interpreters == before + 2
        return told

    def _told(self, runtime, name, limits):
        request = ExecRequest(sandbox=self.sandbox, filename=name, limits={**PATIENCE, **limits})
        result = runtime.exec(request)
        stderr = result.stderr.removeprefix(OF_EMULATED_PROCESSORS)
        assert (result.status, result.exit_code, stderr) == ("exited", 0, ""), result
        return result.stdout


@pytest.fixture(scope="module")
def data(data_home, tmp_path_factory):
    fresh = tmp_path_factory.mktemp("data")
    (fresh / "rootfs").symlink_to(os.path.join(data_home, "rootfs"))
    (fresh / "config.toml").write_text(f"pool.preload.python-data = {json.dumps(PRELOAD)}\n")
    paths = Paths.from_environment({"JHANSI_HOME": str(fresh), "JHANSI_CONFIG": str(fresh / "config.toml")})
    pool = Pool(LauncherProcess(), Sizes(minimum=1, maximum=2))
    with Runtime(paths, launcher=LauncherProcess()) as cold, Runtime(paths, slots=pool) as warm:
        yield Data(cold, warm, pool)


def test_what_is_left_out_is_not_in_the_tree_and_the_rest_is_sound(data_home):
    store = RootfsStore(os.path.join(data_home, "rootfs"), os.path.join(CHECKOUT, "rootfs"))
    rootfs = store.open("python-data", progress=lambda _: None)

    assert [path for path in LEFT_OUT if os.path.exists(os.path.join(rootfs.tree, path))] == []
    assert next(info.size for info in store.infos() if info.language == "python-data") < 500_000_000
    assert store.verify("python-data") == []


@pytest.mark.parametrize("path", ["", "/usr", "../usr", "usr/../..", "*", "usr;id", "usr/$HOME", 'usr"', "a b"])
def test_a_recipe_leaves_out_what_is_in_the_tree_alone(path):
    with open(os.path.join(CHECKOUT, "rootfs/python-data.toml"), "rb") as file:
        recipe = tomllib.load(file) | {"left_out": [path]}

    with pytest.raises(InvalidRequestError, match="left_out"):
        from_builtins(recipe, Recipe, where="recipe")


def test_a_frame_is_read_and_reckoned_with(data):
    assert data.cold("frame.py") == "2.0 2026-01-01 00:00:00+01:00\n"
    assert data.warm("frame.py") == data.cold("frame.py")


def test_a_plot_is_drawn_without_a_display_or_a_place_for_settings_outside_home(data):
    told = data.cold("plot.py")

    assert told == "agg b'\\x89PNG' /home/sandbox/.config/matplotlib /home/sandbox/.cache/matplotlib\n"
    assert data.warm("plot.py") == told
    # It wants to write as it is imported, which a zygote cannot.
    assert data.pool.figures().skipped == ("matplotlib",)


@pytest.mark.parametrize("cpus", [1, 2])
def test_matrices_are_multiplied_by_as_many_threads_as_there_are_cpus(data, cpus):
    if cpus > len(os.sched_getaffinity(0)):
        pytest.skip("this host has one CPU")
    told = data.cold("product.py", cpus=cpus)

    assert told == f"1 [True, True, True] {cpus} {cpus}\n"
    assert data.warm("product.py", cpus=cpus) == told


def test_two_jobs_of_a_zygote_have_no_number_of_chance_in_common(data):
    first, second = (data.warm("chance.py").split() for _ in range(2))

    assert len(first) == len(second) == 12
    assert not set(first) & set(second)
