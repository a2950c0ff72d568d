"""A log in a file whose disk may be full."""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path


class LogFile(logging.Handler):
    """Appends a line per message to a file, each written at once; a full disk ends nothing.

    Args:
        path: Of the file.
        formatter: Makes the line.
        tell: Is given one sentence when a line could not be written.
    """

    def __init__(
        self, path: Path, formatter: logging.Formatter, tell: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._path = path
        self._tell = tell
        self._told = False
        self._file: io.FileIO | None = None
        #: What stands between the last line and the next one: an end of line, if a full disk or a
        #: killed process left half a line.
        self._between = b""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        text = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            if self._file is None:
                self._file = self._open()
            line = self._between + text
            if self._file.write(line) < len(line):
                self._between = b"\n"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._between = b""
        except OSError as error:
            if not self._told:
                self._told = True
                self._tell(f"WARNING {self._path}: is not written, the work goes on: {error}")

    def _open(self) -> io.FileIO:
        """The file; a last line that has no end gets one."""
        file = io.FileIO(self._path, "a+")
        if file.seek(0, os.SEEK_END) > 0 and file.seekable():
            file.seek(-1, os.SEEK_END)
            self._between = b"" if file.read(1) == b"\n" else b"\n"
        return file

    def close(self) -> None:
        """Close the file; nothing is left to write."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()
