"""Every shipped recipe, made small: overrides that let it train for some steps within a second on data made here."""

from __future__ import annotations

import json
import random
from pathlib import Path

STEPS = 30
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept", "ate", "fish")


def text(draw: random.Random, words: int) -> str:
    """Return so many words."""
    return " ".join(draw.choices(WORDS, k=words))


def make_data(folder: Path) -> None:
    """Write texts, rows of each family of text, and pretrained networks with a tokenizer."""
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n".join(text(draw, 12) for _ in range(300)))
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(120):
            row = {"prompt": text(draw, draw.randint(1, 9)), "completion": " " + text(draw, draw.randint(1, 20))}
            file.write(json.dumps(row) + "\n")
    with (folder / "labels.jsonl").open("w") as file:
        for _ in range(120):
            sentence = text(draw, draw.randint(2, 9))
            file.write(json.dumps({"text": sentence, "label": int("cat" in sentence)}) + "\n")
    with (folder / "tags.jsonl").open("w") as file:
        for _ in range(120):
            words = text(draw, draw.randint(2, 9)).split()
            tags = ["B-ANIMAL" if word in ("cat", "dog", "fish") else "O" for word in words]
            file.write(json.dumps({"tokens": words, "tags": tags}) + "\n")
    make_preferences(folder, draw)
    make_networks(folder)


def make_preferences(folder: Path, draw: random.Random) -> None:
    """Write pairs of answers, of which the chosen one speaks of a cat, and answers judged by that."""
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "judged.jsonl").open("w") as judged:
        for i in range(120):
            prompt = text(draw, draw.randint(1, 9))
            good, bad = (f" {text(draw, draw.randint(1, 9))} {animal}" for animal in ("cat", "dog"))
            pairs.write(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")
            row = {"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)}
            judged.write(json.dumps(row) + "\n")


def make_networks(folder: Path) -> None:
    """Write networks with random weights and one tokenizer: causal `llama`, encoder `bert`, classifier `finetuned`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="</s>").save_pretrained(
        folder / "llama"
    )
    LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2)).save_pretrained(folder / "llama")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    for name, network in {"bert": BertModel, "finetuned": BertForSequenceClassification}.items():
        PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        ).save_pretrained(folder / name)
        network(BertConfig(**size)).save_pretrained(folder / name)


def overrides(recipe: str, folder: Path) -> list[str]:
    """Return what makes a recipe small. A recipe that is not known here fails its tests: give it a line."""
    own = {
        "quickstart": [
            "train.duration=6 steps",
            "train.global_batch=8",
            "evaluate.samples=4",
            "objective.compare_samples=64",
            "stages.teacher.networks.model.config={features: [8, 16], middle: 1}",
        ],
        "lm/pretrain": [
            f"data.train={folder}/text.txt",
            "data.seq_len=32",
            "objective.tokenizer.vocab_size=270",
            "networks.model.config.hidden_size=16",
            "networks.model.config.intermediate_size=32",
            "networks.model.config.num_hidden_layers=2",
            "networks.model.config.num_attention_heads=2",
        ],
        "lm/lora": [f"data.train={folder}/prompts.jsonl", f"networks.model.path={folder}/llama", "data.seq_len=48"],
        "lm/full": [f"data.train={folder}/prompts.jsonl", f"networks.model.path={folder}/llama", "data.seq_len=48"],
        "lm/qlora": [f"data.train={folder}/prompts.jsonl", f"networks.model.path={folder}/llama", "data.seq_len=48"],
        "text/transfer": [f"data.train={folder}/labels.jsonl", f"networks.model.path={folder}/bert"],
        "lm/distill": [
            f"data.train={folder}/prompts.jsonl",
            f"networks.teacher.path={folder}/llama",
            f"networks.student={{path: {folder}/llama, config: {{num_hidden_layers: 1}}}}",
            "data.seq_len=48",
        ],
        **{
            f"lm/{name}": [
                f"data.train={folder}/{'judged' if name == 'kto' else 'pairs'}.jsonl",
                f"networks.model.path={folder}/llama",
                "data.seq_len=32",
            ]
            for name in ("dpo", "orpo", "simpo", "kto")
        },
        "lm/qat": [
            f"data.train={folder}/prompts.jsonl",
            f"networks.model.path={folder}/llama",
            "networks.model.qat.group=16",
            "data.seq_len=48",
        ],
        "text/classify": [f"data.train={folder}/labels.jsonl", f"networks.model.path={folder}/bert"],
        "text/regress": [f"data.train={folder}/labels.jsonl", f"networks.model.path={folder}/bert"],
        "text/tag": [f"data.train={folder}/tags.jsonl", f"networks.model.path={folder}/bert"],
        "text/distill": [
            f"data.train={folder}/labels.jsonl",
            f"networks.student.path={folder}/bert",
            "networks.student.config.layers=[1]",
            f"networks.teacher.path={folder}/finetuned",
        ],
        "encoder/roberta": [
            f"data.train={folder}/text.txt",
            "data.seq_len=32",
            "objective.tokenizer.vocab_size=270",
            "networks.model.config.hidden_size=16",
            "networks.model.config.intermediate_size=32",
            "networks.model.config.num_hidden_layers=2",
            "networks.model.config.num_attention_heads=2",
        ],
        "seq2seq/transformer": [
            f"data.train={folder}/prompts.jsonl",
            "data.seq_len=64",
            "objective.tokenizer.vocab_size=270",
            "objective.sampling.max_new_tokens=8",
            "networks.model.config.d_model=16",
            *(f"networks.model.config.{side}_layers=1" for side in ("encoder", "decoder")),
            *(f"networks.model.config.{side}_attention_heads=2" for side in ("encoder", "decoder")),
            *(f"networks.model.config.{side}_ffn_dim=32" for side in ("encoder", "decoder")),
        ],
        "distill/progressive_gmm": [
            "objective.compare_samples=64",
            *(f"stages.steps-{n}.train={{duration: 6 steps, global_batch: 8}}" for n in (4, 2, 1)),
            "stages.steps-4.networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        "distill/progressive": [
            "data.train=noise:64",
            "data.holdout=0",
            "objective.compare_samples=64",
            *(f"stages.steps-{n}.train={{duration: 6 steps, global_batch: 8}}" for n in (8, 4, 2, 1)),
            "stages.steps-8.networks.teacher={type: mixture}",
            "stages.steps-8.networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        "distill/guided": [
            "data.train=noise:64",
            "data.holdout=0",
            "objective.condition=label",
            "objective.compare_samples=64",
            "networks.teacher={type: mixture}",
            "networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        "distill/dmd2_gmm": [
            "objective.compare_samples=64",
            "stages.copy.networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        "distill/adversarial_gmm": [
            "objective.compare_samples=64",
            "stages.contest.networks.critic={config: {hidden: [8, 8]}}",
            "stages.copy.networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        **{
            f"distill/{name}": [
                "data.train=noise:64",
                "data.holdout=0",
                "networks.teacher={type: mixture}",
                "networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
                "objective.compare_samples=64",
            ]
            for name in ("dmd2", "adversarial")
        },
        "distill/reflow_gmm": [
            "data.train=noise:64",
            "data.eval=noise:16",
            "objective.compare_samples=64",
            *(f"stages.{name}.train={{duration: 12 steps, global_batch: 8}}" for name in ("straight", "one-step")),
            "stages.straight.networks.student.config={hidden: [8, 8]}",
        ],
        "distill/reflow": [
            "data.train=noise:64",
            "objective.compare_samples=64",
            "objective.teacher_steps=2",
            "networks.teacher={type: mixture}",
            "stages.straight.networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
        ],
        **{
            f"diffusion/{name}": [
                "data.train.rows=200",
                "train.global_batch=8",
                "evaluate.samples=4",
                "objective.steps=2",
                "networks.model.config={features: [8, 16], middle: 1}",
            ]
            for name in ("ddpm", "edm", "flow")
        },
        "diffusion/latent": [
            "data.train.rows=200",
            "objective.compare_samples=64",
            *(f"stages.{name}.train.duration=12 steps" for name in ("autoencoder", "denoiser", "student")),
            "stages.autoencoder.networks.autoencoder.config={features: [8, 8], latent_channels: 2, groups: 4}",
            "stages.denoiser.networks.model.config={features: [8, 16], middle: 1}",
        ],
        "vision/cnn": ["data.train.rows=200"],
        "vision/resnet18": [
            "data.train=sklearn:digits",
            "data.train.rows=200",
            "objective.size=8",
            "train.precision=fp32",
            "networks.model.config.features=8",
        ],
        **{
            f"distill/{name}_gmm": ["networks.student.config.hidden=[8, 8]", "objective.compare_samples=64"]
            for name in ("consistency", "scm", "lcm", "ctm", "shortcut", "meanflow")
        },
        **{
            f"distill/{name}": [
                "data.train=noise:64",
                "data.holdout=0",
                "networks.teacher={type: mixture}",
                "networks.student={type: point_denoiser, config: {hidden: [8, 8]}}",
                "objective.compare_samples=64",
            ]
            for name in ("consistency", "scm", "lcm", "ctm", "shortcut", "meanflow")
        },
        "gan/dcgan": [
            "data.train.rows=200",
            "networks.generator.config.features=8",
            "networks.critic.config.features=8",
        ],
    }
    short = [f"train.duration={STEPS} steps", "train.global_batch=8", "train.micro_batch=2"]
    sparse = ["evaluate.samples=2", "evaluate.batch=64", "evaluate.every=15 steps"]
    always = ["log.every=1", "checkpoint.every=4 steps"]
    if recipe == "text/transfer":
        short.append("stages.all.train.duration=10 steps")
    return [*(own[recipe] if recipe == "quickstart" else [*short, *sparse, *own[recipe]]), *always]
