import os
import stat
import time
from pathlib import Path

import pytest
import torch

from wina.errors import WinaError
from wina.files import (
    UNUSED_DAYS,
    cache_dir,
    cached,
    read_json,
    read_tensors,
    replacing_folder,
    write_tensors,
    write_text,
)
from wina.plan import ModelIdentity


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new content")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing_folder(path) as temporary:
        (temporary / "a").write_text("old")

    def fail() -> None:
        with replacing_folder(path) as temporary:
            (temporary / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with replacing_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [x.name for x in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_and_folders_get_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "new")
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(3)}, {})
        with replacing_folder(tmp_path / "folder") as folder:
            write_text(folder / "text", "new")
    finally:
        os.umask(before)
    modes = {x.name: stat.S_IMODE(x.stat().st_mode) for x in tmp_path.rglob("*")}
    files = {name: mode for name, mode in modes.items() if name != "folder"}
    assert set(files.values()) == {0o666 & ~umask}
    assert modes["folder"] == 0o777 & ~umask


def test_tensors_survive_with_metadata_whatever_their_strides(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a/b": torch.arange(6.0).reshape(2, 3).t(), "c": torch.tensor(3)}
    write_tensors(path, tensors, {"stage": "x"})
    found, metadata = read_tensors(path)
    assert metadata["stage"] == "x"
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_damaged_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(WinaError, match=r"t\.safetensors is missing"):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WinaError, match=r"t\.safetensors is damaged"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"name": "x", ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"name": "x"}', "config_hash: Field required"),
        (b'{"name": "x", "config_hash": "", "weights_hash": "", "dtype": "", "more": 1}', "more"),
        (b"[]", "does not follow its schema"),
    ],
)
def test_json_that_is_wrong_names_file_and_field(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(WinaError, match=message) as error:
        read_json(path, ModelIdentity)
    assert "x.json" in str(error.value)


def test_what_the_cache_did_not_need_for_long_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    kind, then = tmp_path / "plans", time.time() - (UNUSED_DAYS + 1) * 86_400
    for name in ("used", "unused", "new"):
        (kind / name).mkdir(parents=True)
        (kind / name / "plan.json").write_text("{}")
    (kind / "file").write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (kind / "link").symlink_to(outside)
    for name in ("used", "unused", "file"):
        os.utime(kind / name, (then, then))
    os.utime(kind / "link", (then, then), follow_symlinks=False)
    assert cached("plans", "used") == kind / "used"
    assert sorted(x.name for x in kind.iterdir()) == ["new", "used"]
    assert outside.is_dir()
    assert time.time() - (kind / "used").stat().st_mtime < 60
    # Once a process, and no kind but this one.
    os.utime(kind / "new", (then, then))
    cached("plans", "another")
    assert (kind / "new").is_dir()
    assert not cached("absent", "x").parent.exists()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("WINA_CACHE")
    assert "wina" in str(cache_dir())
