"""TensorBoard, Weights & Biases or trackio, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletrain.callbacks.base import Observer
from scaletrain.config import Recipe
from scaletrain.errors import UserError


class Trackers(Observer):
    """Sends the figures of metrics.jsonl to each tracker of `log.trackers`."""

    def __init__(self, recipe: Recipe, folder: Path):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = {str(t) for t in get_available_trackers()}
        self._trackers = []
        for name in recipe.log.trackers:
            if name not in available:
                raise UserError(f"log.trackers: {name} is not installed: pip install {name}")
            cls = LOGGER_TYPE_TO_CLASS[name]
            options = {"logging_dir": folder} if cls.requires_logging_directory else {}
            tracker = cls(folder.name, **options)
            if hasattr(tracker, "start"):
                tracker.start()
            self._trackers.append(tracker)

    def _send(self, record: Mapping[str, Any], prefix: str) -> None:
        values = {prefix + k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=record["step"])

    def step(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Send a logged step."""
        if record:
            self._send(record, "train/")

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """Send an evaluation."""
        self._send(record, "eval/")

    def end(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()
