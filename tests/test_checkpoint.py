"""Checkpoint folders: sealed or worthless, damage is named, the newest sound one is found."""

import json

import pytest

from fused_beit.engine.errors import UserError
from fused_beit.engine.training.checkpoint import (
    MANIFEST,
    newest_valid,
    prune,
    read_manifest,
    replace_durably,
    seal,
    tag_of,
    tags,
)


def sealed(root, step, content=b"weights"):
    folder = root / tag_of(step)
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(content)
    seal(folder, {"step": step})
    return folder


def test_a_sealed_folder_reads_back_its_facts(tmp_path):
    folder = sealed(tmp_path, 7)
    assert read_manifest(folder)["step"] == 7
    assert (tmp_path / "latest").read_text() == folder.name


def test_a_flipped_bit_a_missing_and_a_cut_file_are_named(tmp_path):
    for step, harm in enumerate(
        [
            lambda file: file.write_bytes(b"weightz"),
            lambda file: file.unlink(),
            lambda file: file.write_bytes(b"wei"),
        ]
    ):
        folder = sealed(tmp_path, step)
        harm(folder / "shard.pt")
        with pytest.raises(UserError, match=r"damaged: shard\.pt"):
            read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "files": 3}', "[]", '{"format": 99, "files": {}}'])
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, text):
    folder = sealed(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError):
        read_manifest(folder)


def test_the_newest_sound_checkpoint_is_found_behind_a_torn_and_a_damaged_one(tmp_path):
    good = sealed(tmp_path, 10)
    damaged = sealed(tmp_path, 20)
    (damaged / "shard.pt").write_bytes(b"weightz")
    torn = tmp_path / tag_of(30)
    torn.mkdir()
    (torn / "shard.pt").write_bytes(b"wei")
    found, problems = newest_valid(tmp_path)
    assert found == good
    assert len(problems) == 2


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    (sealed(tmp_path, 10) / "shard.pt").write_bytes(b"weightz")
    with pytest.raises(UserError, match="no checkpoint"):
        newest_valid(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path / "none") == (None, [])


def test_pruning_keeps_the_newest_and_removes_torn_older_ones(tmp_path):
    for step in (10, 20, 30):
        sealed(tmp_path, step)
    (tmp_path / tag_of(15)).mkdir()
    (tmp_path / tag_of(40)).mkdir()
    prune(tmp_path, keep=2)
    assert sorted(folder.name for folder in tags(tmp_path)) == [tag_of(20), tag_of(30), tag_of(40)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    replace_durably(file, lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_durably(file, fail)
    assert file.read_text() == "old"


def test_the_manifest_covers_every_file_that_matters(tmp_path):
    folder = tmp_path / tag_of(1)
    folder.mkdir()
    for name in ("a.pt", "model.safetensors", "extra.json", "zero_to_fp32.py"):
        (folder / name).write_bytes(b"x")
    seal(folder, {})
    assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == ["a.pt", "extra.json", "model.safetensors"]
