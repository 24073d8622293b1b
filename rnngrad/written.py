"""Writing what lies in a run directory: whole or appended to, and every error names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Appended:
    """A file that is only ever appended to, from where it ends now.

    Every error names it: those of Python's own files do not, and a full disk is told of by
    whichever write comes next.

    Args:
        path: Is made if it is missing; a link is not followed.

    Raises:
        OSError: From every method too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self._file = open(path, "ab", opener=without_links)
            self._status = os.fstat(self._file.fileno())

    def write(self, data: bytes) -> None:
        """Appends, in memory for the time being."""
        with naming(self.path):
            self._file.write(data)

    def flush(self) -> None:
        """Hands over to the system what was written."""
        with naming(self.path):
            self._file.flush()

    def is_in_place(self) -> bool:
        """Whether the file at its path is still this one, and not another run's by now.

        Raises:
            OSError: There is none.
        """
        return os.path.samestat(self._status, os.stat(self.path))

    def sync(self) -> None:
        """Makes what was flushed outlive a power cut; from any thread."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes; an error leaves it closed too."""
        with naming(self.path):
            self._file.close()


def replace(path: Path, text: str, *, lasting: bool = False) -> None:
    """Writes ``path`` whole or not at all; what was to become it is not left behind.

    Only who holds the run's lock may.

    Args:
        path: Is replaced.
        text: In UTF-8.
        lasting: It is to outlive a power cut: nothing else has it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb", opener=without_links) as file:
                file.write(text.encode())
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if lasting:
            _sync_folder(path.parent)
            _sync_folder(path.parent.parent)


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder outlive a power cut, where the system can."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in ``with`` name ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def without_links(path: str, flags: int) -> int:
    """An opener for ``open`` that does not follow a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
