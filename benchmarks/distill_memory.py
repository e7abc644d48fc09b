"""Peak memory of distilling a U-Net of Stable Diffusion's class: a student trained whole, against a LoRA.

python benchmarks/distill_memory.py [--method lcm dmd2]

The U-Net has random weights. Memory is measured as `benchmarks/plan.py` does: how far a process rises above what it was
before its networks were built, at most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plan import measure

ADAPTER = {"type": "lora", "r": 64, "alpha": 64, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}
ADAM = {"optimizer": {"type": "adam", "lr": 1.0e-4}}
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lcm": ({"type": "lcm"}, ("student",)),
    "dmd2": ({"type": "dmd2", "every": 2}, ("student", "fake_score")),
}
"""What `objective` is, and who is trained."""
STEPS, BATCH, SIDE, TOKENS, EMBEDDING = 4, 2, 16, 77, 768


def write_teacher(folder: Path) -> int:
    """Write a pipeline's U-Net and scheduler; return how many weights it has."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(160, 320, 640),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=EMBEDDING,
    )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    return int(unet.num_parameters())


def write_data(folder: Path) -> None:
    """Write random latents and embeddings of prompts."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    shapes = {"latent": (4, SIDE, SIDE), "prompt_embeds": (TOKENS, EMBEDDING)}
    columns = {k: draw.standard_normal((4 * BATCH, *shape)).tolist() for k, shape in shapes.items()}
    pq.write_table(pa.table(columns), folder / "data.parquet")


def recipe(folder: Path, method: str, adapter: bool) -> Path:
    """Write the recipe of a method, and return where."""
    objective, trained = METHODS[method]
    own = {"type": "diffusers_model", "path": str(folder)}
    networks = {name: {**own, **({"adapter": ADAPTER} if adapter else {})} for name in trained}
    found = {
        "objective": objective,
        "networks": {**networks, "teacher": {**own, "frozen": True}},
        "players": dict.fromkeys(trained, ADAM),
        "data": {"train": str(folder / "data.parquet")},
        "train": {"duration": f"{STEPS} steps", "global_batch": BATCH},
        "checkpoint": {"every": f"{STEPS} steps"},
        "evaluate": {"samples": 0},
    }
    file = folder / f"{method}-{adapter}.yaml"
    file.write_text(json.dumps(found))  # which is YAML, too
    return file


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_teacher(folder)
        write_data(folder)
        print(f"{size / 1e6:.0f}M weights, {4 * size / 1e9:.2f} GB\n")
        print("| method | whole | LoRA | ratio |\n|---|---|---|---|")
        for method in options.method:
            whole, lora = (measure(str(recipe(folder, method, adapter)), [], "one") for adapter in (False, True))
            print(f"| {method} | {whole / 1e9:.2f} GB | {lora / 1e9:.2f} GB | {lora / whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
