"""`scaletrain plan` against reality: predicted and measured peak memory of a process, on CPU.

python benchmarks/plan.py [--recipe lm/pretrain ...] [--engine one ddp fsdp2 zero2]

Measured is how far the process's resident memory rises, at most, above what it was when its networks were about to be
built: VmHWM, reset at that time, of rank 0, which also keeps the copy that checkpoints are written from. So it covers
building, steps, evaluation and saves, and everything that libraries allocate meanwhile. glibc is told to give freed
memory back (the environment below), for otherwise gaps between tensors are part of the measure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 4
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PROCESSES = {"one": 1, "ddp": 2, "fsdp2": 2, "zero2": 2}
LAUNCHED: dict[str, dict[str, str]] = {
    "one": {},
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
COMMON = [f"train.duration={STEPS} steps", "evaluate.samples=0", "log.every=1", "checkpoint.every=2 steps"]


def recipes(folder: Path) -> dict[str, list[str]]:
    """Return what makes each recipe of a size that stands out from the noise."""
    llama = "hidden_size: 1024, intermediate_size: 2752, num_attention_heads: 8, max_position_embeddings: 256"
    return {
        "lm/pretrain": [
            f"data.train={folder}/text.txt", f"data.eval={folder}/held.txt", "train.global_batch=4",
            "objective.tokenizer.vocab_size=276",
            f"networks.model.config={{model_type: llama, {llama}, num_hidden_layers: 5, vocab_size: 8000}}",
        ],
        "lm/lora": [
            f"data.train={folder}/text.txt", f"data.eval={folder}/held.txt", f"networks.model.path={folder}/llama",
            "train.global_batch=4",
        ],
        "text/classify": [
            f"data.train={folder}/labels.jsonl", f"networks.model.path={folder}/bert", "train.global_batch=32",
            "networks.model.adapter=null",
        ],
        "vision/resnet18": [
            f"data.train={folder}/pictures", "train.precision=fp32", "networks.model.config.features=96",
            "train.global_batch=128", "evaluate.batch=64", "data.workers=0",
        ],
        "gan/dcgan": [
            "networks.generator.config.features=1024", "networks.critic.config.features=1024",
            "train.global_batch=128", "evaluate.batch=64",
        ],
    }  # fmt: skip


def make_data(folder: Path) -> None:
    """Write text, labelled texts, pictures, and two networks of random weights."""
    import numpy as np
    import torch
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept", "ate"]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(4000)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "held.txt").write_text("\n".join(texts[:300]))
    rows = [{"text": " ".join(draw.choices(words, k=126)), "label": i % 2} for i in range(300)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = np.random.default_rng(0)
    for i in range(600):
        path = folder / "pictures" / f"class{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>")
    plain.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=32000)).save_pretrained(folder / "llama")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marked = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    marked.save_pretrained(folder / "bert")
    BertModel(BertConfig(vocab_size=2000)).save_pretrained(folder / "bert")


def status(key: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def work(recipe: str, overrides: list[str], folder: str) -> None:
    """Train, as one process of the measured run, and write what memory it took."""
    import torch._dynamo  # noqa: F401  # loaded by the first step, else

    from scaletrain import runs
    from scaletrain.recipe import load

    build, start = runs.build_networks, 0

    def begin(*args: Any) -> Any:
        nonlocal start
        start = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        return build(*args)

    runs.build_networks = begin
    runs.train(load(recipe, overrides), "run", Path(folder), observers=[])
    peak = status("VmHWM") - start
    (Path(folder) / f"peak-{os.environ.get('RANK', '0')}").write_text(str(peak))


def measure(recipe: str, overrides: list[str], engine: str) -> int:
    """Return the peak of rank 0, in bytes."""
    processes = PROCESSES[engine]
    environment = {**os.environ, **MALLOC, **LAUNCHED[engine], "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29571"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, __file__, "--work", folder, "--recipe", recipe, "--", *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        return int((Path(folder) / "peak-0").read_text())


def predict(recipe: str, overrides: list[str], engine: str) -> int:
    """Return what `scaletrain plan` says, in bytes."""
    words = ["--engine", "ddp" if engine == "one" else engine, "--processes", str(PROCESSES[engine])]
    command = [sys.executable, "-m", "scaletrain", "plan", recipe, *overrides, *words, "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return int(json.loads(done.stdout)[0]["peak"])


def main() -> None:
    """Print a row for each recipe and engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+")
    parser.add_argument("--engine", nargs="+", default=["one", "ddp", "fsdp2"], choices=PROCESSES)
    parser.add_argument("--data", type=Path, help="a folder for the data, kept")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.recipe[0], options.overrides, options.work)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        if not (folder / "bert").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_data(folder)
        print("| recipe | engine | predicted | measured | error |\n|---|---|---|---|---|")
        for recipe, own in recipes(folder).items():
            if options.recipe and recipe not in options.recipe:
                continue
            for engine in options.engine:
                overrides = [*own, *COMMON]
                said, found = predict(recipe, overrides, engine), measure(recipe, overrides, engine)
                row = f"{said / 1e9:.2f} GB | {found / 1e9:.2f} GB | {100 * (said / found - 1):+.1f}%"
                print(f"| {recipe} | {engine} x{PROCESSES[engine]} | {row} |", flush=True)


if __name__ == "__main__":
    main()
