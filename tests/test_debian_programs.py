"""More programs that people run: those of a root tree that the product's builder makes of more of Debian.

git, a C compiler, Node.js, a Java virtual machine, numpy, pip, a debugger. See test_real_programs.py.
"""

import base64
import hashlib
import io
import pathlib
import shutil
import zipfile

import pytest
from conftest import CACHE, CHECKOUT, ROOTFS_SOURCES, environment_with, host_lacks
from programs import Command, Row, run, shell

from jhansi_runtime import Paths, Runtime, debian
from jhansi_runtime.rootfs import RootfsStore

# Made as the product makes its own, and kept beside them: 100 seconds, and 800 MB.
RECIPE = """
language = "python"
suite = "bookworm"
packages = [
    "ecj",                  # compiles Java, and needs no more than what runs it
    "gcc",
    "gdb-minimal",
    "git",
    "libc6-dev",
    "libopenblas0-pthread", # numpy's, with a thread for each CPU
    "make",
    "nodejs",
    "openjdk-17-jre-headless",
    "procps",
    "python3",
    "python3-numpy",
    "python3-pip",
    "unzip",
    "zip",
]
interpreter = "/usr/bin/python3"
extensions = [".py"]
run = ["/usr/bin/python3", "{file}"]
"""
GIT = r"""
export GIT_AUTHOR_DATE=2026-01-01T00:00:00Z GIT_COMMITTER_DATE=2026-01-01T00:00:00Z # the log goes by it
git init --quiet --initial-branch=main repository
cd repository
git config user.name sandbox && git config user.email sandbox@localhost
for number in 1 2 3; do echo $number >>file; git add . && git commit --quiet --message="commit $number"; done
git checkout --quiet -b side HEAD~1 && mkdir folder && git mv file folder/ && git commit --quiet --message=moved
git checkout --quiet main && git merge --quiet --no-edit side && git tag v1
echo changed >>folder/file && git stash --quiet && git status --porcelain && git stash pop --quiet
git diff --stat | tail -1  #>  1 file changed, 1 insertion(+)
git commit --quiet --all --message=changed && git gc --quiet && git fsck --strict --no-dangling
git clone --quiet . ../clone && git worktree add --quiet ../tree side
git bundle create --quiet ../bundle --all && git -C ../clone pull --quiet ../bundle main
git -C ../clone log --format=%s
#> changed
#> Merge branch 'side'
#> commit 3
#> moved
#> commit 2
#> commit 1
"""
HELLO = r"""
#include <pthread.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
static _Atomic int count;
static void *work(void *unused) { for (int i = 0; i < 1000; i++) count++; return unused; }
int main(void) {
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    int status;
    if (fork() == 0) return 7;
    wait(&status);
    printf("hello %d %d\n", count, WEXITSTATUS(status));
}
"""
MAKEFILE = """
all: one two
one two: %: %.o part.o
	gcc -o $@ $^
%.o: %.c
	gcc -O2 -Wall -Werror -pipe -c -o $@ $<
"""
NODE = r"""#!/usr/bin/env node
const fs = require("node:fs"), http = require("node:http"), zlib = require("node:zlib");
const { execFileSync, fork } = require("node:child_process");
const { Worker, isMainThread, workerData } = require("node:worker_threads");

const once = (thing, event) => new Promise((resolve) => thing.once(event, (...values) => resolve(values)));

async function main() {
    fs.writeFileSync("left.json", JSON.stringify({ by: "node" }));
    fs.renameSync("left.json", "folder/left.json");
    console.log(JSON.parse(await fs.promises.readFile("folder/left.json")).by);  //> node
    let timer, length = 0;
    await new Promise((resolve) => {
        fs.watchFile("folder/new", { interval: 50 }, resolve);
        timer = setInterval(() => fs.writeFileSync("folder/new", "x".repeat(++length)), 100);
    });
    clearInterval(timer);
    fs.unwatchFile("folder/new");

    const server = http.createServer((request, response) => response.end(request.url.toUpperCase()));
    server.listen(0, "localhost");
    await once(server, "listening");
    const answers = Array.from({ length: 9 }, (_, n) => fetch(`http://localhost:${server.address().port}/${n}x`));
    const texts = (await Promise.all(answers)).map((answer) => answer.text());
    console.log((await Promise.all(texts)).join(""));  //> /0X/1X/2X/3X/4X/5X/6X/7X/8X
    server.close();
    server.closeAllConnections();

    console.log(execFileSync("sh", ["-c", "echo from $0", "a child"]).toString().trim());  //> from a child
    const child = fork(__filename, ["child"]);
    child.send(20);
    console.log((await once(child, "message"))[0], (await once(child, "exit"))[0]);  //> 21 4
    const shared = new Int32Array(new SharedArrayBuffer(4));
    const workers = [1, 2, 3, 4].map((number) => new Worker(__filename, { workerData: { number, shared } }));
    await Promise.all(workers.map((worker) => once(worker, "exit")));
    console.log(shared[0]);  //> 10
    const packed = await new Promise((resolve) => zlib.gzip(Buffer.alloc(1 << 20), (_, data) => resolve(data)));
    console.log(packed.length < 2000);  //> true
}

if (!isMainThread) Atomics.add(workerData.shared, 0, workerData.number);
else if (process.argv[2] === "child") process.once("message", (n) => process.send(n + 1, () => process.exit(4)));
else main();
"""
JAVA = r"""
import java.lang.management.ManagementFactory;
import java.net.*;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;

public class Main {
    public static void main(String[] words) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(8);
        List<Future<Integer>> parts = new ArrayList<>();
        for (int part = 0; part < 16; part++) parts.add(pool.submit(Main::litter));
        int total = 0;
        for (Future<Integer> part : parts) total += part.get();
        pool.shutdown();
        long collections = 0;
        for (var bean : ManagementFactory.getGarbageCollectorMXBeans()) collections += bean.getCollectionCount();
        System.out.println(total + " " + (collections > 0) + " " + Runtime.getRuntime().availableProcessors());

        try (ServerSocket server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
            Thread thread = new Thread(() -> answer(server), "answer");
            thread.start();
            try (Socket client = new Socket(server.getInetAddress(), server.getLocalPort())) {
                System.out.println(new String(client.getInputStream().readAllBytes()));
            }
            thread.join();
        }
        Process child = new ProcessBuilder("sh", "-c", "echo from a child; exit 3").start();
        System.out.print(new String(child.getInputStream().readAllBytes()));
        System.out.println(child.waitFor());
        Path folder = Files.createDirectory(Path.of("folder"));
        Path moved = Files.move(Files.writeString(Path.of("left"), "by Java"), folder.resolve("left"));
        System.out.println(Files.readString(moved));
    }

    static int litter() {
        int sum = 0;
        for (int i = 0; i < 500; i++) sum += new byte[1 << 16].length >> 16;
        return sum;
    }

    static void answer(ServerSocket server) {
        try (Socket socket = server.accept()) {
            socket.getOutputStream().write("over a socket".getBytes());
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }
}
"""
BY_JAVA = "8000 true 1\nover a socket\nfrom a child\n3\nby Java\n"
NUMPY = r"""
import os
import numpy
one = numpy.arange(250_000, dtype=float).reshape(500, 500) % 7
product = one @ one.T
print(product.shape, product[3, 5] == sum(a * b for a, b in zip(one[3], one[5])))  #> (500, 500) True
matrix = numpy.random.default_rng(1).normal(size=(300, 300))
print(numpy.allclose(matrix @ numpy.linalg.inv(matrix), numpy.eye(300)))  #> True
print(len(os.listdir("/proc/self/task")) == len(os.sched_getaffinity(0)))  #> True
kept = numpy.memmap("kept", dtype="float32", mode="w+", shape=(100, 100))
kept[:] = 2
kept.flush()
"""
NUMPY_AGAIN = r"""
import numpy
print(numpy.memmap("kept", dtype="float32").sum())  #> 20000.0
"""
PERL = r"""#!/usr/bin/perl
use strict; use warnings; use IO::Socket::INET; use threads;
my $server = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die $@;
if (!fork) { my $client = $server->accept; print $client "from a child\n"; exit 3 }
my $client = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => $server->sockport) or die $@;
print <$client>;  #> from a child
wait; print $? >> 8, "\n";  #> 3
print threads->create(sub { $_[0] * 2 }, 21)->join, "\n";  #> 42
"""
TOOLS = r"""
ps -eo pid,user,comm
#>     PID USER     COMMAND
#>       1 sandbox  python
#>       2 sandbox  main
#>       3 sandbox  ps
pgrep -c main  #> 1
free -b | grep -c Mem  #> 1
zip -qr a.zip main && unzip -p a.zip main | cmp - main
"""
# It says so and ends; and what it was to trace has not begun, or goes on.
DEBUGGER = r"""
refused='ptrace: Operation not permitted'
gcc -g -pthread -o hello hello.c
gdb -batch -ex run ./hello >said 2>&1 || grep -om1 "$refused" said  #> ptrace: Operation not permitted
if grep hello.8000 said; then exit 1; fi
sleep 600 &
gdb -batch -p $! >said 2>&1 || grep -om1 "$refused" said  #> ptrace: Operation not permitted
kill $!
gdb -batch -p 1 >said 2>&1 || grep -om1 "$refused" said  #> ptrace: Operation not permitted
"""

# Landlock refuses to write in /proc, and a message queue lies in no folder that it could have a rule for.


def wheel():
    """The bytes of a package for pip to install, with a program."""
    parts = {
        "tiny/__init__.py": "def main():\n    print('installed')\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    record = "".join(f"{name},sha256={encoded_digest(content)},{len(content)}\n" for name, content in parts.items())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in (parts | {"tiny-1.0.dist-info/RECORD": f"{record}tiny-1.0.dist-info/RECORD,,\n"}).items():
            archive.writestr(name, content)
    return packed.getvalue()


def encoded_digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()


PIP = "python3 -m pip --disable-pip-version-check --quiet install --no-index --target lib tiny-1.0-py3-none-any.whl"

IN_DEBIAN = [
    Row(
        "git",
        {"main": f"#!/bin/sh -eu\n{GIT}"},
        ("main", Command("git -C tree log --format=%s -1", "moved\n")),
    ),
    Row(
        "a C compiler, and what it has made",
        {"hello.c": HELLO},
        (
            Command("gcc -O2 -Wall -Werror -pthread -o hello hello.c"),
            Command("./hello", "hello 8000 7\n"),
            Command("gcc -O2 -flto -static -fsanitize=undefined -o static hello.c"),
            Command("./static", "hello 8000 7\n"),
        ),
    ),
    Row(
        "make, with jobs",
        {
            "Makefile": MAKEFILE,
            "one.c": "int main(void) { return 1; }\n",
            "two.c": "int main(void) { return 0; }\n",
            "part.c": "int part;\n",
        },
        (Command("make --silent --jobs=4"), Command("./two"), Command("make --question")),
    ),
    Row("Node.js", {"main.js": NODE, "folder/file": ""}, ("main.js", "main.js")),
    Row(
        "a Java virtual machine",
        {"Main.java": JAVA},
        (
            Command("ecj -17 -proc:none Main.java"),
            Command("java -Xmx128m Main", BY_JAVA),  # unasked it goes by the memory of the machine
        ),
    ),
    Row(
        "pip, and what it has installed",
        {
            "tiny-1.0-py3-none-any.whl": wheel(),
            "main.py": "import sys\nsys.path.append('lib')\nimport tiny\ntiny.main()  #> installed\n",
        },
        (
            Command(PIP),
            "main.py",
            Command("env PYTHONPATH=lib lib/bin/tiny", "installed\n"),
        ),
    ),
    *(
        Row(
            f"numpy, cpus={cpus}",
            {"main.py": NUMPY, "again.py": NUMPY_AGAIN},
            ("main.py", "again.py"),
            limits={"cpus": cpus},  # it has as many threads as there are CPUs
        )
        for cpus in (1, 2)
    ),
    Row("Perl", {"main.pl": PERL}, ("main.pl",)),
    shell("processes and archives", TOOLS),
    shell("a debugger, which may trace nobody", DEBUGGER, **{"hello.c": HELLO}),
]


@pytest.fixture(scope="module")
def in_debian(tmp_path_factory):
    """A runtime that nobody has used, but for the root tree of RECIPE, which outlives the test run like Python's."""
    kept = pathlib.Path(CACHE, "programs")
    stamp = kept / "sources"
    sources = [source for source in ROOTFS_SOURCES if source.endswith(".py")]
    contents = [RECIPE.encode(), *(pathlib.Path(CHECKOUT, source).read_bytes() for source in sources)]
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    # Not verified, as Python's is: to read 800 MB takes an emulated machine longer than all else here.
    if not stamp.exists() or stamp.read_text() != digest:
        build(kept)
        stamp.write_text(digest)
    home = tmp_path_factory.mktemp("jhansi-home")
    (home / "rootfs").symlink_to(kept / "rootfs")
    with Runtime(Paths.from_environment(environment_with(home))) as runtime:
        yield runtime


def build(folder):
    if shutil.which("mmdebstrap", path=debian._PATH) is None:
        host_lacks("mmdebstrap", "it builds the root tree that these programs are in")
    recipes = folder / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    (recipes / "python.toml").write_text(RECIPE)
    store = RootfsStore(str(folder / "rootfs"), str(recipes))
    if store.infos():
        store.remove("python")  # at once: a tree that is replaced stays until the next build
    with pytest.MonkeyPatch.context() as patched:
        # Java's package is not installed where there is no folder for a link to its manual.
        patched.setattr(debian, "_LEFT_OUT", (*debian._LEFT_OUT, "path-include=/usr/share/man/man1"))
        store.build("python", progress=lambda _: None)


@pytest.mark.parametrize("row", IN_DEBIAN, ids=lambda row: row.what)
def test_a_program_of_debian_runs_as_it_does_anywhere(row, in_debian):
    run(row, in_debian)
