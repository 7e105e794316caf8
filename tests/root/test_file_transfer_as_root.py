"""Started by root: what comes into a workspace by upload or archive belongs to the id that the jobs have."""

import io
import os

import pytest
from test_archive import directory, hard_link, link, member, tar

from jhansi_runtime.workspace import open_workspace

pytestmark = pytest.mark.root

OWNER = 1_900_000_000


def test_all_that_is_written_and_unpacked_belongs_to_the_owner(tmp_path):
    folder = tmp_path / "sandbox" / "root"
    folder.mkdir(parents=True)
    os.chown(folder, OWNER, OWNER)
    data = tar(
        directory("folder/below"),
        member("folder/below/file", b"x", mode=0o600),
        hard_link("same", "folder/below/file"),
        link("link", "/etc/passwd"),
    )

    with open_workspace(str(folder), owner=OWNER) as workspace:
        workspace.write("new/deep/file", [b"x"])
        workspace.unarchive(io.BytesIO(data))

    owners = {
        os.path.join(above, name): os.lstat(os.path.join(above, name))
        for above, folders, files in os.walk(folder)
        for name in folders + files
    }
    assert len(owners) == 8
    assert {(status.st_uid, status.st_gid) for status in owners.values()} == {(OWNER, OWNER)}
    assert os.stat("/etc/passwd").st_uid == 0
