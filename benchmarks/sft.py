"""Supervised finetuning with packing against TRL's SFTTrainer: real tokens/s, peak memory, loss on held-out rows.

Both start from the same new Llama and tokenizer, train on the same rows (prompt, completion) with the same tokens in a
batch, optimiser, schedule and clipping, each in a process of its own and in turns. Each takes the micro-batch that it
is fastest with. The held-out loss is computed from the saved weights by one plain script. A token is counted whether
or not it is learned; padding never.

    python benchmarks/sft.py TRAIN.jsonl HELD.jsonl --peer-python VENV_WITH_TRL/bin/python [--mode lora] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import Clock, Figures, call, compare, tuned

OURS, THEIRS = "scaletrain", "TRL"
LR = {"full": 1e-3, "lora": 2e-3}
RANK, ALPHA = 16, 32


def write_rows(source: Path, target: Path, length: int, tokenizer: Any = None) -> int:
    """Write prompts and completions, those that fit; return their tokens.

    A completion begins with a blank, so that it has the same tokens whether or not it is tokenised with its prompt.
    """
    total = 0
    with target.open("w") as file:
        for line in source.read_text().splitlines():
            row = json.loads(line)
            completion = " " + row["completion"].removesuffix("<|endoftext|>").strip()
            row = {"prompt": row["prompt"].strip(), "completion": completion}
            if not (row["prompt"] and completion.strip()):
                continue
            tokens = len(tokenizer(row["prompt"] + completion)["input_ids"]) + 1 if tokenizer else 0
            if tokens <= length:
                file.write(json.dumps(row) + "\n")
                total += tokens
    return total


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the rows, the tokenizer and the new network; return what both sides are told."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scaletrain.data.tokenizers import _byte_level_bpe

    write_rows(options.train, folder / "all.jsonl", options.length)
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    tokenizer = _byte_level_bpe((row["prompt"] + row["completion"] for row in rows), options.vocab)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokens = write_rows(options.train, folder / "train.jsonl", options.length, tokenizer)
    write_rows(options.held, folder / "held.jsonl", options.length, tokenizer)
    count = len((folder / "train.jsonl").read_text().splitlines())
    print(f"{count:,} rows of {tokens:,} tokens, {options.packs} packs of {options.length} in a batch, {options.mode}")
    return {
        "base": folder / "base",
        "train": folder / "train.jsonl",
        "held": folder / "held.jsonl",
        "length": options.length,
        "packs": options.packs,
        "lora": options.mode == "lora",
        "lr": LR[options.mode],
        "precision": options.precision,
        "row": tokens / count,
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

    adapter = {"adapter": {"type": "lora", "r": RANK, "alpha": ALPHA}} if o["lora"] else {}
    optimizer = {"type": "adamw", "lr": o["lr"], "betas": [0.9, 0.999]}
    recipe = {
        "objective": {"type": "causal_lm"},
        "networks": {"model": {"path": o["base"], **adapter}},
        "players": {"model": {"optimizer": optimizer, "schedule": {"type": "linear"}, "clip": 1.0}},
        "data": {"train": o["train"], "seq_len": o["length"], "packing": True, "seed": o["seed"]},
        "train": {
            "duration": f"{o['steps']} steps" if o["steps"] else f"{o['epochs']} epochs",
            "global_batch": o["packs"],
            "micro_batch": o["micro"],
            "precision": o["precision"],
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
    return clock.figures(watch.tokens * o["row"] / (o["row"] - 1))  # a row's last token is no place of its own here


def theirs(o: dict[str, Any]) -> Figures:
    """Train by TRL."""
    import logging

    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    logging.disable(logging.WARNING)
    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    peft = None
    if o["lora"]:
        from peft import LoraConfig

        peft = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    config = SFTConfig(
        output_dir=o["out"],
        num_train_epochs=o["epochs"],
        max_steps=o["steps"] or -1,
        per_device_train_batch_size=o["micro"],
        gradient_accumulation_steps=o["packs"] // o["micro"],
        learning_rate=o["lr"],
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        packing=True,
        packing_strategy="bfd",
        max_length=o["length"],
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=o["precision"] == "bf16",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=o["seed"],
    )
    tokenizer = AutoTokenizer.from_pretrained(o["base"])
    model = AutoModelForCausalLM.from_pretrained(o["base"], attn_implementation="sdpa")
    rows = load_dataset("json", data_files=o["train"], split="train", cache_dir=f"{o['out']}/cache")
    trainer = SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, peft_config=peft, callbacks=[Watch()]
    )
    collate, seen = trainer.data_collator, [0]

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        seen[0] += int((batch["input_ids"] != tokenizer.pad_token_id).sum())
        return batch

    trainer.data_collator = counting
    trainer.train()
    found = clock.figures(seen[0])
    trainer.save_model(f"{o['out']}/weights")
    return found


def score(o: dict[str, Any]) -> Figures:
    """Return the mean loss of the held-out completions, a row at a time, by transformers alone."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = Path(o["out"]) / "weights"
    tokenizer = AutoTokenizer.from_pretrained(o["base"])
    if (weights / "adapter_config.json").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(o["base"]), str(weights))
    else:
        model = AutoModelForCausalLM.from_pretrained(weights)
    model.eval()
    total, count = 0.0, 0
    for line in Path(o["held"]).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        total += float(F.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
        count += len(completion)
    return {"held-out loss": total / count}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has trl")
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8], help="micro-batches that are tried")
    figures = {"hidden": 256, "layers": 4, "vocab": 8192, "length": 512, "packs": 8, "epochs": 1, "repeats": 3}
    for name, default in {**figures, "steps": 0, "tune": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        told = prepare(options, Path(place))
        told |= {"epochs": options.epochs, "steps": options.steps}
        pythons = {OURS: sys.executable, THEIRS: options.peer_python}

        def trial(side: str, micro: int) -> Figures:
            out = f"{place}/tune-{side}-{micro}"
            return call(
                pythons[side], __file__, side, {**told, "steps": options.tune, "micro": micro, "seed": 0, "out": out}
            )

        micros = [m for m in options.micro if options.packs % m == 0]
        best = tuned((OURS, THEIRS), micros, trial) if len(micros) > 1 else dict.fromkeys((OURS, THEIRS), micros[0])

        def measure(side: str, repeat: int) -> Figures:
            own = {**told, "micro": best[side], "seed": repeat, "out": f"{place}/{side}-{repeat}"}
            return call(pythons[side], __file__, side, own) | call(sys.executable, __file__, "score", own)

        compare((OURS, THEIRS), options.repeats, measure)


if __name__ == "__main__":
    if "--side" in sys.argv:
        side, told = sys.argv[2], json.loads(sys.argv[4])
        print(json.dumps({OURS: ours, THEIRS: theirs, "score": score}[side](told)))
    else:
        main()
