"""TensorBoard's event files, written by whoever adds to them."""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from pathlib import Path

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from rnngrad.written import Appended

_NUMBER = itertools.count()


class EventFile:
    """A new event file in a directory, after those that lie there already.

    torch's ``FileWriter`` does the same in a thread, where a full disk ends in a traceback on the
    terminal, and an error that nobody is told of before the next event.

    Args:
        directory: Of the run, or of the part of a sweep's summary; is made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = Appended(directory / _name(directory))
        self.add(Event(file_version="brain.Event:2"))
        self.flush()

    def add(self, event: Event) -> None:
        """Writes an event, as of now."""
        event.wall_time = time.time()
        self._file.write(_record(event.SerializeToString()))

    def add_summary(self, summary: Summary, step: int = 0) -> None:
        """Writes scalars, histograms, pictures or texts of a step."""
        self.add(Event(summary=summary, step=step))

    def flush(self) -> None:
        """Hands over to the system what was written, which is where TensorBoard reads it."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


def _record(data: bytes) -> bytes:
    """Bytes as a record: length, its checksum, the bytes, theirs.

    TensorBoard's own writer takes a tenth of a second for the checksum of a picture.
    """
    header = struct.pack("<Q", len(data))
    return header + _checksum(header) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked, since a checksum of what contains its own says little (TFRecord format)."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def event_files(directory: Path) -> list[Path]:
    """A directory's event files, in the order in which TensorBoard reads them."""
    return sorted(directory.glob("events.out.tfevents.*"))


def _name(directory: Path) -> str:
    """One that comes after the others, as TensorBoard reads in this order and never goes back.

    The clock alone does not see to that: it may have been set back, and within one second numbers
    of processes decide, the tenth file of one coming before its second.
    """
    seconds = int(time.time())
    for path in event_files(directory):
        if match := re.match(r"events\.out\.tfevents\.([0-9]{10})\.", path.name):
            seconds = max(seconds, int(match[1]) + 1)
    unique = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBER)}"
    return f"events.out.tfevents.{seconds:010}.{unique}"
