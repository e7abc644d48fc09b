"""EleutherAI's evaluation harness (lm-eval), on a network and a tokenizer as they are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletrain.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def check_installed() -> None:
    """Raise UserError that says how to install the harness."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"--lm-eval needs EleutherAI's harness ({error}): pip install lm-eval") from error


def run_tasks(model: nn.Module, tokenizer: Any, tasks: Sequence[str], batch: int) -> dict[str, float]:
    """Return the figures of tasks, as `TASK/METRIC`.

    tasks: names that the harness knows, or YAML files of tasks of one's own. Raises UserError for one that it has not.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(path.parent) for path in files] or None)
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing:
        raise UserError(f"--lm-eval: the harness has no task {', '.join(missing)}; `lm-eval ls tasks` lists them.")
    adapted = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(model=adapted, tasks=names, task_manager=manager, bootstrap_iters=0)
    return {
        f"{task}/{metric.removesuffix(',none').replace(',', '_')}": float(value)
        for task, own in found["results"].items()
        for metric, value in own.items()
        if isinstance(value, (int, float)) and "stderr" not in metric
    }
