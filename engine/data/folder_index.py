"""Where the pictures of a folder are: found once, kept in a cache file, and mapped into memory by every process.

14 million names as Python strings would take gigabytes in every process; here they are one buffer of bytes, with an
offset and a folder number for each picture.
"""

import bisect
import functools
import hashlib
import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_MAGIC = b"fused_beit picture index 1\n"
_ALIGNMENT = 64
# A folder that changed this shortly before the search may have changed during it without another time stamp.
_SETTLED_NS = 2_000_000_000

# Names and folders are bytes, as the file system holds them, each in one buffer with the offsets of its ends.
_FIELDS = {
    "names": np.uint8,  # file names, one after the other
    "name_ends": np.int64,  # [N]
    "name_folders": np.int32,  # [N] folder of each file
    "folders": np.uint8,  # paths relative to the root, one after the other; the root itself is empty
    "folder_ends": np.int64,  # [F]
    "folder_times": np.int64,  # [F] time of last change, ns
    "searched": np.int64,  # [1] when the search began, ns
}


class FolderIndex:
    """The pictures below a folder, sorted. Pickled by the name of its file where it has one, else as a whole."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], file: Path | None = None) -> None:
        self._arrays = dict(arrays)
        self._file = file
        self._inode = _inode(file)

    def __len__(self) -> int:
        return len(self._arrays["name_ends"])

    @property
    def num_folders(self) -> int:
        return len(self._arrays["folder_ends"])

    def relative_path(self, index: int) -> str:
        """Path of a picture below the folder."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        folder = self._folder(int(self._arrays["name_folders"][index]))
        return os.fsdecode(os.path.join(folder, _item(self._arrays["names"], self._arrays["name_ends"], index)))

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the folders directly in the folder that hold pictures, at any depth."""
        return sorted({self._top(folder) for folder in np.unique(self._arrays["name_folders"])} - {""})

    def label(self, index: int) -> int:
        """Position in `classes` of the picture's class; -1 where it has none."""
        top = self._top(int(self._arrays["name_folders"][index]))
        return bisect.bisect_left(self.classes, top) if top else -1

    def is_current(self, root: Path) -> bool:
        """Whether no folder has changed since the search."""
        times = self._arrays["folder_times"]
        if times.max(initial=0) > int(self._arrays["searched"][0]) - _SETTLED_NS:
            return False
        try:
            return all(
                os.stat(os.path.join(os.fsencode(root), self._folder(i))).st_mtime_ns == times[i]
                for i in range(self.num_folders)
            )
        except OSError:
            return False

    def _folder(self, folder: int) -> bytes:
        return _item(self._arrays["folders"], self._arrays["folder_ends"], folder)

    def _top(self, folder: int) -> str:
        return os.fsdecode(self._folder(folder).split(b"/", 1)[0])

    def __getstate__(self) -> dict[str, Any]:
        # Another run may have replaced the file by a newer index, with other pictures at the same positions.
        if self._file is not None and _inode(self._file) == self._inode:
            return {"file": self._file}
        return {"arrays": {name: np.array(array) for name, array in self._arrays.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "arrays" in state:
            self.__init__(state["arrays"])  # type: ignore[misc]
        else:
            self.__init__(_map(state["file"]), state["file"])  # type: ignore[misc]


def find_index(root: Path) -> FolderIndex:
    """The index of a folder (absolute path): from the cache while no folder in it has changed, else by a new search.

    The cache is `$XDG_CACHE_HOME/fused_beit` (`~/.cache/fused_beit`). One that is damaged is replaced; one that cannot
    be written is done without.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_beit"
    file = cache / f"{hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()}.index"
    try:
        cached = FolderIndex(_map(file, check=True), file)
        if cached.is_current(root):
            return cached
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        pass  # there is none, or it is damaged
    arrays = search(root)
    try:
        _write(file, arrays)
        return FolderIndex(_map(file), file)
    except (OSError, ValueError):
        return FolderIndex(arrays)


def search(root: Path) -> dict[str, NDArray[Any]]:
    """Walk a folder and return the arrays of its index; warns of folders in it that cannot be read."""
    searched = time.time_ns()
    names, folders = bytearray(), bytearray()
    ends: dict[str, list[NDArray[np.int64]]] = {"name_ends": [], "name_folders": []}
    folder_ends: list[int] = []
    folder_times: list[int] = []
    seen: set[tuple[int, int]] = set()
    unreadable: list[str] = []
    waiting = [b""]  # paths below the root; the last is next
    endings = tuple(extension.encode() for extension in EXTENSIONS)
    root_bytes = os.fsencode(root)
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root_bytes, folder)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{os.fsdecode(path)} ({error.strerror})")
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back up, or a second way to the same folder
        seen.add((status.st_dev, status.st_ino))
        found: list[bytes] = []
        inner: list[bytes] = []
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            is_folder, is_file = _kind(entry)
            if is_folder:
                inner.append(os.path.join(folder, entry.name))
            elif is_file and entry.name.lower().endswith(endings):
                found.append(entry.name)
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        ends["name_ends"].append(len(names) + np.cumsum(lengths))
        ends["name_folders"].append(np.full(len(found), len(folder_ends)))
        names += b"".join(found)
        folders += folder
        folder_ends.append(len(folders))
        folder_times.append(status.st_mtime_ns)
        waiting += reversed(inner)
    if unreadable:
        warnings.warn(f"pictures in folders that cannot be read are left out: {', '.join(unreadable)}", stacklevel=3)
        searched = 0  # never taken from the cache: a permission may change and leave no trace in the folders' times
    arrays: dict[str, Any] = {
        "names": np.frombuffer(names, dtype=np.uint8),
        **{name: np.concatenate(parts) if parts else [] for name, parts in ends.items()},
        "folders": np.frombuffer(folders, dtype=np.uint8),
        "folder_ends": folder_ends,
        "folder_times": folder_times,
        "searched": [searched],
    }
    return {name: np.asarray(arrays[name], dtype=dtype) for name, dtype in _FIELDS.items()}


def _kind(entry: os.DirEntry[bytes]) -> tuple[bool, bool]:
    """Whether an entry is a folder, and whether it is to be read as a file."""
    try:
        return entry.is_dir(), entry.is_file() or entry.is_symlink()  # a link to nothing is reported when it is loaded
    except OSError:  # a link to itself, say
        return False, entry.is_symlink()


def _write(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an index so that other processes see all of it or nothing."""
    layout: dict[str, Any] = {name: [len(array), zlib.crc32(_bytes(array))] for name, array in arrays.items()}
    header = _MAGIC + json.dumps(layout).encode() + b"\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(header)
            for array in arrays.values():
                out.write(b"\0" * (-out.tell() % _ALIGNMENT))
                out.write(_bytes(array))
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _map(file: Path, check: bool = False) -> dict[str, NDArray[Any]]:
    """Arrays of an index file, mapped into memory; `check` reads all of it and raises ValueError for damage."""
    with open(file, "rb") as opened:
        if opened.readline(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file} is no index")
        layout = json.loads(opened.readline())
        offset = opened.tell()
    data = np.memmap(file, dtype=np.uint8, mode="r")
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in _FIELDS.items():
        count, checksum = layout[name]
        offset += -offset % _ALIGNMENT
        end = offset + count * np.dtype(dtype).itemsize
        if end > len(data):
            raise ValueError(f"{file} is cut off")
        arrays[name] = np.asarray(data[offset:end]).view(dtype)
        if check and zlib.crc32(_bytes(arrays[name])) != checksum:
            raise ValueError(f"{file} is damaged")
        offset = end
    return arrays


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).view(np.uint8))  # type: ignore[arg-type]


def _item(buffer: NDArray[np.uint8], ends: NDArray[np.int64], index: int) -> bytes:
    index = index % len(ends)
    return buffer[int(ends[index - 1]) if index else 0 : int(ends[index])].tobytes()


def _inode(file: Path | None) -> tuple[int, int] | None:
    try:
        status = os.stat(file) if file else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns) if status else None
