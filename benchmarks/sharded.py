"""Memory of a rank while a sharded network is read, and while it is saved: against its share of the weights.

    python benchmarks/sharded.py                     2 processes, FSDP2 and ZeRO-3, full training and LoRA
    python benchmarks/sharded.py --hidden 2048       a larger network

A Llama with random weights is written to a temporary folder and trained for a few steps. All figures are peaks of the
resident memory of a rank, above what it had before. Reading: until the network is held in parts. Preparing: until the
engine can train (DeepSpeed makes one flat copy of the parts, and room for gradients). Saving: while a checkpoint of
weights, moments and an average is written (checkpoint.asynchronous=false).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ENGINES = {
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def make(folder: Path, hidden: int, layers: int) -> int:
    """Write a network, a tokenizer and prompts. Returns the bytes of the weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(997))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=16,
        )
    )  # fmt: skip
    network.save_pretrained(folder)
    rows = [{"prompt": "w1 w2", "completion": f"w{i} w{i + 1}"} for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return sum(p.numel() * 4 for p in network.parameters())


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Peak:
    """The peak of resident memory above what there was at the beginning."""

    def __enter__(self) -> Peak:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = resident("VmHWM") - self.before


def rank(words: list[str], report: Path) -> None:
    """Run the command line with a gauge at reading and saving."""
    import peft  # noqa: F401 (what is imported is no part of the network)
    from transformers import LlamaForCausalLM  # noqa: F401

    from scaletrain import runs, trainer
    from scaletrain.cli import main
    from scaletrain.snapshot import Snapshot

    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401

    found: dict[str, int] = {}
    build_networks, build_players, add_averages = runs.build_networks, trainer.build_players, trainer.add_averages
    save, gauge = Snapshot.save, Peak()

    def begin(*args: object, **kwargs: object) -> object:
        gauge.__enter__()
        return build_networks(*args, **kwargs)

    def read(*args: object, **kwargs: object) -> object:
        gauge.__exit__()
        found.setdefault("reading", gauge.bytes)
        return build_players(*args, **kwargs)

    def prepared(*args: object, **kwargs: object) -> None:
        gauge.__exit__()
        found.setdefault("preparing", gauge.bytes)
        add_averages(*args, **kwargs)

    def saved(self: Snapshot, *args: object, **kwargs: object) -> None:
        with Peak() as peak:
            save(self, *args, **kwargs)
        found["saving"] = max(found.get("saving", 0), peak.bytes)

    runs.build_networks, trainer.build_players, trainer.add_averages = begin, read, prepared
    Snapshot.save = saved  # type: ignore[method-assign]
    sys.argv = ["scaletrain", *words]
    try:
        main()
    finally:
        report.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank[1:], Path(options.rank[0]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = make(folder / "llama", options.hidden, options.layers)
        share = weights / options.processes
        print(f"{weights / 1e9:.2f} GB of weights, {share / 1e9:.2f} GB a process")
        for engine, variables in ENGINES.items():
            for kind in ("full", "lora"):
                adapter = "null" if kind == "full" else "{r: 8}"
                words = [
                    "run",
                    "lm/lora",
                    f"networks.model.path={folder}/llama",
                    f"data.train={folder}/llama/rows.jsonl",
                ]
                words += [f"networks.model.adapter={adapter}", "data.seq_len=16", "data.packing=false"]
                words += ["train={duration: 2 steps, global_batch: 4, micro_batch: 1}", "evaluate.samples=0"]
                words += ["players.model.ema={decay: 0.9}", "checkpoint={every: 1 steps, asynchronous: false, keep: 1}"]
                words += ["data.holdout=0", "--run", f"{engine}-{kind}", "--root", f"{folder}/runs"]
                command = [sys.executable, __file__, "--rank", f"{folder}/report", *words]
                port = str(20000 + os.getpid() % 20000)
                base = {**os.environ, **variables, "WORLD_SIZE": str(options.processes), "MASTER_ADDR": "127.0.0.1"}
                base |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": "65536"}
                base |= {"OMP_NUM_THREADS": "1", "SCALETRAIN_CACHE": f"{folder}/cache"}
                ranks = [
                    subprocess.Popen(
                        command, env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE
                    )
                    for r in range(options.processes)
                ]
                errors = [process.communicate()[1].decode() for process in ranks]
                if any(process.returncode for process in ranks):
                    raise SystemExit("\n".join(errors))
                found = [json.loads((folder / f"report.{r}").read_text()) for r in range(options.processes)]
                for what in ("reading", "preparing", "saving"):
                    peak = max(entry[what] for entry in found)
                    print(
                        f"{engine:6} {kind:5} {what:9} {peak / 1e9:6.2f} GB  {peak / share:5.2f} of the share",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
