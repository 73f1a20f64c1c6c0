"""Files and folders that are there whole or not at all, and how a refusal says in what two runs differ."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign import written_aside
from diffalign.differences import differences
from diffalign.errors import UserError
from diffalign.written_aside import file_aside, folder_aside, remove, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def replaced(target: Path, failure: Exception) -> None:
    with file_aside(target) as aside:
        aside.write_text("new")
        raise failure


FULL = "the disk is full"


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, FULL), (errno.EDQUOT, FULL), (errno.EIO, "")])
def test_a_file_whose_writing_fails_stays_as_it_was(number: int, told: str, tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", "old")
    with pytest.raises(UserError, match=f"a.json could not be written: {told}.*What was there before is untouched"):
        replaced(tmp_path / "a.json", OSError(number, os.strerror(number)))
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_another_error_than_the_disks_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), file_aside(tmp_path / "a") as aside:
        aside.write_text("half")
        raise ValueError("mine")
    with pytest.raises(ValueError, match="mine"), folder_aside(tmp_path / "b"):
        raise ValueError("mine")
    assert names(tmp_path) == []


def test_the_folder_is_made_and_what_cannot_be_one_is_told(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "a", b"\x00")
    assert (tmp_path / "new" / "a").read_bytes() == b"\x00"
    with pytest.raises(UserError, match="b could not be written"):
        write_file(tmp_path / "new" / "a" / "b", "")
    with pytest.raises(UserError, match="b could not be written"), folder_aside(tmp_path / "new" / "a" / "b"):
        pass


def test_modes_are_what_the_umask_leaves_whoever_writes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with file_aside(tmp_path / "a.safetensors") as aside:
            save_file({"x": torch.zeros(1)}, aside)
        with folder_aside(tmp_path / "folder") as folder:
            save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*.safetensors")}
    assert modes == {0o640}


@pytest.mark.parametrize("lasting", [False, True])
def test_what_must_survive_a_power_cut_is_flushed_before_it_is_renamed(
    lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(written_aside, "flush", lambda *paths: flushed.extend(path.read_text() for path in paths))
    write_file(tmp_path / "a", "text", lasting=lasting)
    assert flushed == (["text"] if lasting else [])


def test_where_folders_cannot_be_flushed_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folder, and flushes only what was opened for writing."""
    opened, real = [], os.open

    def as_on_windows(path: Path, flags: int, *rest: int) -> int:
        assert not Path(path).is_dir() and flags & os.O_RDWR
        opened.append(Path(path).name)
        return real(path, flags, *rest)

    (tmp_path / "a").write_text("")
    monkeypatch.setattr(written_aside.os, "open", as_on_windows)
    monkeypatch.setattr(written_aside, "FOLDERS_FLUSH", False)
    written_aside.flush(tmp_path / "a", tmp_path)
    assert opened == ["a"]


def test_what_is_held_open_for_a_moment_is_renamed_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a virus scanner on Windows; what stays open is told, and nothing is lost."""
    tries, real = [], os.replace

    def held(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) < 3 or "for good" in str(target):
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, target)

    monkeypatch.setattr(written_aside, "SECONDS_BETWEEN_TRIES", (0.01, 0.01))
    monkeypatch.setattr(written_aside.os, "replace", held)
    write_file(tmp_path / "a", "text")
    assert len(tries) == 3 and names(tmp_path) == ["a"]
    with pytest.raises(UserError, match="for good could not be written: Access is denied"):
        write_file(tmp_path / "for good", "text")
    assert len(tries) == 6 and names(tmp_path) == ["a"]


def test_a_folder_is_removed_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("free", "held"):
        write_file(tmp_path / name / "state", "text")
    remove(tmp_path / "free")

    def held(*_: Path) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(written_aside.os, "replace", held)
    remove(tmp_path / "held")
    assert names(tmp_path) == ["held"] and (tmp_path / "held" / "state").read_text() == "text"


def test_differences_are_named_in_order_and_counted() -> None:
    then = {"b": 1, "a": {"x": [1, 2], "y": None}, "same": (1, 2), "long": list(range(100))}
    now = {"b": 2.5, "a": {"x": [1], "z": "new"}, "same": [1, 2], "long": []}
    assert differences(then, now).split("; ") == [
        "a.x was [1, 2] and is now [1]",
        'a.z was none and is now "new"',
        "b was 1 and is now 2.5",
        "long was a list of 100 and is now []",
    ]
    assert differences(then, dict(then)) == ""
    many = differences({str(n): n for n in range(9)}, {str(n): -1 for n in range(9)})
    assert many.count("and is now -1") == 6 and many.endswith("; and 3 more")
