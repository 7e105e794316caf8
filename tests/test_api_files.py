"""Files over the HTTP API: in and out whole, in parts or not at all; uploads that break; archives; sizes."""

import gzip
import io
import os
import socket
import tarfile
import threading
import time
from urllib.parse import quote

import psutil
import pytest
from conftest import serving
from test_api import problem, records, until

MIB = 1024 * 1024
LARGE = 2 * 1024 * MIB
# Names as a person or a program may give them; each is one path of the workspace.
NAMES = [
    "with space.py",
    "quote\"'`.py",
    "line\nbreak",
    "tab\tand\\backslash",
    "per%20cent%",
    "question?and#hash&=+;",
    "\u00fcml\u00e4ut-\U0001f600",
    "-rf",
    "...",
    "a/b/c/deep file",
    "x" * 255,
]


# --- one file ---


@pytest.mark.parametrize("name", [*NAMES, b"not-utf8-\xff\xfe", b"\xc3"])
def test_a_file_of_any_name_comes_back_as_it_was_sent(api, make, name):
    path, content = make(), bytes(range(256)) * 9
    url = f"{path}/files/{quote(name)}"
    written = api.put(url, content=content)
    assert written.status_code == 201
    assert os.fsencode(written.json()["path"]) == os.fsencode(name)
    got = api.get(url)
    assert (got.status_code, got.content, got.headers["content-length"]) == (200, content, str(len(content)))
    assert got.headers["etag"] == written.headers["etag"]
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["x-content-type-options"] == "nosniff"
    looked = api.head(url)
    assert (looked.status_code, looked.content) == (200, b"")
    for header in ("content-length", "etag", "accept-ranges", "content-type"):
        assert looked.headers[header] == got.headers[header], header
    listed = api.get(f"{path}/files", params={"recursive": "true"}).json()
    assert os.fsencode(name) in [os.fsencode(one["path"]) for one in listed if one["type"] == "file"]
    gone = api.delete(url)
    assert (gone.status_code, gone.content) == (204, b"")
    assert api.get(url).status_code == api.head(url).status_code == api.delete(url).status_code == 404


def test_an_empty_file_is_a_file(api, make):
    path = make({"empty": b""})
    answer = api.get(f"{path}/files/empty")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


def test_a_folder_is_listed_and_not_downloaded(api, make):
    path = make({"folder/a": "1", "folder/b/c": "22"})
    listed = api.get(f"{path}/files", params={"path": "folder", "recursive": "true"}).json()
    assert [(one["path"], one["type"]) for one in listed] == [
        ("folder/a", "file"),
        ("folder/b", "directory"),
        ("folder/b/c", "file"),
    ]
    assert [one["path"] for one in api.get(f"{path}/files", params={"path": "folder"}).json()] == [
        "folder/a",
        "folder/b",
    ]
    assert [one["path"] for one in api.get(f"{path}/files").json()] == ["folder"]
    found = problem(api.get(f"{path}/files/folder"))
    assert found["status"] == 422
    assert "directory" in found["detail"]
    assert api.delete(f"{path}/files/folder").status_code == 204
    assert api.get(f"{path}/files").json() == []


@pytest.mark.parametrize("name", ["../out", "a/../../out", "%2e%2e/out", "..%2fout", "a%00b", "%2fetc/passwd"])
def test_a_path_that_leads_out_is_refused(server, api, make, name):
    path = make()
    head = f"PUT {path}/files/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
    answer = raw(server, head.encode())  # httpx would tidy the path
    assert answer.startswith((b"HTTP/1.1 422", b"HTTP/1.1 404", b"HTTP/1.1 405")), answer
    assert api.get(f"{path}/files").json() == []


def test_a_link_out_of_the_workspace_is_refused(api, make):
    path = make({"main.py": "import os; os.symlink('/etc', 'etc'); os.symlink('/etc/passwd', 'passwd')"})
    assert api.post(f"{path}/exec", json={"filename": "main.py"}).json()["exit_code"] == 0
    for name in ("passwd", "etc/passwd"):
        assert problem(api.get(f"{path}/files/{name}"))["status"] in {404, 422}
        assert b"root" not in api.get(f"{path}/files/{name}").content
    assert problem(api.put(f"{path}/files/etc/new", content=b""))["status"] in {404, 409, 422}
    assert problem(api.get(f"{path}/files", params={"path": "etc"}))["status"] in {404, 422}


# --- conditions and ranges ---


def test_who_has_the_content_is_told_so(api, make):
    url = f"{make({'f': '1'})}/files/f"
    settled = until_settled(api, url)
    for tags in (settled, f'"other", {settled}', f"W/{settled}", "*"):
        for method in ("GET", "HEAD"):
            answer = api.request(method, url, headers={"If-None-Match": tags})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", settled), tags
    assert api.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    api.put(url, content=b"2")
    answer = api.get(url, headers={"If-None-Match": settled})
    assert (answer.status_code, answer.content) == (200, b"2")


def test_of_two_writers_who_saw_the_same_the_second_is_told(api, make):
    url = f"{make()}/files/f"
    first = api.put(url, content=b"1", headers={"If-None-Match": "*"})
    assert first.status_code == 201
    assert problem(api.put(url, content=b"2", headers={"If-None-Match": "*"}))["status"] == 412
    second = api.put(url, content=b"2", headers={"If-Match": first.headers["etag"]})
    assert second.status_code == 200
    assert problem(api.put(url, content=b"3", headers={"If-Match": first.headers["etag"]}))["status"] == 412
    assert problem(api.put(f"{url}-new", content=b"3", headers={"If-Match": "*"}))["status"] == 412
    assert api.put(url, content=b"4", headers={"If-Match": "*"}).status_code == 200
    assert problem(api.put(url, content=b"5", headers={"If-None-Match": '"x"'}))["status"] == 422
    assert api.get(url).content == b"4"
    assert api.head(f"{url}-new").status_code == 404


@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=2-5", 206, b"2345", "bytes 2-5/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=7-99", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=10-20", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("bytes=5-2", 200, b"0123456789", None),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("bytes=\u0661-", 200, b"0123456789", None),
        (f"bytes=0-{'9' * 400}", 200, b"0123456789", None),
    ],
)
def test_a_range_is_what_is_asked_for(api, make, asked, status, content, told):
    url = f"{make({'f': '0123456789'})}/files/f"
    answer = api.get(url, headers={"Range": asked.encode()})
    assert (answer.status_code, answer.headers.get("content-range")) == (status, told)
    if status == 416 and answer.content:
        problem(answer)
    else:
        assert answer.content == content


def test_a_range_of_a_file_that_has_changed_is_all_of_it(api, make):
    url = f"{make({'f': '0123456789'})}/files/f"
    tag = until_settled(api, url)
    headers = {"Range": "bytes=1-2", "If-Range": tag}
    assert (api.get(url, headers=headers).status_code, api.get(url, headers=headers).content) == (206, b"12")
    api.put(url, content=b"abcdefghij")
    assert (api.get(url, headers=headers).status_code, api.get(url, headers=headers).content) == (200, b"abcdefghij")


# --- many at once ---


def test_many_parts_with_folders_in_their_names_are_written(api, make):
    path = make({"old": "old"})
    parts = [("file", (f"folder {number % 3}/f{number}", str(number).encode() * 1000)) for number in range(50)]
    parts += [("file", ("old", b"new")), ("comment", (None, b"not a file"))]
    answer = api.post(f"{path}/files", params={"path": "into/here"}, files=parts)
    assert answer.status_code == 201, answer.text
    assert [one["path"] for one in answer.json()] == [f"into/here/{part[1][0]}" for part in parts[:51]]
    for _, (name, content) in parts[:51]:
        assert api.get(f"{path}/files/into/here/{quote(name)}").content == content
    assert api.get(f"{path}/files/old").content == b"old"
    assert records(api, path)[-1]["event"] == "files.write"


@pytest.mark.parametrize("name", ["with space.py", "line\nbreak", "\u00fcml\u00e4ut", "a'b", "100%"])
def test_names_in_a_form_are_what_browsers_and_curl_make_of_them(api, make, name):
    path = make()
    written = api.post(f"{path}/files", files=[("file", (name, b"x"))]).json()
    assert [one["path"] for one in written] == [one["path"] for one in api.get(f"{path}/files").json()]
    if "\n" not in name:
        assert written[0]["path"] == name


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"nonsense", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
        (b"\r\n--b\r\n" + b"A: b\r\n" * 10_000 + b"\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=" + "b" * 500),
        (b"x", "multipart/form-data; boundary=\u00e4".encode("latin-1").decode("latin-1")),
    ],
)
def test_a_form_that_is_none_is_refused_with_what_to_send(api, make, content, kind):
    path = make()
    headers = {"Content-Type": kind.encode("latin-1")}
    found = problem(api.post(f"{path}/files", content=content, headers=headers))
    assert found["status"] in {400, 422}
    assert api.get(f"{path}/files").json() == []


@pytest.mark.parametrize("name", ["../out", "/etc/cron", "a/../../b", ""])
def test_a_part_that_would_lie_outside_is_refused(api, make, name):
    path = make()
    body = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nx\r\n--b--\r\n'.encode()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert problem(api.post(f"{path}/files", content=body, headers=headers))["status"] == 422
    assert api.get(f"{path}/files").json() == []


# --- what breaks ---


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
TAR_START = tarfile.TarInfo("f").tobuf()


@pytest.mark.parametrize(
    ("request_line", "kind", "start"),
    [
        ("PUT {path}/files/f", "application/octet-stream", b""),
        ("POST {path}/files", "multipart/form-data; boundary=b", FORM),
        ("PUT {path}/archive", "application/x-tar", TAR_START),
    ],
)
@pytest.mark.parametrize("length", ["Content-Length: 10000000", "Transfer-Encoding: chunked"])
def test_an_upload_that_breaks_leaves_the_old_file_and_nothing_else(
    server, api, make, request_line, kind, start, length
):
    path = make({"f": "old"})
    before, written = api.get(f"{path}/files").json(), len(records(api, path))
    head = f"{request_line.format(path=path)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
    body = start + b"n" * 300_000
    if "chunked" in length:
        body = b"%x\r\n%b\r\n" % (len(body), body)
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(head.encode() + body)
        time.sleep(0.1)  # so that it is under way, and not only in a buffer
        assert api.get(f"{path}/files/f").content == b"old"
    workspace = os.path.join(server.environment["JHANSI_HOME"], "workspaces", path.rpartition("/")[2])
    time.sleep(0.05)  # for what might be written once the caller is gone
    until(lambda: os.listdir(f"{workspace}/workspace") == ["f"])
    assert api.get(f"{path}/files").json() == before
    assert len(records(api, path)) == written
    until(lambda: api.delete(path).status_code == 204)


def test_a_form_keeps_the_parts_that_were_whole_before_it_broke(server, api, make):
    path = make({"second": "old"})
    part = '--b\r\nContent-Disposition: form-data; name="file"; filename="{}"\r\n\r\nnew\r\n'
    body = (part.format("first") + part.format("second")[:-4]).encode()
    head = f"POST {path}/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(f"{head}Content-Length: 9999\r\n\r\n".encode() + body)
        until(lambda: api.head(f"{path}/files/first").status_code == 200)
    until(lambda: len(api.get(f"{path}/files").json()) == 2)
    assert api.get(f"{path}/files/first").content == b"new"
    assert api.get(f"{path}/files/second").content == b"old"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("route", ["files/f", "archive", "files"])
def test_beyond_the_largest_upload_it_is_413_and_the_old_file_stays(strict, chunked, route):
    with strict.client() as client:
        path = client.post("/v1/sandboxes", json={"rootfs": "host"}).headers["location"]
        client.put(f"{path}/files/f", content=b"old")
        body = FORM + b"x" * 5000 + b"\r\n--b--\r\n" if route == "files" else tar_of({"f": b"x" * 5000})
        kind = "multipart/form-data; boundary=b" if route == "files" else "application/x-tar"
        content = iter([body[:3000], body[3000:]]) if chunked else body
        method = "POST" if route == "files" else "PUT"
        answer = client.request(method, f"{path}/{route}", content=content, headers={"Content-Type": kind})
        assert problem(answer)["status"] == 413
        assert client.get(f"{path}/files/f").content == b"old"
        assert len(client.get(f"{path}/files").json()) == 1


def test_a_full_disk_is_507_and_the_old_file_stays(fresh_environment, tmp_path):
    with serving(fresh_environment(), tmp_path / "server") as server, server.client() as client:
        path = client.post("/v1/sandboxes", json={"rootfs": "host"}).headers["location"]
        client.put(f"{path}/files/f", content=b"old")
        # A file-size limit of the server's process stands in for a disk that is full: EFBIG, where that is ENOSPC.
        psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_FSIZE, (MIB, MIB))
        parts = [("file", ("f", b"x" * 3 * MIB))]
        for answer in (
            client.put(f"{path}/files/f", content=b"x" * 3 * MIB),
            client.post(f"{path}/files", files=parts),
            client.put(f"{path}/archive", content=tar_of({"f": b"x" * 3 * MIB})),
        ):
            assert problem(answer)["status"] == 507
        assert client.get(f"{path}/files/f").content == b"old"
        assert len(client.get(f"{path}/files").json()) == 1


# --- archives ---


def test_an_archive_of_one_sandbox_makes_another(api, make):
    files = {"main.py": "print(open('data/a b').read())", "data/a b": "content", "data/\u00fc": "x" * 100_000}
    one, other = make(files), make({"main.py": "old", "kept": "kept"})
    api.post(f"{one}/exec", json={"command": ["/bin/sh", "-c", "ln -s main.py link; mkfifo pipe; chmod 755 main.py"]})
    archive = api.get(f"{one}/archive")
    assert (archive.status_code, archive.headers["content-type"]) == (200, "application/x-tar")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert {"main.py", "data/a b", "data/\u00fc", "link"} <= {name.removeprefix("./") for name in tar.getnames()}
    for content in (archive.content, gzip.compress(archive.content)):
        answer = api.put(f"{other}/archive", content=content)
        assert answer.status_code == 200, answer.text
        assert answer.json()["members"] >= 4
        assert answer.json()["bytes"] >= 100_000
    for name, content in files.items():
        assert api.get(f"{other}/files/{quote(name)}").text == content
    assert api.get(f"{other}/files/kept").text == "kept"
    listed = {one["path"]: one for one in api.get(f"{other}/files").json()}
    assert (listed["main.py"]["mode"], listed["link"]["type"]) == (0o755, "link")
    assert api.post(f"{other}/exec", json={"filename": "main.py"}).json()["stdout"] == "content\n"


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info.tobuf() + b"x" * size + b"\0" * (-size % 512)


def tar_of(files):
    return b"".join(member(name, size=len(content)) for name, content in files.items()) + b"\0" * 1024


@pytest.mark.parametrize(
    "hostile",
    [
        member("../out"),
        member("/etc/cron"),
        member("a/../../out"),
        member("link", tarfile.SYMTYPE, "/etc") + member("link/x"),
        member("link", tarfile.SYMTYPE, "..") + member("link/x"),
        member("hard", tarfile.LNKTYPE, "../../../etc/passwd"),
        member("hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("f/x"),
        member("big", size=0)[:124] + b"77777777777\0" + member("big")[136:],
        member("cut", size=1024)[:700],
        b"\x1f\x8b" + b"nonsense" * 100,
        b"no tar at all" * 100,
    ],
)
def test_a_hostile_archive_is_refused_with_the_workspace_untouched(server, api, make, hostile):
    path = make({"f": "old"})
    before = api.get(f"{path}/files").json()
    content = member("good", size=3) + hostile + b"\0" * 1024 if hostile[:1] not in {b"\x1f", b"n"} else hostile
    assert problem(api.put(f"{path}/archive", content=content))["status"] in {409, 422}
    assert api.get(f"{path}/files").json() == before
    workspace = os.path.join(server.environment["JHANSI_HOME"], "workspaces", path.rpartition("/")[2])
    assert set(os.listdir(workspace)) <= {"workspace", "sandbox.json", ".writing", ".changing"}


# --- size ---


def test_a_file_of_2_gib_passes_both_ways_while_the_server_stays_small(fresh_environment, tmp_path):
    with serving(fresh_environment(), tmp_path / "server") as server, server.client() as client:
        body = {"rootfs": "host", "limits": {"disk": 2 * LARGE}}
        path = client.post("/v1/sandboxes", json=body).headers["location"]
        client.put(f"{path}/files/small", content=b"x" * MIB)
        client.get(f"{path}/files/small")
        with Peak(server.process.pid) as peak:
            answer = client.put(f"{path}/files/large", content=pieces(), headers={"Content-Length": str(LARGE)})
            assert answer.status_code == 201, answer.text
            assert answer.json()["size"] == LARGE
            received, last = 0, b""
            with client.stream("GET", f"{path}/files/large") as download:
                for piece in download.iter_raw():
                    received += len(piece)
                    last = piece or last
        assert received == LARGE
        assert last.endswith(b"the end")
        assert peak.growth < 64 * MIB, f"the server grew by {peak.growth} bytes"
        client.delete(path)


def pieces():
    """2 GiB, the last seven bytes of them not zero."""
    for _ in range(LARGE // MIB - 1):
        yield bytes(MIB)
    yield bytes(MIB - 7) + b"the end"


class Peak:
    """How much the resident memory of a process grows within the block."""

    def __init__(self, pid):
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._before = self._process.memory_info().rss
        self.growth = 0

    def _watch(self):
        while not self._ended.wait(0.01):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


# --- within ---


def raw(server, request):
    """All that is answered to these very bytes."""
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(request)
        return b"".join(iter(lambda: caller.recv(65_536), b""))


def until_settled(api, url):
    """The strong entity tag of a file, once it is not just being written."""
    until(lambda: not api.head(url).headers["etag"].startswith("W/"))
    return api.head(url).headers["etag"]
