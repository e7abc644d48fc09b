"""The model card: README.md with what the Hub reads at its head, and how the network was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scaletrain.callbacks.log import read
from scaletrain.checkpoint import reader
from scaletrain.checkpoint.layout import METRICS, RECIPE
from scaletrain.config import NetworkSpec
from scaletrain.finished import FinishedStage

TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
}


def write_card(
    folder: Path,
    run: FinishedStage,
    spec: NetworkSpec,
    kind: str | None,
    base: Mapping[str, Any] | None,
    notes: Sequence[str],
    snippet: Sequence[str] = (),
) -> None:
    """Write README.md beside the weights. Files of the user's machine are given by their names alone.

    kind: the class of transformers, if it has one. base: of an adapter, what it goes over. notes: of the parity gate.
    snippet: how it is used, if not as transformers' networks are.
    """
    recipe, manifest = run.stage.recipe, reader.manifest(run.checkpoint)
    origin = _origin(base["path"] if base else spec.path)
    task = next((task for end, task in TASKS.items() if kind and kind.endswith(end)), None)
    adapter = spec.adapter.type if spec.adapter else None
    head = {
        "base_model": origin,
        "license": _license(base["path"] if base else spec.path),
        "library_name": "peft" if base else "transformers" if kind else "diffusers" if snippet else "scaletrain",
        "pipeline_tag": task,
        "tags": [word for word in ("scaletrain", recipe.objective.type, adapter) if word],
    }
    made = f"{'Trained' if origin is None else f'`{origin}`, trained further'} by scaletrain"
    how = f" through an adapter ({adapter})" if adapter else ""
    lines = ["---", yaml.safe_dump({k: v for k, v in head.items() if v is not None}, sort_keys=False).strip(), "---"]
    lines += ["", f"# {run.folder.name}", "", f"{made}{how}: objective `{recipe.objective.type}`, step "]
    lines[-1] += f"{manifest['step']:,} of the run, stage `{manifest['stage']}`."
    if kind or snippet:
        lines += ["", "## Load it", "", "```python", *(snippet or _snippet(str(kind), base)), "```"]
    lines += ["", "## Evaluation", "", *_metrics(run.folder / METRICS)]
    lines += ["", "## Data", "", *_data(run)]
    lines += ["", "## How it was checked", "", *(f"* {note}" for note in notes)]
    lines += ["", "## Recipe", "", f"The whole recipe is in the export's `{RECIPE}`."]
    lines += ["", *(f"* {name} {number}" for name, number in manifest["versions"].items()), ""]
    (folder / "README.md").write_text("\n".join(lines))


def _origin(path: str | None) -> str | None:
    """Return a base network's id on the Hub, or its folder's name."""
    return path and (Path(path).name if Path(path).exists() or path.startswith(("/", ".", "~")) else path)


def _license(path: str | None) -> str | None:
    """Return the license in the model card of a base network's folder, if it tells one."""
    card = Path(path) / "README.md" if path else None
    text = card.read_text(errors="replace") if card and card.exists() else ""
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    return facts.get("license") if isinstance(facts, dict) else None


def _snippet(kind: str, base: Mapping[str, Any] | None) -> list[str]:
    lines = [f"from transformers import AutoTokenizer, {kind}", ""]
    if base is None:
        lines.append(f'model = {kind}.from_pretrained("FOLDER")')
    else:
        options = "".join(f", {key}={value!r}" for key, value in base["options"].items())
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = {kind}.from_pretrained("{_origin(base["path"])}"{options})')
        lines.append('model = PeftModel.from_pretrained(base, "FOLDER")')
    return [*lines, 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")']


def _metrics(path: Path) -> list[str]:
    """Return the figures of the last evaluation."""
    last = next((record for record in reversed(list(read(path))) if record["kind"] == "evaluate"), None)
    if last is None:
        return ["There was none."]
    figures = {k: v for k, v in last.items() if isinstance(v, float)}
    lines = [f"At step {last['step']:,}:", "", "| metric | value |", "|---|---|"]
    return [*lines, *(f"| {name} | {value:.6g} |" for name, value in figures.items())]


def _data(run: FinishedStage) -> list[str]:
    spec = run.stage.recipe.data
    facts = reader.state(run.checkpoint)["progress"]["facts"]
    named = {"trained on": spec.train, "evaluated on": spec.eval or []}
    lines = [f"* {what} `{_origin(source.path)}`" for what, sources in named.items() for source in sources]
    return lines + [f"* fingerprint of {name}: `{value}`" for name, value in facts.items()]
