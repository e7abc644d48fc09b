"""The same loss and weights however a global batch is cut, against a loop in plain PyTorch that cuts nothing."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scaletrain.data.order import Order, key_of
from tests.launch import metrics, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, BATCH, LR, WARMUP = 20, 8, 1e-3, 5
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of very different lengths."""
    folder = tmp_path_factory.mktemp("ragged")
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "under",
        "mat",
        "tree",
        "and",
        "then",
        "slept",
        "ate",
        "fish",
    ]
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(50):
            prompt = " ".join(draw.choices(words, k=draw.randint(1, 12)))
            completion = " " + " ".join(draw.choices(words, k=draw.choice([1, 2, 30])))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    (folder / "lm.yaml").write_text(
        json.dumps(
            {
                "objective": {"type": "causal_lm", "tokenizer": {"vocab_size": 280}},
                "networks": {"model": {"config": LLAMA}},
                "players": {
                    "model": {
                        "optimizer": {"type": "adamw", "lr": LR, "weight_decay": 0.1},
                        "schedule": {"type": "cosine", "warmup_steps": WARMUP},
                        "clip": 0.5,
                    }
                },
                "data": {"train": str(folder / "rows.jsonl"), "seq_len": 128},
                "train": {"duration": f"{STEPS} steps", "global_batch": BATCH},
                "evaluate": {"samples": 0},
                "log": {"every": 1},
            }
        )
    )
    return folder


def lm(folder: Path, name: str, micro: int, processes: int = 1) -> tuple[list[float], dict[str, torch.Tensor], Path]:
    """Train. Returns losses by step and the final weights."""
    arguments = ["run", folder / "lm.yaml", f"train.micro_batch={micro}", "--root", folder, "--run", name]
    run(arguments, processes)
    losses = [r["loss"] for r in metrics(folder / name) if r["kind"] == "train"]
    network = folder / name / "latest" / "networks" / "model"
    return losses, load_file(network / "model.safetensors"), network


def plain(folder: Path, network: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training by hand: one sample at a time, sums of log-likelihoods over one number of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(network)
    config = LlamaConfig.from_pretrained(network)
    torch.manual_seed(key_of(0, "main", "weights", "model"))
    model = AutoModelForCausalLM.from_config(config)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    order = Order(len(rows), 0, "main")
    losses = []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for number in order(np.arange(step * BATCH, (step + 1) * BATCH)):
            prompt = tokenizer(rows[number]["prompt"]).input_ids
            completion = [*tokenizer(rows[number]["completion"]).input_ids, tokenizer.eos_token_id]
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
            likelihood = F.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            total = total - likelihood.gather(1, torch.tensor(completion)[:, None]).sum()
            count += len(completion)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        progress = (step - WARMUP) / (STEPS - WARMUP)
        rate = (step + 1) / WARMUP if step < WARMUP else (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * rate
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_lm_is_the_same_however_the_batch_is_cut(ragged: Path) -> None:
    whole, weights, network = lm(ragged, "whole", micro=8)
    by_hand, hand_weights = plain(ragged, network)
    assert whole == pytest.approx(by_hand, rel=1e-5)
    for cut in ({"micro": 2}, {"micro": 2, "processes": 2}):
        losses, others, _ = lm(ragged, "cut-" + "-".join(map(str, cut.values())), **cut)
        assert losses == pytest.approx(whole, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=1e-5, atol=2e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, hand_weights[name], rtol=1e-5, atol=2e-6)


GAN = {
    "objective": {"type": "gan", "latent": 8},
    "networks": {
        "generator": {"config": {"norm": "none", "features": 8}},
        "critic": {"config": {"norm": "none", "features": 8}},
    },
    "players": {
        "generator": {"optimizer": {"lr": 1e-3}, "ema": {"decay": 0.9}},
        "critic": {"optimizer": {"lr": 1e-3}, "clip": 1.0},
    },
    "data": {"train": "sklearn:digits"},
    "train": {"duration": "20 steps", "global_batch": 8, "micro_batch": 2},
    "evaluate": {"samples": 0},
    "log": {"every": 1},
}


def test_gan_is_the_same_on_two_processes_noise_included(tmp_path: Path) -> None:
    (tmp_path / "gan.yaml").write_text(json.dumps(GAN))
    for name, processes in (("one", 1), ("two", 2)):
        run(["run", tmp_path / "gan.yaml", "--root", tmp_path, "--run", name], processes)
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("critic/loss", "generator/loss", "critic/grad_norm", "generator/grad_norm"):
        assert [r[key] for r in second] == pytest.approx([r[key] for r in first], rel=1e-5)
    for network in ("generator", "critic"):
        weights = [
            load_file(tmp_path / n / "latest" / "networks" / network / "model.safetensors") for n in ("one", "two")
        ]
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=2e-6)
