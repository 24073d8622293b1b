"""Checkpoints: written whole or not at all, verified before anything in them is used.

A checkpoint is a folder ``step-000000123`` with three files: ``tensors.safetensors``,
``state.json``, and ``MANIFEST.json`` with the size and the sha256 of the other two. It is written
beside its place under another name, synced and renamed, and older ones go only after that. So at
every moment the last whole one is there; whoever reads takes the newest whose bytes are those that
were written, and nothing stored is executed or used as a path.

One process writes to a directory at a time; that is for the caller to see to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from rnngrad.parts import MISSING, InputError, NothingUsable
from rnngrad.stored import DEPTH_LIMIT, Pairs, json_tree, one_line, unique

FORMAT = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"

MANIFEST_LIMIT = 2**20
STATE_LIMIT = 4 * 2**20
"""Its lists may take twenty times as much in memory."""
HEADER_LIMIT = 2**20
"""Bytes of safetensors' own header: names, shapes, offsets; some 100 a tensor."""

DTYPES = frozenset(
    (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    + (torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
)
"""What safetensors gives back as it got it; some others it writes and cannot read."""

_NAMED = 3
"""So many checkpoints that cannot be used have room in one line."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds.

    Args:
        step: It was saved after so many updates.
        tensors: By name, on the CPU, each with memory of its own.
        values: As they were saved, but for the order of keys, which is alphabetic.
        path: The checkpoint's folder.
        skipped: Of each newer checkpoint that was passed over: which file is at fault, and why.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    path: Path
    skipped: list[str]


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Writes a checkpoint; when it returns, the checkpoint outlives a power cut.

    A checkpoint of the same step is replaced, with one rename: the new one's name ends in ``.1``,
    and of a step the highest such number counts. Those of later steps are left alone and do not
    count towards ``keep``; see ``rewind``. What older ones could not be removed is logged, and
    tried again at the next save.

    Args:
        directory: Is made if it is missing, but not the directory that it lies in.
        step: Updates done so far.
        tensors: By name; views, transposes and tensors that share memory too. Long lists of
            numbers belong here: 10,000 in ``values`` take milliseconds.
        values: What JSON knows, and numbers that are not finite, and integers of any size.
        keep: So many of the last are kept, at least 2 so that one may turn out to be broken; 0
            keeps all.
        best: It is the best so far, and stays until a later one that is has become old itself: what
            is among the last may yet be taken back by ``rewind``.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: A tensor or value that would not come back as it is, or a bad ``keep``.
        OSError: It could not be written. The older ones are as they were.
    """
    _check_keep(keep)
    return _write(Path(directory), step, _encode(step, tensors, values), keep, best)


class AsyncCheckpointer:
    """Saves in a thread, one checkpoint at a time, while training goes on.

    ``save`` copies everything before it returns, so what is trained on may change at once. What
    it promises is what ``save`` of this module promises, from the moment that ``wait`` or the next
    ``save`` returns; killed before, the process leaves the older checkpoints.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with AsyncCheckpointer(Path(folder)) as checkpointer:
    ...         checkpointer.save(1, {"w": torch.ones(2)}, {"loss": 0.5})
    ...         checkpointer.save(2, {"w": torch.zeros(2)}, {"loss": math.inf})
    ...     load(Path(folder)).values
    {'loss': inf}

    Args:
        directory: As in ``save``.
        keep: As in ``save``.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        _check_keep(keep)
        self.directory = Path(directory).absolute()  # the process may go elsewhere meanwhile
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[Path] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        *,
        best: bool = False,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Waits for the one before, then begins to write this one.

        Args:
            step: As in ``save``, and so are the others.
            tensors: Are copied at once.
            values: Likewise.
            best: It is the best so far.
            after: Is called in the thread before anything is written: it may raise OSError, and
                then nothing is.

        Raises:
            InputError: As ``save`` of this module.
            OSError: The one before could not be written; this one was not begun.
        """
        self.wait()
        contents = _encode(step, tensors, values)

        def write() -> Path:
            if after is not None:
                after()
            return _write(self.directory, step, contents, self.keep, best)

        self._saving = self._thread.submit(write)

    def wait(self) -> Path | None:
        """Waits until the last checkpoint is written; its folder, if it is told for the first time.

        Raises:
            OSError: It could not be written. Raised once.
        """
        saving = self._saving
        if saving is None:
            return None
        error = saving.exception()  # an interrupt here leaves it to be asked for again
        self._saving = None
        if error is not None:
            raise error
        return saving.result()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            log.warning("checkpoint not written: %s", failure)  # the error on its way matters more
        finally:
            self._thread.shutdown()


def load(directory: Path, step: int | None = None, *, before: int | None = None) -> Loaded:
    """Reads the newest checkpoint that verifies, or the one of ``step`` and no other.

    Args:
        directory: Of the checkpoints.
        step: This one or none.
        before: Of those of earlier steps alone.

    Nothing is written or removed.

    Raises:
        NothingUsable: There is none, or none that verifies.
    """
    directory = Path(directory)
    try:
        there = _entries(directory)
    except OSError as error:
        raise NothingUsable(one_line(f"{directory}: {error.strerror}")) from None
    there = [entry for entry in there if before is None or entry.step < before]
    if not there:
        raise NothingUsable(one_line(f"{directory}: no checkpoint in it"))
    wanted = there if step is None else [entry for entry in there if entry.step == step][:1]
    if not wanted:
        steps = sorted({entry.step for entry in there})
        listed = ", ".join(map(str, steps[-10:]))
        listed = f"the last of {len(steps)} are {listed}" if steps[10:] else f"there are {listed}"
        raise NothingUsable(one_line(f"{directory}: no checkpoint of step {step}; {listed}"))
    skipped: list[str] = []
    for entry in wanted:
        path = directory / entry.name
        try:
            tensors, values = _verified(path, entry.step)
        except _Unusable as error:
            skipped.append(one_line(str(error)))
        else:
            return Loaded(entry.step, tensors, values, path, skipped)
    raise NothingUsable("no usable checkpoint: " + _listed(directory, skipped))


def best_step(directory: Path) -> int | None:
    """The step of the checkpoint last saved as the best; ``None`` if there is none.

    What ``load`` verifies is not looked at here, but for the manifest and the files' sizes.
    """
    directory = Path(directory)
    marked = (e.step for e in _entries(directory) if _marked_best(directory / e.name, e.step))
    return next(marked, None)


def rewind(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps, so that a run which goes on from ``step`` is alone.

    Otherwise a run that is killed before it has come as far again would go on from one of those.

    Raises:
        OSError: One could not be removed.
    """
    directory = Path(directory)
    later = [entry for entry in _entries(directory) if entry.step > step]
    for entry in later:
        _remove(directory / entry.name)
    if later:
        _sync_folder(directory)


# What is in a checkpoint


class _Unusable(Exception):
    """A checkpoint does not verify."""


class _Unreadable(_Unusable):
    """The system would not let us look, which says nothing of what is there."""


class _Manifest(NamedTuple):
    best: bool
    files: dict[str, tuple[int, str]]
    """Size and sha256."""


def _encode(
    step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a checkpoint by name, but for the manifest."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise InputError("step", step, "must be an integer >= 0 and < 10^18")
    return {TENSORS: _tensors_to_bytes(tensors), STATE: _values_to_bytes(values)}


def _verified(path: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and values; no byte is parsed before its size and hash are right."""
    manifest = _read_manifest(path, step)
    contents = {}
    for name, (size, sha256) in manifest.files.items():
        contents[name] = _read(path / name, size)
        if not _same(_sha256(contents[name]), sha256):
            raise _Unusable(f"{path / name}: its sha256 is not the one in {MANIFEST}")
    values = _values_from_bytes(path / STATE, contents[STATE])
    return _tensors_from_bytes(path / TENSORS, contents[TENSORS]), values


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _same(found: str, stored: str) -> bool:
    return found == stored


def _manifest_to_bytes(step: int, manifest: _Manifest) -> bytes:
    tree = {
        "format": FORMAT,
        "step": step,
        "best": manifest.best,
        "files": {n: {"size": s, "sha256": h} for n, (s, h) in manifest.files.items()},
    }
    return (json.dumps(tree, indent=1) + "\n").encode()


def _read_manifest(path: Path, step: int) -> _Manifest:
    """The manifest of the checkpoint at ``path``, which must be in every byte what we write."""
    if not stat.S_ISDIR(_status(path).st_mode):
        raise _Unusable(f"{path}: is not a folder")
    where = path / MANIFEST
    data = _read(where)
    tree = _parse(where, data)
    if isinstance(tree, dict) and isinstance(tree.get("format"), int) and tree["format"] != FORMAT:
        raise _Unusable(f"{where}: is of format {tree['format']}; this rnngrad reads {FORMAT}")
    try:
        files = {
            name: (tree["files"][name]["size"], tree["files"][name]["sha256"])
            for name in (TENSORS, STATE)
        }
        manifest = _Manifest(tree["best"], files)
        ours = _manifest_to_bytes(step, manifest) == data
    except (TypeError, KeyError, RecursionError):
        ours = False
    if not ours or type(manifest.best) is not bool or {type(s) for s, _ in files.values()} != {int}:
        raise _Unusable(f"{where}: is not the manifest of step {step}")
    if files[STATE][0] > STATE_LIMIT:
        raise _Unusable(f"{path / STATE}: is said to have {files[STATE][0]} bytes, too many")
    return manifest


def _whole(path: Path, step: int) -> _Manifest | None:
    """The manifest, if the files have the sizes that it says; their bytes are not looked at."""
    try:
        manifest = _read_manifest(path, step)
        for name, (size, _) in manifest.files.items():
            _check_size(path / name, _status(path / name), size)
    except _Unreadable:
        raise
    except _Unusable:
        return None
    return manifest


def _marked_best(path: Path, step: int) -> bool:
    try:
        manifest = _whole(path, step)
    except _Unreadable:
        return False
    return manifest is not None and manifest.best


def _tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """As safetensors has them; what shares memory is written once for each name."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        if name == "__metadata__" or not _is_utf8(name):
            raise InputError("tensors", repr(name), "is not a name that safetensors can store")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise InputError(f"tensors[{name}]", kind, "must be dense, of a dtype in DTYPES")
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if memory in seen else tensor  # safetensors refuses shared
        seen.add(memory)
    data = safetensors.torch.save(packed)
    if _header_length(data) > HEADER_LIMIT:
        raise InputError("tensors", MISSING, f"{len(packed)} tensors are too many for one file")
    return data


def _tensors_from_bytes(path: Path, data: bytes) -> dict[str, Tensor]:
    length = _header_length(data)
    if length > min(HEADER_LIMIT, len(data) - 8):
        raise _Unusable(f"{path}: its header is said to have {length} bytes")
    _parse(path, data[8 : 8 + length])  # safetensors takes the last of names that are there twice
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # its own, and KeyError, RuntimeError, AssertionError of its loader
        raise _Unusable(f"{path}: is not a safetensors file ({error})") from None


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# state.json is strict JSON. A float that is not finite is {"$float": its 16 hexadecimal digits}, a
# very long integer {"$int": "0x..."} (Python limits decimal ones), and a "$" at the beginning of a
# key is doubled.

_INT_BITS = 1024


def _values_to_bytes(values: Mapping[str, Any]) -> bytes:
    tree = _plain(dict(values), "values", 0)
    data = json.dumps(tree, sort_keys=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    if len(data) > STATE_LIMIT:
        raise InputError("values", MISSING, f"have {len(data)} bytes; {STATE_LIMIT} are allowed")
    return data


def _values_from_bytes(path: Path, data: bytes) -> dict[str, Any]:
    values = _parse(path, data, _tagged)
    if not isinstance(values, dict):
        raise _Unusable(f"{path}: is not a mapping")
    return values


def _plain(value: Any, key: str, depth: int) -> Any:
    """``value`` in what JSON has; only what comes back as it was."""
    if depth > DEPTH_LIMIT:
        raise InputError(key[:60], MISSING, f"is nested in more than {DEPTH_LIMIT} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _is_utf8(value):
            raise InputError(key, repr(value), "is not a text that UTF-8 can write")
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _INT_BITS else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, list):
        return [_plain(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        if not all(isinstance(name, str) and _is_utf8(name) for name in value):
            raise InputError(key, MISSING, "has a key that is not a text that UTF-8 can write")
        return {
            f"${name}" if name.startswith("$") else name: _plain(item, f"{key}.{name}", depth + 1)
            for name, item in value.items()
        }
    kind = type(value).__name__
    raise InputError(key, MISSING, f"is a {kind}, which would not come back as one")


def _tagged(pairs: Pairs) -> Any:
    """An object of state.json: a mapping, or the number that a tag stands for."""
    tree = unique(pairs)
    if len(tree) == 1:
        ((name, text),) = tree.items()
        if name == "$float" and isinstance(text, str) and re.fullmatch("[0-9a-f]{16}", text):
            return struct.unpack(">d", bytes.fromhex(text))[0]
        if name == "$int" and isinstance(text, str) and re.fullmatch("-?0x[0-9a-f]+", text):
            return int(text, 16)
    for name in tree:
        if name.startswith("$") and not name.startswith("$$"):
            raise ValueError(f"unknown tag {name}")
    return {name.removeprefix("$") if name[:1] == "$" else name: tree[name] for name in tree}


def _parse(path: Path, data: bytes, mapping: Callable[[Pairs], Any] = unique) -> Any:
    try:
        return json_tree(data, mapping)
    except ValueError as error:
        raise _Unusable(f"{path}: {error}") from None


# Files and folders

_NAME = re.compile(r"step-([0-9]{9,18})(?:\.([1-9][0-9]{0,8}))?")
_STAGING = re.compile(r"\.step-[0-9]+(?:\.[0-9]+)?\.tmp-([1-9][0-9]{0,9})")


class _Entry(NamedTuple):
    step: int
    generation: int

    @property
    def name(self) -> str:
        return f"step-{self.step:09}" + (f".{self.generation}" if self.generation else "")


def _entries(directory: Path) -> list[_Entry]:
    """What bears a checkpoint's name, the newest first."""
    found = []
    for name in os.listdir(directory):
        if match := _NAME.fullmatch(name):
            entry = _Entry(int(match[1]), int(match[2] or 0))
            found += [entry] if entry.name == name else []  # 0000000007 is none of ours
    return sorted(found, reverse=True)


def _write(
    directory: Path, step: int, contents: Mapping[str, bytes], keep: int, best: bool
) -> Path:
    """Writes a checkpoint's files, gives them their name, and removes what is then superfluous."""
    files = {name: (len(data), _sha256(data)) for name, data in contents.items()}
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    there = _entries(directory)
    if not there:
        _sync_folder(directory.parent)
    entry = _Entry(step, 0)
    for before in [entry for entry in there if entry.step == step][:1]:
        entry = _Entry(step, before.generation + 1)
        best |= _marked_best(directory / before.name, step)  # the same state, saved once more
    path = directory / entry.name
    _sweep(directory)
    staging = _staging(path)
    try:
        os.mkdir(staging)
        for name, data in contents.items():
            _write_file(staging / name, data)
        _write_file(staging / MANIFEST, _manifest_to_bytes(step, _Manifest(best, files)))
        _sync_folder(staging)
        os.rename(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the next save tries again
            _remove(staging)
        raise
    _sync_folder(directory)
    try:
        _purge(directory, entry, keep)
    except (OSError, _Unreadable) as error:
        log.warning("older checkpoints not removed: %s", one_line(str(error)))
    return path


def _purge(directory: Path, saved: _Entry, keep: int) -> None:
    """Removes what is neither among the last ``keep`` nor the best before them.

    A checkpoint that lacks a file, or part of one, does not count; an error in looking leaves all.
    """
    counted: set[int] = set()
    best = False
    for entry in _entries(directory):
        if entry > saved or (keep == 0 and entry.step < saved.step):
            continue
        manifest = _whole(directory / entry.name, entry.step)
        replaced = entry.step in counted
        stays = not replaced and (keep == 0 or len(counted) < keep)
        if manifest is not None and not replaced:
            if manifest.best and not stays and not best:
                stays = best = True
            counted.add(entry.step)
        if not stays:
            _remove_or_log(directory / entry.name)


def _sweep(directory: Path) -> None:
    """Removes what this process and dead ones began to write, or to remove."""
    for name in os.listdir(directory):
        match = _STAGING.fullmatch(name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            _remove_or_log(directory / name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _remove_or_log(path: Path) -> None:
    try:
        _remove(path)
    except OSError as error:
        log.warning("checkpoint not removed: %s", one_line(str(error)))


def _remove(path: Path) -> None:
    """Removes a folder, first from sight; a link is removed itself, never what it points to."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif path.name.startswith("."):
            shutil.rmtree(path)
        else:
            shutil.rmtree(path.rename(_staging(path)))
    except OSError as error:  # rmtree's names no path
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read(path: Path, size: int | None = None) -> bytes:
    """A file's bytes: ``size`` of them, or as many as a manifest may have."""
    _check_size(path, _status(path), size)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with _opened(path, flags) as file:
            size = _check_size(path, os.fstat(file), size)
            with os.fdopen(file, "rb", closefd=False) as stream:
                data = stream.read(size + 1)
    except OSError as error:
        raise _Unreadable(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise _Unusable(f"{path}: has {size} bytes, which is more than there is memory") from None
    if len(data) != size:
        raise _Unusable(f"{path}: is being changed")
    return data


def _check_size(path: Path, status: os.stat_result, size: int | None) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise _Unusable(f"{path}: is not a file")
    if size is None and status.st_size > MANIFEST_LIMIT:
        raise _Unusable(f"{path}: has {status.st_size} bytes; {MANIFEST_LIMIT} are allowed")
    if size is not None and status.st_size != size:
        raise _Unusable(f"{path}: has {status.st_size} bytes in place of {size}")
    return status.st_size


def _status(path: Path) -> os.stat_result:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise _Unusable(f"{path}: is missing") from None
    except OSError as error:
        raise _Unreadable(f"{path}: {error.strerror}") from None
    if stat.S_ISLNK(status.st_mode):
        raise _Unusable(f"{path}: is a symbolic link")
    return status


def _write_file(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with _opened(path, flags) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]  # a nearly full disk takes a part
        os.fsync(file)


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder outlive a power cut."""
    with _opened(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)) as folder:
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not a thing on this file system
                raise


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor, whose errors name the path."""
    try:
        file = os.open(path, flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _check_keep(keep: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0 or keep == 1:
        raise InputError("keep", keep, "must be an integer >= 2, or 0 to keep all")


def _listed(directory: Path, reasons: list[str]) -> str:
    """Why each was passed over, the newest first; of many, how many they are, and why some were."""
    if len(reasons) <= _NAMED:
        return "; ".join(reasons)
    newest = "; ".join(reason.removeprefix(f"{directory}/") for reason in reasons[:_NAMED])
    return f"none of the {len(reasons)} in {directory}, of which the newest: {newest}"
