"""API keys under use: what verifies and what does not, many processes, killed processes, damaged files.

What is asserted is the answer of a store or of the command line, and what is on the disk.
"""

import json
import os
import re
import signal
import stat
import string
import subprocess
import sys
import threading
import time
from typing import get_args

import pytest
from conftest import CHECKOUT, environment_with, run
from hypothesis import given, settings
from hypothesis import strategies as st

from jhansi_runtime.errors import ConflictError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.keys import KeyStore
from jhansi_runtime.spec import Scope

TOKEN_DIGITS = string.ascii_letters + string.digits + "-_"

# Makes keys of the names argv[2:], or goes on until it is killed when there are none; prints each id once it is made.
CREATOR = """
import itertools, os, sys
from jhansi_runtime.keys import KeyStore

store = KeyStore(sys.argv[1])
for name in sys.argv[2:] or itertools.repeat(None):
    key, _ = store.create(name=name)
    os.write(1, key.id.encode() + b"\\n")
"""


@pytest.fixture
def store(tmp_path):
    return KeyStore(str(tmp_path / "home" / "keys.json"))


def creator(store, *names):
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    argv = [sys.executable, "-c", CREATOR, store.path, *names]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)


def elsewhere(store):
    """Another store of the same file, as another process has it."""
    return KeyStore(store.path)


# --- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def jhansi(home):
    """`jhansi(*words, **options)` runs one jhansi-run over an empty JHANSI_HOME."""
    return lambda *words, **options: run(words, environment_with(home), **options)


def document(answer):
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def audited(jhansi):
    records = document(jhansi("audit", "show", "--json"))
    return [(record["event"], record["key_id"], record["scopes"], record["actor"]) for record in records]


def test_create_prints_the_token_alone_says_so_beside_it_and_the_token_verifies(jhansi, store):
    answer = jhansi("keys", "create", "--name", "ci")

    token = answer.stdout.removesuffix("\n")
    assert re.fullmatch(r"jk_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", token)
    assert "not shown again" in answer.stderr
    assert token not in answer.stderr
    key = store.verify(token)
    assert (key.name, key.scopes, key.expires_at) == ("ci", ["read", "write", "exec"], None)
    assert token.split("_")[1] == key.id.removeprefix("key_")


def test_create_keeps_what_it_was_told_and_ls_shows_that_and_nothing_of_the_secret(jhansi, store):
    words = ["--scope", "admin", "--scope", "read", "--ttl", "2h", "--max-execs", "3", "--max-sandboxes", "7"]
    created = document(jhansi("keys", "create", "--name", "ops team", "--json", *words))
    listed = jhansi("keys", "ls", "--json")

    assert document(listed) == [created["key"]]
    assert set(created) == {"key", "token"}
    key = created["key"]
    assert (key["name"], key["scopes"], key["max_execs"], key["max_sandboxes"]) == ("ops team", ["read", "admin"], 3, 7)
    assert key["expires_at"] > key["created_at"]
    assert store.verify(created["token"]).id == key["id"]
    with open(store.path) as file:
        digest = json.load(file)["keys"][0]["secret_sha256"]
    table = jhansi("keys", "ls").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["ID", key["id"]]
    assert all(secret not in table + listed.stdout for secret in (created["token"][20:], digest))


def test_no_file_holds_the_token_and_the_key_file_is_its_owners_alone(jhansi, home, store):
    tokens = [jhansi("keys", "create").stdout.strip(), document(jhansi("keys", "create", "--json"))["token"]]
    jhansi("keys", "ls")
    jhansi("keys", "revoke", store.verify(tokens[1]).id)

    contents = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert len(contents) >= 3  # the keys, the audit log and its head
    for token in tokens:
        assert not any(token[20:].encode() in content for content in contents)
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600


def test_the_file_is_its_owners_alone_whatever_the_umask(jhansi, store):
    assert jhansi("keys", "create", umask=0).returncode == 0

    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600


def test_revoke_takes_an_id_a_prefix_and_a_name_and_one_that_is_unknown_does_not_keep_the_others(jhansi, store):
    keys = [store.create(name=f"key number {number}") for number in range(4)]
    (first, _), (second, _), (third, _), (kept, kept_token) = keys
    prefix = unique_prefix(second.id, [key.id for key, _ in keys])

    answer = jhansi("keys", "revoke", "nobody", first.id, prefix, third.name, "--json")

    assert answer.returncode == 125
    assert len(answer.stderr.splitlines()) == 1
    assert "nobody" in answer.stderr
    assert [key["id"] for key in json.loads(answer.stdout)] == [first.id, second.id, third.id]
    assert store.list() == [kept]
    assert [store.verify(token) for _, token in keys] == [None, None, None, kept]
    assert store.verify(kept_token) == kept


def unique_prefix(identity, others):
    return next(identity[:n] for n in range(5, 21) if sum(other.startswith(identity[:n]) for other in others) == 1)


def test_creating_and_revoking_are_in_the_audit_log_by_key_id_and_scopes(jhansi):
    key = document(jhansi("keys", "create", "--scope", "audit", "--json"))["key"]
    jhansi("keys", "revoke", key["id"])

    actor = f"uid:{os.getuid()}"
    assert audited(jhansi) == [
        ("key.create", key["id"], ["audit"], actor),
        ("key.revoke", key["id"], ["audit"], actor),
    ]
    assert jhansi("audit", "verify").returncode == 0


def test_a_key_whose_making_cannot_be_recorded_is_not_made(jhansi, home, store):
    home.mkdir()
    (home / "audit").write_text("in the way")

    answer = jhansi("keys", "create")

    assert (answer.returncode, answer.stdout) == (125, "")
    assert store.is_empty()


def test_a_key_is_revoked_also_where_that_cannot_be_recorded(jhansi, home, store):
    key, token = store.create()
    (home / "audit").write_text("in the way")

    answer = jhansi("keys", "revoke", key.id)

    assert answer.returncode == 125
    assert "audit" in answer.stderr
    assert store.verify(token) is None


def test_the_command_line_offers_every_scope_there_is(jhansi):
    words = [word for scope in get_args(Scope) for word in ("--scope", scope)]

    assert document(jhansi("keys", "create", "--json", *words))["key"]["scopes"] == list(get_args(Scope))


@pytest.mark.parametrize(
    "words",
    [
        ["--scope", "root"],
        ["--max-execs", "0"],
        ["--max-sandboxes", "-1"],
        ["--ttl", "0"],
        ["--name", ""],
        ["--name", "two\nlines"],
        ["--name", "key_0123"],
        ["--name", "n" * 65],
    ],
)
def test_a_wrong_value_is_an_error_line_and_makes_nothing(jhansi, store, words):
    answer = jhansi("keys", "create", *words)

    assert (answer.returncode, answer.stdout) == (125, "")
    assert answer.stderr.startswith("jhansi-run: error: ")
    assert store.is_empty()


def test_ls_of_no_keys_is_an_empty_list_and_makes_no_file(jhansi, store):
    assert document(jhansi("keys", "ls", "--json")) == []
    assert not os.path.lexists(store.path)


def test_a_shell_is_offered_the_keys_there_are(jhansi, home, store):
    key, _ = store.create(name="ci")
    for typed, offered in (("c", "ci"), ("key_", key.id)):
        asked = {"_JHANSI_RUN_COMPLETE": "bash_complete", "COMP_WORDS": f"jhansi-run keys revoke {typed}"}
        answer = jhansi(env=environment_with(home) | asked | {"COMP_CWORD": "3"})
        assert answer.stdout.splitlines() == [f"plain,{offered}"]


# --- what verifies -------------------------------------------------------------------------------------------


def test_a_token_verifies_as_its_own_key_and_no_other(store):
    made = [store.create() for _ in range(3)]

    assert [store.verify(token) for _, token in made] == [key for key, _ in made]
    assert len({token for _, token in made}) == 3


def test_the_secret_of_one_key_is_not_that_of_another(store):
    (_, first), (_, second) = store.create(), store.create()

    assert store.verify(first[:20] + second[20:]) is None


def test_a_key_ends_when_its_time_is_up(store):
    key, token = store.create(ttl=0.3)
    assert store.verify(token) == key

    time.sleep(0.35)

    assert store.verify(token) is None
    assert elsewhere(store).verify(token) is None
    assert store.list() == [key]
    assert not store.is_empty()


def test_a_store_that_does_not_exist_is_empty_and_verifies_nothing(store):
    assert store.is_empty()
    assert store.list() == []
    assert store.verify(f"jk_{'0' * 16}_{'A' * 43}") is None
    with pytest.raises(NotFoundError):
        store.revoke("key_0000000000000000")


def test_each_character_of_a_token_counts(store):
    _, token = store.create()

    for place, present in enumerate(token):
        # The last one also where base64 would drop the bits that differ.
        others = TOKEN_DIGITS.replace(present, "") if place == len(token) - 1 else ("A" if present != "A" else "B")
        assert [store.verify(token[:place] + other + token[place + 1 :]) for other in others] == [None] * len(others)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    store = KeyStore(str(tmp_path_factory.mktemp("keys") / "keys.json"))
    return store, *store.create()


@st.composite
def near_tokens(draw):
    """Text that has the shape of a token, or nearly."""
    digits = draw(st.text("0123456789abcdef", min_size=15, max_size=17))
    return f"jk_{digits}_{draw(st.text(TOKEN_DIGITS, min_size=42, max_size=44))}"


@settings(max_examples=300, deadline=None)
@given(text=st.text(), data=st.data())
def test_no_text_verifies_but_the_token(shared_store, text, data):
    store, key, token = shared_store
    cut = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(cut, len(token)))

    for candidate in (text, data.draw(near_tokens()), token[:20] + text, text + token, token + text):
        assert store.verify(candidate) == (key if candidate == token else None)
    edited = token[:cut] + text + token[end:]
    assert store.verify(edited) == (key if edited == token else None)


@pytest.mark.parametrize(
    "change", [str.upper, str.strip, "{}\n".format, " {}".format, "{}\0".format, "{}\udc80".format]
)
def test_a_token_that_was_changed_on_the_way_is_no_token(store, change):
    _, token = store.create()

    assert (store.verify(change(token)) is not None) == (change(token) == token)


# --- names and references ------------------------------------------------------------------------------------


def test_a_name_is_taken_until_its_key_is_revoked(store):
    key, _ = store.create(name="ci")
    with pytest.raises(ConflictError, match="ci"):
        store.create(name="ci")

    store.revoke("ci")

    assert store.create(name="ci")[0].id != key.id


def test_the_beginning_of_several_ids_names_them_and_revokes_none(store):
    keys = {store.create()[0].id for _ in range(17)}  # of 17, two begin with the same digit

    with pytest.raises(InvalidRequestError, match=r"begins the ids of \d+ keys") as raised:
        store.revoke("key_" + next(digit for digit in "0123456789abcdef" if sum(k[4] == digit for k in keys) > 1))

    assert "give more of the id" in str(raised.value)
    assert {key.id for key in store.list()} == keys


def test_a_token_in_place_of_an_id_is_not_repeated_in_the_error(store):
    _, token = store.create()
    for attempt in (lambda: store.revoke(token), lambda: store.create(name=token)):
        with pytest.raises(JhansiError) as raised:
            attempt()
        assert token[20:] not in str(raised.value)
    assert store.verify(token) is not None


@pytest.mark.parametrize("scopes", [[], ["read", "everything"], "read"])
def test_scopes_are_those_there_are_and_one_at_least(store, scopes):
    with pytest.raises(InvalidRequestError, match="read, write, exec, audit, admin"):
        store.create(scopes=scopes)
    assert store.is_empty()


# --- many processes ------------------------------------------------------------------------------------------


def test_a_revocation_in_another_process_counts_at_once(jhansi, store):
    key, token = store.create()
    assert store.verify(token) == key

    assert jhansi("keys", "revoke", key.id).returncode == 0

    assert store.verify(token) is None


def test_each_of_many_quick_changes_elsewhere_is_seen(store):
    other = elsewhere(store)
    for _ in range(100):  # quicker than the kernel's clock of files, and inodes are given again
        key, token = other.create()
        assert store.verify(token) == key
        other.revoke(key.id)
        replaced = other.create()[0]
        assert store.verify(token) is None
        other.revoke(replaced.id)
    assert store.is_empty()


def test_no_two_states_of_the_file_share_a_time_of_change_also_where_the_clock_was_set_back(store):
    # By it readers tell them apart: an inode's number is given again, and the size is often the same.
    key, token = store.create()
    an_hour_ahead = time.time_ns() + 3_600 * 1_000_000_000
    os.utime(store.path, ns=(an_hour_ahead, an_hour_ahead))
    assert store.verify(token) == key
    times = [an_hour_ahead]
    for _ in range(50):
        changed = elsewhere(store).create()[0]
        times.append(os.stat(store.path).st_mtime_ns)
        elsewhere(store).revoke(changed.id)
        times.append(os.stat(store.path).st_mtime_ns)

    assert times == sorted(set(times))


def test_twenty_processes_that_create_at_once_lose_nothing(store):
    processes = [creator(store, f"{number}-a", f"{number}-b") for number in range(20)]
    made = [process.communicate()[0].split() for process in processes]

    assert [process.returncode for process in processes] == [0] * 20
    assert sorted(key.id for key in store.list()) == sorted(identity for ids in made for identity in ids)
    assert {key.name for key in store.list()} == {f"{number}-{letter}" for number in range(20) for letter in "ab"}


def test_of_many_threads_one_gets_a_name_and_none_is_told_wrong(store):
    _, token = store.create(name="steady")
    made, refused, wrong = [], [], []

    def work(number):
        for attempt in range(5):
            try:
                made.append(store.create(name=f"shared {attempt}")[0].id)
            except ConflictError:
                refused.append(number)
            if store.verify(token) is None:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(made), len(refused), wrong) == (5, 35, [])
    assert {key.id for key in store.list()} >= set(made)


def test_a_killed_creator_leaves_a_whole_file_that_has_every_key_it_told_of(store):
    told = set()
    for number in range(12):
        with creator(store) as process:
            told.add(process.stdout.readline().strip())
            time.sleep(0.003 * number)
            process.send_signal(signal.SIGKILL)
            told.update(line.strip() for line in process.stdout if line.endswith("\n"))

        assert {key.id for key in elsewhere(store).list()} >= told
    _, token = store.create()
    assert store.verify(token) is not None
    left = set(os.listdir(os.path.dirname(store.path)))
    assert left == {"keys.json", "keys.json.lock"}


# --- a file that cannot be trusted ---------------------------------------------------------------------------


def entry_of(store):
    with open(store.path) as file:
        return json.load(file)["keys"][0]


def changed_key(**fields):
    return lambda entry: {"keys": [entry | {"key": entry["key"] | fields}]}


DAMAGE = {
    "not a list": lambda entry: {"keys": entry},
    "nothing in it": lambda _: {},
    "the same key twice": lambda entry: {"keys": [entry, entry]},
    "a field nobody knows": changed_key(only_from="10.0.0.0/8"),
    "a scope nobody knows": changed_key(scopes=["read", "root"]),
    "an end that is no instant": changed_key(expires_at="tomorrow"),
    "an id that is none": changed_key(id="key_x"),
    "a digest that is none": lambda entry: {"keys": [entry | {"secret_sha256": ""}]},
    "no limit is no number": changed_key(max_execs="many"),
}


def assert_every_use_is_an_error(store, token, *words):
    uses = [
        store.list,
        store.is_empty,
        store.create,
        lambda: store.verify(token),
        lambda: store.revoke("key_0000000000000000"),
    ]
    with open(store.path, "rb") as file:
        before = file.read()
    for use in uses:
        with pytest.raises(JhansiError) as raised:
            use()
        assert raised.value.remedy
        assert all(word in str(raised.value) for word in words)
    with open(store.path, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_says_something_else_than_keys_is_damaged_and_stays_as_it_is(store, damage):
    _, token = store.create()
    document = json.dumps(damage(entry_of(store)))
    with open(store.path, "w") as file:
        file.write(document)

    assert_every_use_is_an_error(store, token, "damaged", store.path)
    assert_every_use_is_an_error(elsewhere(store), token, "damaged", store.path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_a_file_that_is_cut_off_or_scribbled_over_is_damaged(store, content):
    _, token = store.create()
    with open(store.path, "wb") as file:
        file.write(content)

    assert_every_use_is_an_error(store, token, "damaged", store.path)


def test_a_damaged_file_is_an_error_line_of_the_command_line(jhansi, store):
    store.create()
    with open(store.path, "w") as file:
        file.write("{")

    for words in (["ls"], ["create"], ["revoke", "ci"]):
        answer = jhansi("keys", *words)
        assert (answer.returncode, answer.stdout) == (125, "")
        assert "damaged" in answer.stderr
        assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_read_or_write_is_refused_until_that_is_mended(store, mode):
    key, token = store.create()
    assert store.verify(token) == key
    os.chmod(store.path, mode)

    assert_every_use_is_an_error(store, token, f"chmod 600 {store.path}")

    os.chmod(store.path, 0o600)
    assert store.verify(token) == key


def test_what_is_no_file_is_refused_and_not_waited_for(store, tmp_path):
    os.mkdir(tmp_path / "home")
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)):
        make(store.path)
        with pytest.raises(JhansiError) as raised:
            store.is_empty()
        assert raised.value.remedy
        (os.rmdir if os.path.isdir(store.path) else os.unlink)(store.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_an_error_with_its_remedy_and_loses_nothing(store):
    key, token = store.create()
    folder = os.path.dirname(store.path)
    os.chmod(folder, 0o500)
    try:
        with pytest.raises(JhansiError, match="cannot be written") as raised:
            store.create()
    finally:
        os.chmod(folder, 0o700)
    assert raised.value.remedy
    assert store.verify(token) == key


def test_a_write_that_stops_short_is_an_error_and_loses_nothing(store):
    key, token = store.create()
    # RLIMIT_FSIZE is the nearest that an ordinary user has to a full disk.
    program = """
import resource, signal, sys
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.keys import KeyStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    KeyStore(sys.argv[1]).create()
except JhansiError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    answer = subprocess.run(
        [sys.executable, "-c", program, store.path], env=environment, capture_output=True, text=True, check=True
    )

    assert "cannot be written" in answer.stdout
    assert (store.list(), store.verify(token)) == ([key], key)
    assert set(os.listdir(os.path.dirname(store.path))) == {"keys.json", "keys.json.lock"}
