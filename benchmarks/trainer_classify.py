"""Text classification against transformers' Trainer: real tokens/s, peak memory, loss and accuracy on held-out rows.

Both finetune the same pretrained encoder, with a head from the same draw, on the same rows, with the same global batch,
optimiser, schedule and clipping, each in a process of its own and in turns. The Trainer groups texts by length; each
side takes the micro-batch that it is fastest with. The held-out figures are computed from the saved weights by one
plain script.

    python benchmarks/trainer_classify.py MODEL_FOLDER TRAIN.jsonl HELD.jsonl [--mode lora] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import Clock, Figures, call, compare, tuned

OURS, THEIRS = "scaletrain", "Trainer"
LR = {"full": 5e-5, "lora": 5e-4}
RANK, ALPHA = 16, 32
WARMUP = 0.1


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save the encoder with a new head, and tell what both sides are told."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [json.loads(line) for line in options.train.read_text().splitlines()][: options.rows or None]
    classes = len({row["label"] for row in rows})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.save_pretrained(folder / "base")
    AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=classes).save_pretrained(
        folder / "base"
    )
    print(f"{len(rows):,} rows, {classes} classes, {options.batch} in a batch, {options.mode}")
    return {
        "base": folder / "base",
        "train": folder / "train.jsonl",
        "held": options.held.resolve(),
        "length": options.length,
        "batch": options.batch,
        "lora": options.mode == "lora",
        "lr": LR[options.mode],
        "classes": classes,
    }


def ours(o: dict[str, Any]) -> Figures:
    """Train by scaletrain."""
    from scaletrain.callbacks.base import Observer
    from scaletrain.recipe import load
    from scaletrain.runs import train

    clock = Clock()

    class Watch(Observer):
        tokens = 0

        def step(self, step: int, record: Any) -> None:
            clock.tick()
            if record:
                self.tokens = record["seen"]["tokens"]

    head = ["classifier"]
    adapter = {"adapter": {"type": "lora", "r": RANK, "alpha": ALPHA, "train_also": head}} if o["lora"] else {}
    recipe = {
        "objective": {"type": "text_classification"},
        "networks": {"model": {"path": o["base"], **adapter}},
        "players": {
            "model": {
                "optimizer": {"type": "adamw", "lr": o["lr"], "betas": [0.9, 0.999]},
                "schedule": {"type": "linear", "warmup_share": WARMUP},
                "clip": 1.0,
            }
        },
        "data": {"train": o["train"], "seq_len": o["length"], "seed": o["seed"]},
        "train": {
            "duration": f"{o['steps']} steps" if o["steps"] else f"{o['epochs']} epochs",
            "global_batch": o["batch"],
            "micro_batch": o["micro"],
        },
        "checkpoint": {"every": "1_000_000 steps", "asynchronous": False},
        "evaluate": {"samples": 0},
    }
    folder = Path(o["out"])
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    watch = Watch()
    run = train(load(str(folder / "recipe.yaml")), "run", folder, observers=[watch])
    (folder / "weights").symlink_to((run / "latest" / "networks" / "model").resolve())
    return clock.figures(watch.tokens)


def theirs(o: dict[str, Any]) -> Figures:
    """Train by transformers' Trainer."""
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    tokenizer = AutoTokenizer.from_pretrained(o["base"])
    model: Any = AutoModelForSequenceClassification.from_pretrained(o["base"])
    if o["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
        )
    rows = load_dataset("json", data_files=o["train"], split="train", cache_dir=f"{o['out']}/cache")
    rows = rows.map(
        lambda some: tokenizer(some["text"], truncation=True, max_length=o["length"]),
        batched=True,
        remove_columns=[c for c in rows.column_names if c != "label"],
    )
    rows = rows.map(lambda some: {"length": [len(ids) for ids in some["input_ids"]]}, batched=True)
    collate, seen = DataCollatorWithPadding(tokenizer), [0]

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        seen[0] += int(batch["attention_mask"].sum())
        return batch

    steps = o["steps"] or -(-len(rows) * o["epochs"] // o["batch"])
    arguments = TrainingArguments(
        output_dir=o["out"],
        num_train_epochs=o["epochs"],
        max_steps=o["steps"] or -1,
        per_device_train_batch_size=o["micro"],
        gradient_accumulation_steps=o["batch"] // o["micro"],
        learning_rate=o["lr"],
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * steps),
        train_sampling_strategy="group_by_length",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=o["seed"],
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=counting, callbacks=[Watch()])
    trainer.train()
    found = clock.figures(seen[0])
    trainer.save_model(f"{o['out']}/weights")
    return found


def score(o: dict[str, Any]) -> Figures:
    """Return the mean loss and the accuracy on the held-out rows, by transformers alone."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    weights = Path(o["out"]) / "weights"
    tokenizer = AutoTokenizer.from_pretrained(o["base"])
    adapted = (weights / "adapter_config.json").exists()
    model: Any = AutoModelForSequenceClassification.from_pretrained(o["base"] if adapted else weights)
    if adapted:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(weights))
    model.eval()
    rows = [json.loads(line) for line in Path(o["held"]).read_text().splitlines()]
    rows.sort(key=lambda row: len(row["text"]))
    loss, right = 0.0, 0
    for first in range(0, len(rows), 32):
        some = rows[first : first + 32]
        inputs = tokenizer(
            [row["text"] for row in some], truncation=True, max_length=o["length"], padding=True, return_tensors="pt"
        )
        labels = torch.tensor([row["label"] for row in some])
        with torch.no_grad():
            logits = model(**inputs).logits
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    return {"held-out loss": loss / len(rows), "accuracy": right / len(rows)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "held"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--micro", type=int, nargs="+", default=[4, 8, 16, 32], help="micro-batches that are tried")
    figures = {"batch": 32, "length": 128, "epochs": 1, "repeats": 3, "rows": 0, "steps": 0, "tune": 8}
    for name, default in figures.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        told = prepare(options, Path(place))
        told |= {"epochs": options.epochs, "steps": options.steps}

        def trial(side: str, micro: int) -> Figures:
            out = f"{place}/tune-{side}-{micro}"
            return call(
                sys.executable, __file__, side, {**told, "steps": options.tune, "micro": micro, "seed": 0, "out": out}
            )

        micros = [m for m in options.micro if options.batch % m == 0]
        best = tuned((OURS, THEIRS), micros, trial) if len(micros) > 1 else dict.fromkeys((OURS, THEIRS), micros[0])

        def measure(side: str, repeat: int) -> Figures:
            own = {**told, "micro": best[side], "seed": repeat, "out": f"{place}/{side}-{repeat}"}
            return call(sys.executable, __file__, side, own) | call(sys.executable, __file__, "score", own)

        compare((OURS, THEIRS), options.repeats, measure)


if __name__ == "__main__":
    if "--side" in sys.argv:
        side, told = sys.argv[2], json.loads(sys.argv[4])
        print(json.dumps({OURS: ours, THEIRS: theirs, "score": score}[side](told)))
    else:
        main()
