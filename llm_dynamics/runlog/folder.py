"""The folder of a run log: what in it is ours, and which live run writes to it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

from llm_dynamics.runlog import schema

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_FILES = frozenset({schema.META_FILE, schema.PROBES_FILE, schema.ERRORS_FILE, LOCK_FILE})


def checked_folder(folder: str | Path) -> Path:
    """Return where a run log shall lie, a link followed.

    Raises:
        ValueError: For an empty name, a file, a mount point, the working directory or one above it, or a folder that
            holds other things and no run log.
    """
    if not str(folder).strip():
        raise ValueError("log_folder is an empty text; give a folder, or None for `dynamics` in output_dir")
    path = Path(os.path.realpath(folder)) if os.path.islink(folder) else Path(folder)
    whole, here = path.resolve(), Path.cwd()
    own = f"give the run log a folder of its own, such as log_folder={str(path / schema.FOLDER)!r}"
    if whole == here or whole in here.parents:
        raise ValueError(f"log_folder={str(folder)!r} is the working directory, or holds it: {own}")
    if path.exists() and not path.is_dir():
        raise ValueError(f"log_folder={str(folder)!r} is a file; give a folder")
    if path.is_mount():
        raise ValueError(f"log_folder={str(folder)!r} is a mount point, which cannot be moved aside: {own}")
    if not may_be_used(path):
        others = sorted(entry.name for entry in path.iterdir() if not is_ours(entry))
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(f"log_folder={str(folder)!r} holds other things ({shown}) and no run log: {own}")
    return path


def may_be_used(folder: Path) -> bool:
    """Tell whether a run may write to the folder: it is missing, holds nothing of others, or has our `meta.json`."""
    if not folder.is_dir():
        return not folder.exists()
    if all(map(is_ours, folder.iterdir())):
        return True
    try:
        meta = json.loads((folder / schema.META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and "schema_version" in meta


def is_ours(entry: Path) -> bool:
    """Tell whether a run log made this entry of its folder: a file by its name, a table's folder by what is in it."""
    if entry.name in schema.TABLES and entry.is_dir():
        return all(part.name.startswith(".") or schema.part_step(part.name) is not None for part in entry.iterdir())
    return entry.name in _FILES or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def log_patterns(folder: Path, root: Path) -> list[str]:
    """Return glob patterns, relative to `root`, of what the run logs in a folder and beside it consist of."""
    folder, root = folder.resolve(), root.resolve()
    if folder == root:
        return [*(f"{table}/*" for table in schema.TABLES), *_FILES]
    if not folder.is_relative_to(root):
        return []
    # also those that were moved aside, and of runs that found the folder taken
    name = folder.relative_to(root).as_posix()
    return [f"{name}{ending}/*" for ending in ("", "_before_[0-9]*", "-[0-9]*")]


def move_aside(folder: Path) -> Path | None:
    """Move what is ours out of the folder; return where it lies now, None where there was nothing."""
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK_FILE] if folder.is_dir() else []
    ours = [entry for entry in entries if is_ours(entry) or entry.name in schema.TABLES]
    if not ours:
        return None
    moved = beside(folder, "_before_{:03d}", 1)
    if len(ours) == len(entries):
        folder.rename(moved)  # at once: a run log is never in two places
        (moved / LOCK_FILE).unlink(missing_ok=True)
        return moved
    moved.mkdir()
    for entry in ours:
        entry.rename(moved / entry.name)
    return moved


def beside(folder: Path, ending: str, first: int) -> Path:
    """Return the first name beside the folder that is free: `ending` is filled with `first`, `first` + 1, ..."""
    number = first
    while os.path.lexists(folder.with_name(folder.name + ending.format(number))):
        number += 1
    return folder.with_name(folder.name + ending.format(number))


class FolderLock:
    """Keeps two live runs out of one folder; the system releases it when the process ends, however it ends.

    It is a lock on an open file (`flock`). Where the file system has none, runs are not kept apart.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._file = -1
        self._close: Any = None

    @property
    def held(self) -> bool:
        """Whether this object holds a lock."""
        return self._close is not None and self._close.alive

    def take(self, folder: Path) -> bool:
        """Take the lock of a folder, which is made; False where a live run holds it."""
        if fcntl is None or (self.held and self._folder == folder):
            return True
        self.release()
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                ended = [lock for lock in _HELD if lock.held and _same(lock._file, file) and not lock._is_live()]
                os.close(file)
                if not ended:
                    return False
                ended[0].release()
            except OSError:  # no locks on this file system
                os.close(file)
                return True
            else:
                if _same(file, folder / LOCK_FILE):  # else another run removed or moved it meanwhile
                    break
                os.close(file)
        self._folder, self._file = folder, file
        self._close = weakref.finalize(self, os.close, file)
        self._trainer = next((weakref.ref(trainer) for trainer in _trainers(sys._getframe())), None)
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Let others write to the folder; nothing where no lock is held."""
        if not self.held:
            return
        assert self._folder is not None
        with contextlib.suppress(OSError):
            if _same(self._file, self._folder / LOCK_FILE):
                (self._folder / LOCK_FILE).unlink()
        self._close()

    def _is_live(self) -> bool:
        """Tell whether a run of this process goes on; one that an exception or Ctrl-C ended has left the stack."""
        if self._trainer is None:
            return True
        trainer = self._trainer()
        return any(trainer is one for frame in sys._current_frames().values() for one in _trainers(frame))


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """Close what a forked process inherited: a data loader's worker must not hold the lock of a run that ended."""
    for lock in _HELD:
        if lock.held:
            lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _trainers(frame: FrameType | None) -> list[Any]:
    """Return the objects whose method `train` is on a stack, the innermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is not None:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


def _same(file: int, other: int | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(other))
    except FileNotFoundError:
        return False
