"""A step of our loop against a raw PyTorch loop, and transformers' Trainer against the same raw loop.

Both loops train the same tiny Llama on the same batches in one process, taking turns step by step, so that the
machine's noise hits both alike; the figure is the median over steps of (loop's step / raw step beside it).

    python benchmarks/step_time.py [--steps 60] [--hidden 256] [--layers 4] [--batch 8] [--length 256]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain.callbacks.base import Observer

ARCHITECTURE = {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 512}


def recipe_file(folder: Path, options: argparse.Namespace) -> Path:
    """Write a recipe over synthetic text, and the text."""
    words = [f"w{i}" for i in range(500)]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(500, (options.batch * options.length * 60,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(words[i] for i in picks))
    width = options.hidden
    path = folder / "recipe.yaml"
    path.write_text(f"""
objective: {{type: causal_lm, tokenizer: {{vocab_size: 700}}}}
networks: {{model: {{config: {{model_type: llama, hidden_size: {width}, intermediate_size: {width * 3},
  num_hidden_layers: {options.layers}, num_attention_heads: 4, num_key_value_heads: 4, vocab_size: 4096}}}}}}
players: {{model: {{optimizer: {{type: adamw, lr: 1.0e-4, weight_decay: 0.1}}, clip: 1.0}}}}
data: {{train: {folder / "text.txt"}, seq_len: {options.length}}}
train: {{duration: {options.steps} steps, global_batch: {options.batch}}}
checkpoint: {{every: 1_000_000 steps}}
evaluate: {{samples: 0}}
log: {{every: 10}}
""")
    return path


class Raw:
    """What a person would write by hand: forward, loss, backward, clip, step."""

    def __init__(self, model: nn.Module):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one step. Returns its seconds."""
        started = time.perf_counter()
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


class Pairing(Observer):
    """After each step of our loop, takes a raw one."""

    def __init__(self, raw: Raw, inputs: torch.Tensor, labels: torch.Tensor):
        self.raw, self.inputs, self.labels = raw, inputs, labels
        self.pairs: list[tuple[float, float]] = []
        self.began = time.perf_counter()

    def step(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Note both times."""
        ours = time.perf_counter() - self.began
        torch.manual_seed(0)
        self.pairs.append((ours, self.raw.step(self.inputs, self.labels)))
        self.began = time.perf_counter()

    def ratio(self, skip: int = 5) -> tuple[float, float, float]:
        """Return the median ratio and the medians in milliseconds, leaving the first steps out."""
        pairs = self.pairs[skip:-1]
        middle = statistics.median
        return middle(a / b for a, b in pairs), 1e3 * middle(a for a, _ in pairs), 1e3 * middle(b for _, b in pairs)


def fresh_model(path: Path) -> nn.Module:
    """Build the recipe's network as transformers would."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from scaletrain.recipe import load

    settings = dict(load(str(path)).networks["model"].config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def ours(path: Path, options: argparse.Namespace, batch: tuple[torch.Tensor, torch.Tensor]) -> Pairing:
    """Run our loop, paired."""
    from scaletrain.recipe import load
    from scaletrain.runs import train

    pairing = Pairing(Raw(fresh_model(path)), *batch)

    train(load(str(path)), "bench", path.parent, observers=[pairing])
    return pairing


def trainer(path: Path, options: argparse.Namespace, batch: tuple[torch.Tensor, torch.Tensor]) -> Pairing:
    """Run transformers' Trainer on batches of the same shape, paired."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    pairing = Pairing(Raw(fresh_model(path)), *batch)

    class Paired(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            pairing.step(0)

    inputs, _ = batch
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(700, (options.steps * options.batch, options.length), generator=generator)
    arguments = TrainingArguments(
        str(path.parent / "hf"), max_steps=options.steps, per_device_train_batch_size=len(inputs), learning_rate=1e-4,
        weight_decay=0.1, max_grad_norm=1.0, save_strategy="no", logging_steps=10, report_to=[], use_cpu=True,
        disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(fresh_model(path), arguments, train_dataset=data, callbacks=[Paired()]).train()
    return pairing


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 60, "hidden": 256, "layers": 4, "batch": 8, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(700, (options.batch, options.length + 1), generator=generator)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        path = recipe_file(Path(folder), options)
        results = {"scaletrain": ours(path, options, batch).ratio(), "Trainer": trainer(path, options, batch).ratio()}
    for name, (ratio, milliseconds, raw) in results.items():
        print(f"{name:<12} {ratio:.3f} x raw loop   ({milliseconds:.1f} ms against {raw:.1f} ms)")


if __name__ == "__main__":
    main()
