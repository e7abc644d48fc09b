"""Bytes from stores: what fails is tried again, and files that must be whole are copied to the local cache.

The cache is `<cache>/shards`, shared by all processes of a machine. A copy stands there under the name of its origin's
version; the one that was used least recently goes first when the limit is passed. Readers open a copy for each read
and hold it open meanwhile, so a copy that is removed under them stays readable, and is fetched again the next time.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from scaletrain.data.cache import cache_root, content_key, locked
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.data.tables import File

T = TypeVar("T")
log = logging.getLogger("scaletrain")

WAITS = (0.5, 1.5, 4.5)
"""Seconds before each of the three retries."""
COMPRESSED = (".gz", ".zst", ".zstd")
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "checksum", "generation", "mtime", "LastModified", "created")
"""What the file systems call the version of a file, the surest first."""
_LOCKS = 64
_ABANDONED_SECONDS = 3600.0


def attempt(label: str, action: Callable[[], T], retry: bool = True) -> T:
    """Do something that reads `label`; where it fails, try again three times. Raises UserError that names it."""
    for wait in (*(WAITS if retry else ()), None):
        try:
            return action()
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"`{label}` is not there (any more)") from error
        except Exception as error:  # the clients of stores let through what their libraries raise
            reason = str(error) or type(error).__name__
            if wait is None:
                tries = f" after {len(WAITS)} retries" if retry else ""
                raise UserError(f"`{label}` cannot be read{tries}: {reason}") from error
            log.warning("`%s` cannot be read, trying again in %s s: %s", label, wait, reason)
            time.sleep(wait)
    raise AssertionError


def decompressed(stream: Any, name: str) -> Any:
    """Return a stream of what is compressed in `stream`, by the ending of its name."""
    if name.lower().endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=stream)
    import pyarrow as pa

    return pa.CompressedInputStream(stream, "zstd")


class Version(NamedTuple):
    """A file at the time when a run began."""

    size: int
    stamp: str
    """The store's token of the content, or the time of its last change."""


def version(file: File) -> Version:
    """Ask for the version of a file. Raises UserError that names it."""
    if file.local:
        status = attempt(file.label, lambda: os.stat(file.path), retry=False)
        # What copies and unpacks files may give them an old time of change; none sets the time of the inode's.
        return Version(status.st_size, f"{status.st_mtime_ns} {status.st_ctime_ns}")
    info = attempt(file.label, lambda: _own(file).info(file.path))
    return Version(int(info["size"]), next((f"{k} {info[k]}" for k in _VERSIONS if info.get(k)), ""))


def _own(file: File) -> Any:
    """Return the file system of a file as this process may use it: some keep a thread, which no fork takes along."""
    fs = file.fs
    if getattr(fs, "_pid", os.getpid()) == os.getpid():
        return fs
    return type(fs)(*fs.storage_args, **fs.storage_options)


class Ranges(io.RawIOBase):
    """A remote file of which each read fetches just the bytes that are asked for."""

    def __init__(self, file: File, size: int):
        self._file, self._size, self._at = file, size, 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Fetch bytes. Raises UserError that names the file."""
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        content: bytes = attempt(self._file.label, lambda: _own(self._file).cat_file(self._file.path, self._at, stop))
        self._at += len(content)
        return content


def opened(file: File, of: Version, limit: int) -> BinaryIO:
    """Open a file, or its local copy if it is remote or compressed, for reading at any place.

    limit: bytes that the cache may take. Raises UserError that names the file.
    """
    if file.local and not file.path.lower().endswith(COMPRESSED):
        return attempt(file.label, lambda: open(file.path, "rb"), retry=False)  # the caller closes it
    folder = cache_root() / "shards"
    path = folder / content_key(file.label if not file.local else file.path, of)
    while True:
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            _fetch(file, of, path, limit)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
            return stream


def exact(stream: BinaryIO, start: int, stop: int, label: str) -> bytes:
    """Read the bytes from start to stop. Raises UserError when the file has become shorter."""
    stream.seek(start)
    content = attempt(label, lambda: stream.read(stop - start), retry=False)
    if len(content) < stop - start:
        raise UserError(f"`{label}` is shorter than when it was indexed: it ends before byte {stop:,}")
    return content


def _fetch(file: File, of: Version, path: Path, limit: int) -> None:
    """Copy a file of some version to the cache, decompressed, under its final name once it is whole."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{int(path.name[:8], 16) % _LOCKS}.lock"):
            if path.exists():
                return
            handle, name = tempfile.mkstemp(prefix=".part-", dir=folder)
            try:
                with open(handle, "wb") as out:
                    attempt(file.label, lambda: _copy(file, out), retry=not file.local)
                    if version(file) != of:  # the copy would stand there as something else
                        raise UserError(f"`{file.label}` has changed since it was indexed: run the same command again")
                    out.flush()
                    os.fsync(out.fileno())
                os.chmod(name, 0o644)  # mkstemp hides it from the other users of a shared cache
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
            _evict(folder, limit, path)
    except OSError as error:
        raise UserError(f"the cache cannot be written: {error}. Set SCALETRAIN_CACHE to another folder.") from error


def _copy(file: File, out: BinaryIO) -> None:
    out.seek(0)
    out.truncate()
    with _own(file).open(file.path, "rb") as stream:
        source = decompressed(stream, file.path) if file.path.lower().endswith(COMPRESSED) else stream
        try:
            shutil.copyfileobj(source, out, 1 << 20)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"no room for a copy of `{file.label}` in {cache_root()}: {error.strerror}. Set a smaller "
                    "`cache_gb` of the source, or SCALETRAIN_CACHE to another folder."
                ) from error
            raise


def _evict(folder: Path, limit: int, newest: Path) -> None:
    """Remove what was used least recently, but the newest copy, and what killed processes left half written."""
    known = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.name.startswith(".part-"):
                if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
            elif path.suffix != ".lock" and path != newest:
                known.append((status.st_mtime, status.st_size, path))
    total = newest.stat().st_size + sum(size for _, size, _ in known)
    for _, size, path in sorted(known):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
