"""The one way in which files and folders are written: whole and on the disk, or not at all."""

import json
import os
import stat

import pytest

from libra.utils import files


@pytest.fixture
def synced(monkeypatch):
    """The files and folders that were brought to the disk, in order."""
    seen, plain = [], os.fsync

    def fsync(handle):
        seen.append(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_a_file_is_whole_and_on_the_disk(tmp_path, synced):
    path = tmp_path / "new" / "folder" / "x.json"
    files.write_text(path, "é")
    assert path.read_bytes() == "é".encode() and [entry.name for entry in path.parent.iterdir()] == ["x.json"]
    *folders, content, named = synced
    assert folders == [str(tmp_path), str(tmp_path / "new")] and named == str(
        path.parent
    )  # every name on the way to it
    assert content.startswith(f"{path.parent}/.x.json.") and content.endswith(
        ".tmp"
    )  # before it took the name
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def test_json_holds_any_text(tmp_path):
    said = {"answer": "é, × and half a pair: \ud83d"}  # the latter is no UTF-8
    files.write_json(tmp_path / "x.json", said)
    text = (tmp_path / "x.json").read_text(encoding="ascii")
    assert json.loads(text) == said and text.startswith('{\n "answer"') and text.endswith("}\n")


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as work:
        work.write_bytes(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_folder_comes_whole_and_takes_the_place_of_an_older_one(tmp_path, synced):
    target = tmp_path / "made" / "folder"
    with files.new_folder(target) as stage:
        (stage / "inner").mkdir()
        (stage / "inner" / "x").write_text("1")
        assert not target.exists()
    assert {path.rpartition(".tmp")[2] for path in synced if ".tmp" in path} == {"", "/inner", "/inner/x"}
    with files.new_folder(target) as stage:
        (stage / "y").write_text("2")
        assert (target / "inner" / "x").exists()
    assert [path.name for path in target.iterdir()] == ["y"]
    with pytest.raises(ValueError), files.new_folder(target) as stage:
        (stage / "z").write_text("3")
        raise ValueError
    assert [path.name for path in target.iterdir()] == ["y"] and [
        path.name for path in target.parent.iterdir()
    ] == ["folder"]


def test_what_killed_writers_left_is_removed(tmp_path):
    for name in (".x.json.17-4.tmp", "x.json", ".hidden"):
        (tmp_path / name).write_text("")
    files.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "x.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
