"""Copies of a run's checkpoints at any fsspec URL. The store may fail; the run goes on and tries again.

URL/<run>/recipe.yaml  metrics.jsonl  step-00001000/...

A checkpoint is complete there when it has its manifest, which is sent last and removed first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from scaletrain.checkpoint.integrity import verify
from scaletrain.checkpoint.layout import MANIFEST, METRICS, RECIPE, checkpoints, is_step, point
from scaletrain.checkpoint.writer import facts_of, superfluous
from scaletrain.errors import UserError

log = logging.getLogger("scaletrain")


class Remote:
    """The copies of one run; for rank 0. keep: as `checkpoint.keep`.

    Raises UserError for a URL that no installed file system knows.
    """

    def __init__(self, url: str, folder: Path, keep: int):
        from fsspec.core import url_to_fs

        try:
            self._fs, path = url_to_fs(url)
        except (ValueError, ImportError, OSError) as error:
            raise UserError(f"checkpoint.remote: {url} cannot be used: {error}") from error
        self.url, self.folder, self.keep = url, folder, keep
        self._root = f"{path.rstrip('/')}/{folder.name}"
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = False
        self._failure: str | None = None
        self.in_use: frozenset[str] = frozenset()
        """Names of the checkpoints that are being sent: they must not be removed yet."""

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Have the newest checkpoint, and older ones that stay and are not there, copied in the background."""
        with self._lock:
            self._asked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="scaletrain-remote", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait until all is sent, and say so if it could not be."""
        thread = self._thread
        if thread is not None:
            thread.join()
        if self._failure:
            log.error(
                "checkpoint.remote: %s lacks the newest checkpoint (%s). It is in %s; the same command sends it again",
                *(self.url, self._failure, self.folder),
            )

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._asked:
                    self._thread = None
                    return
                self._asked = False
            try:
                self._send_all()
                self._failure = None
            except Exception as error:  # stores share no narrower base class; training goes on whatever it is
                self._failure = f"{type(error).__name__}: {error}"
                log.warning("checkpoint.remote: cannot write to %s (%s); tried again later", self.url, self._failure)
            finally:
                self.in_use = frozenset()

    def _send_all(self) -> None:
        here = checkpoints(self.folder)
        if not here:
            return
        lasting = [p for p in here[:-1] if any(facts_of(p).get(k) for k in ("complete", "kept", "best"))]
        for name in (RECIPE, METRICS):  # before the checkpoint, which nobody could go on from without the recipe
            if (self.folder / name).exists():
                self._fs.makedirs(self._root, exist_ok=True)
                self._fs.put_file(str(self.folder / name), f"{self._root}/{name}")
        for path in (here[-1], *reversed(lasting)):
            self.in_use = frozenset((path.name,))
            if self._facts(path.name) != facts_of(path):
                self._send(path)
        there = [(name, self._facts(name)) for name in self._names()]
        for name in superfluous([(name, facts) for name, facts in there if facts], self.keep):
            if name != here[-1].name:
                self._remove(name)

    def _send(self, path: Path) -> None:
        """Copy a checkpoint, its manifest last."""
        self._remove(path.name)
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        try:
            for name in (*(n for n in files if n != MANIFEST), MANIFEST):
                target = f"{self._root}/{path.name}/{name}"
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(path / name), target)
        except FileNotFoundError:
            if path.exists():
                raise
            self._remove(path.name)  # retention was faster

    def _remove(self, name: str) -> None:
        folder = f"{self._root}/{name}"
        if self._fs.exists(f"{folder}/{MANIFEST}"):
            self._fs.rm_file(f"{folder}/{MANIFEST}")
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)

    # --- looking ------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Return the folders of checkpoints that are there, oldest first, complete or not."""
        self._fs.invalidate_cache()
        try:
            found = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted((name for name in found if is_step(name)), key=lambda name: (len(name), name))

    def _facts(self, name: str) -> Mapping[str, Any]:
        """Return the manifest of a checkpoint there; nothing when it is not complete."""
        try:
            content: dict[str, Any] = json.loads(self._fs.cat_file(f"{self._root}/{name}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):
            return {}
        return content

    # --- fetching -----------------------------------------------------------------------------------------------------

    def fetch(self, check: Callable[[Path], None]) -> bool:
        """Copy the newest checkpoint that verifies to the run's folder, with the best and the ends of stages.

        check: is given the recipe that is there before anything is kept, and raises when it is another. Returns
        whether there was any. Raises UserError when the store cannot be read, or holds checkpoints none of which
        verifies; then nothing is kept. Checkpoints get their names at the end, the newest last: as long as there is
        none, the same command fetches again.
        """
        hidden = self.folder / ".saving-fetched"
        existed = self.folder.exists()
        try:
            found = [(name, facts) for name in self._names() if (facts := self._facts(name))]
            if not found:
                return False
            log.info("fetching the newest checkpoint from %s/%s", self.url, self.folder.name)
            with tempfile.TemporaryDirectory() as place:
                recipe = Path(place) / RECIPE
                self._fs.get_file(f"{self._root}/{RECIPE}", str(recipe))
                check(recipe)
                content = recipe.read_bytes()
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RECIPE).write_bytes(content)  # makes it the folder of a run, should this one be killed
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            taken = next((i for i in reversed(range(len(found))) if self._fetch(found[i][0], hidden)), None)
            if taken is None:
                raise UserError(f"checkpoint.remote: no checkpoint in {self.url}/{self.folder.name} verifies.")
            best = next((name for name, facts in reversed(found[: taken + 1]) if facts.get("best")), None)
            wanted = [name for name, facts in found[:taken] if facts.get("complete") or name == best]
            names = [*(name for name in wanted if self._fetch(name, hidden)), found[taken][0]]
            if self._fs.exists(f"{self._root}/{METRICS}"):
                self._fs.get_file(f"{self._root}/{METRICS}", str(hidden / METRICS))
                (hidden / METRICS).replace(self.folder / METRICS)
            for name in names:
                (hidden / name).rename(self.folder / name)
            point(self.folder / "latest", names[-1])
            return True
        except UserError:
            raise
        except Exception as error:  # stores share no narrower base class
            raise UserError(
                f"checkpoint.remote: {self.url} cannot be read ({type(error).__name__}: {error})."
            ) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            if not existed and not checkpoints(self.folder):
                for name in (RECIPE, METRICS):
                    (self.folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def exists(self) -> bool:
        """Say whether there is a checkpoint of this run."""
        return any(self._facts(name) for name in self._names())

    def _fetch(self, name: str, hidden: Path) -> bool:
        """Copy one checkpoint to `hidden`. Returns False, and says why, when it does not verify."""
        folder = f"{self._root}/{name}"
        for path in self._fs.find(folder):
            relative = PurePosixPath(path[path.index(folder) + len(folder) + 1 :])
            if relative.is_absolute() or ".." in relative.parts:
                raise UserError(f"checkpoint.remote: {path} is no file of a checkpoint.")
            target = hidden / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(path, str(target))
        faults = verify(hidden / name)
        if faults:
            log.warning(
                "%s/%s/%s is damaged and is passed over: %s", self.url, self.folder.name, name, "; ".join(faults)
            )
            return False
        return True
