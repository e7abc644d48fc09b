"""One run to a folder at a time: a lock that ends with the process that has it, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from scaletrain.errors import UserError

LOCK = ".lock"


class Claim:
    """Holds a run folder, which must exist, until `release` or the end of the process.

    A record lock, which children do not inherit and which works over NFS. Raises UserError when another process has it.
    """

    def __init__(self, folder: Path):
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.pread(self._file, 100, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise UserError(
                f"another process ({owner or 'unknown'}) is training in {folder}. Wait for it, or choose another "
                "--run NAME."
            ) from None
        except OSError:  # a file system without locks
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.uname().nodename}, PID {os.getpid()}".encode(), 0)

    def release(self) -> None:
        """Let go."""
        os.close(self._file)
