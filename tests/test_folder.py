"""Finding pictures in a folder, keeping the index, and holding some of them out."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_beit.engine.data import folder_index
from fused_beit.engine.data.folder import ImageFolder, split
from fused_beit.engine.data.source import BadPicture
from fused_beit.engine.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the index files, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fused_beit"


@pytest.fixture
def photographs(root: Path) -> Path:
    """A folder of real photographs, where there is one."""
    path = Path(os.environ.get("FUSED_BEIT_PICTURES") or root.parent / "shared" / "data" / "clothing-224")
    if not path.is_dir():
        pytest.skip(f"no photographs in {path}; FUSED_BEIT_PICTURES names their folder")
    return path


def write(path: Path, color: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, color, color)).save(path, format="PNG")


def settle(path: Path) -> None:
    """Make all folders old enough for their index to be trusted."""
    for folder, _, _ in os.walk(path):
        os.utime(folder, (time.time() - 100, time.time() - 100))


def paths(folder: Path) -> list[str]:
    found = ImageFolder(folder)
    return [Path(found.name(i)).relative_to(folder).as_posix() for i in range(len(found))]


@pytest.fixture
def count_searches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were really searched, one entry each time."""
    searched: list[Path] = []
    original = folder_index.search

    def search(root: Path) -> object:
        searched.append(root)
        return original(root)

    monkeypatch.setattr(folder_index, "search", search)
    return searched


def test_pictures_are_found_by_ending_in_sorted_order(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    wanted = ["z.PNG", "a/x.jpg", "a/y.JPEG", "a/b/deep.tif", "b/1.webp", "b/2.bmp", "b/3.ppm", "b/4.pgm", "b/5.TIFF"]
    for name in [*wanted, "a/readme.txt", "a/film.gif", "a/.hidden.jpg", ".git/c.jpg", "d/jpg"]:
        write(root / name)
    assert sorted(paths(root)) == sorted(wanted)
    assert paths(root) == ["z.PNG", "a/x.jpg", "a/y.JPEG", "a/b/deep.tif", *sorted(w for w in wanted if w[0] == "b")]


def test_classes_are_the_folders_with_pictures(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for name in ["loose.png", "cat/1.png", "cat/indoor/2.png", "dog/3.png"]:
        write(root / name)
    (root / "empty").mkdir()
    found = ImageFolder(root)
    assert found.classes == ["cat", "dog"]
    labels = {Path(found.name(i)).name: found.label(i) for i in range(4)}
    assert labels == {"loose.png": -1, "1.png": 0, "2.png": 0, "3.png": 1}


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    write(root / "a" / "1.png")
    write(tmp_path / "elsewhere" / "2.png")
    (root / "up").symlink_to(root)
    (root / "a" / "up").symlink_to(root / "a")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked_twice").symlink_to(tmp_path / "elsewhere")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "file.png").symlink_to(root / "a" / "1.png")
    assert paths(root) == ["file.png", "self.png", "a/1.png", "linked/2.png"]


def test_a_broken_link_is_a_bad_picture_when_it_is_read(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "gone.png").symlink_to(root / "nowhere.png")
    found = ImageFolder(root)
    assert len(found) == 1
    with pytest.raises(BadPicture, match="No such file"):
        found.load(0)


def test_names_that_are_not_ascii_or_not_even_text_are_read(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    write(root / "größe 大.png")
    os.rename(root / "größe 大.png", os.fsencode(root) + b"/broken\xff.png")
    write(root / "größe 大.png")
    found = ImageFolder(root)
    assert len(found) == 2
    for index in range(2):
        assert found.load(index).size == (8, 8)
        found.name(index).encode()  # printable, whatever the bytes were


def test_the_index_is_kept_until_a_folder_changes(tmp_path: Path, count_searches: list[Path]) -> None:
    root = tmp_path / "pictures"
    write(root / "a" / "1.png")
    settle(root)
    assert paths(root) == ["a/1.png"]
    assert paths(root) == ["a/1.png"]
    assert len(count_searches) == 1
    write(root / "a" / "2.png")
    assert paths(root) == ["a/1.png", "a/2.png"]
    assert len(count_searches) == 2
    (root / "a" / "1.png").unlink()
    write(root / "b" / "3.png")
    assert paths(root) == ["a/2.png", "b/3.png"]


def test_an_index_of_a_folder_that_was_just_changed_is_not_trusted(tmp_path: Path, count_searches: list[Path]) -> None:
    root = tmp_path / "pictures"
    write(root / "1.png")
    ImageFolder(root)
    ImageFolder(root)
    assert len(count_searches) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "header"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, cache: Path, damage: str, count_searches: list[Path]) -> None:
    root = tmp_path / "pictures"
    for i in range(20):
        write(root / f"{i:02}.png")
    settle(root)
    expected = paths(root)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[data.index(b"07.png")] ^= 1
    file.write_bytes(
        {
            "empty": b"",
            "cut": bytes(data[:-20]),
            "flipped": bytes(data),
            "text": b"hello\n" * 100,
            "header": bytes(data).replace(b'"names"', b'"nomes"'),
        }[damage]
    )
    assert paths(root) == expected
    assert len(count_searches) == 2
    assert paths(root) == expected
    assert len(count_searches) == 2  # mended


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "pictures"
    write(root / "1.png")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = ImageFolder(root)
    assert pickle.loads(pickle.dumps(found)).load(0).size == (8, 8)


def test_a_folder_is_sent_to_a_worker_by_the_name_of_its_index(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for i in range(500):
        (root / "a").mkdir(parents=True, exist_ok=True)
        (root / "a" / f"picture {i:06}.png").touch()
    found = ImageFolder(root)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert [received.name(i) for i in range(500)] == [found.name(i) for i in range(500)]


def test_an_index_replaced_by_another_run_changes_nothing_for_this_one(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    write(root / "b.png")
    first = ImageFolder(root)
    write(root / "a.png")
    assert len(ImageFolder(root)) == 2  # another run, which replaces the file
    assert first.name(0).endswith("b.png")
    assert pickle.loads(pickle.dumps(first)).name(0).endswith("b.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_inside_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    write(root / "1.png")
    write(root / "locked" / "2.png")
    (root / "locked").chmod(0)
    with pytest.warns(UserWarning, match="locked"):
        assert paths(root) == ["1.png"]
    (root / "locked").chmod(0o755)
    assert paths(root) == ["1.png", "locked/2.png"]


@pytest.mark.parametrize(("name", "sentence"), [("none", "does not exist"), ("file", "is not a folder")])
def test_a_wrong_path_is_told(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{name}.*{sentence}"):
        ImageFolder(tmp_path / name)


def test_a_folder_without_pictures_is_told_with_the_endings_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "film.gif").touch()
    with pytest.raises(UserError, match=r"no picture in .*\.jpeg \.jpg .*\.webp"):
        ImageFolder(tmp_path / "empty")


class Numbers:
    """A source of so many pictures, none of which is ever loaded."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int, needed: object = None) -> Image.Image:
        return Image.new("RGB", (1, 1), (index, 0, 0))


@pytest.mark.parametrize(
    ("size", "share", "maximum", "held"),
    [
        (100, 0.2, 50, 20),
        (100, 0.5, 10, 10),
        (100, 0.001, 10, 1),
        (100, 0.0, 10, 0),
        (100, 1.0, 1000, 100),
        (1, 1, 5, 1),
    ],
)
def test_a_split_has_every_picture_once(size: int, share: float, maximum: int, held: int) -> None:
    parts = split(Numbers(size), share, 0, maximum)
    names = [[int(part.name(i)) for i in range(len(part))] for part in parts]
    assert len(names[1]) == held
    assert sorted(names[0] + names[1]) == list(range(size))
    assert all(part.load(i).getpixel((0, 0)) == (int(part.name(i)), 0, 0) for part in parts for i in range(len(part)))


def test_a_split_depends_on_its_seed() -> None:
    held = [split(Numbers(1000), 0.1, seed, 1000)[1].indices for seed in (0, 0, 1)]
    assert np.array_equal(held[0], held[1])
    assert not np.array_equal(held[0], held[2])
    assert abs(held[0].mean() - 499.5) < 4.5 * 1000 / np.sqrt(12 * 100)


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="leaves none to train on"):
        split(Numbers(1), 0.02, 0, 10)


def test_the_training_part_of_millions_is_small_to_send_to_a_worker() -> None:
    train, val = split(Numbers(14_000_000), 0.02, 0, 2048)
    assert len(train) + len(val) == 14_000_000
    assert len(pickle.dumps(train)) < 20_000


def test_real_photographs_are_found_with_their_classes(photographs: Path) -> None:
    found = ImageFolder(photographs / "validation")
    assert len(found) == 341
    assert len(found.classes) == 10
    assert found.load(0).mode == "RGB"
