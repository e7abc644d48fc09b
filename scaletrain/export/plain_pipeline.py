"""What whoever gets an exported pipeline does: load it with diffusers alone, and sample.

The parity gate runs this file in a new process, as a text: it imports nothing of this package.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

NEEDED = ("unet", "transformer", "vae", "scheduler")


def load(folder: str, base: str | None) -> Any:
    """Load a pipeline's folder, or that of a LoRA over the pipeline `base`, with the scheduler beside it.

    Parts that samples from given embeddings do without, such as text encoders, are left out.
    """
    import diffusers

    whole = base or folder
    index = json.loads(Path(f"{whole}/model_index.json").read_text())
    left = {k: None for k, v in index.items() if isinstance(v, list) and k not in NEEDED}
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(whole, **left)
    if base is None:
        return pipe
    config = json.loads(Path(f"{folder}/scheduler/scheduler_config.json").read_text())
    scheduler: Any = getattr(diffusers, config["_class_name"])
    pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.load_lora_weights(folder)
    return pipe


def samples(pipe: Any, inputs: dict[str, torch.Tensor], seed: int, options: dict[str, Any]) -> torch.Tensor:
    """Return latents, or, of pipelines that do not give them, pictures in [0, 1] (N, C, H, W).

    inputs: by the names that the pipeline has for them. seed: of all noise, that of given latents, too.
    options: such as the number of steps; those that the pipeline does not have are left out.
    """
    has = inspect.signature(pipe.__call__).parameters
    given: dict[str, Any] = {k: v for k, v in {**options, **inputs}.items() if k in has}
    if "class_labels" in given:
        given["class_labels"] = inputs["class_labels"].tolist()
    if "latents" in given:
        given["output_type"] = "latent"
    else:
        given["output_type"] = "np"
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    if "latents" in given:  # they were drawn from this seed: what is drawn next goes on after them
        torch.randn_like(given["latents"])
    found = pipe(**given).images
    return found if "latents" in given else torch.from_numpy(found).permute(0, 3, 1, 2)


def main(request: str) -> None:
    """Load and sample what a request asks for; results go to the files that it names."""
    from safetensors.torch import load_file, save_file

    asked = ast.literal_eval(Path(request).read_text())
    pipe = load(asked["folder"], asked["base"])
    found = samples(pipe, load_file(asked["inputs"]), asked["seed"], asked["options"])
    save_file({"outputs": found.float().contiguous()}, asked["outputs"])
    Path(asked["facts"]).write_text(json.dumps({"own": "scaletrain" in sys.modules}))


if __name__ == "__main__":
    main(sys.argv[1])
