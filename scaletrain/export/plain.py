"""What whoever gets an export does: load it with the libraries alone, and call it.

The parity gate runs this file in a new process, as a text: it imports nothing of this package.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def load(folder: str, kind: str, base: dict[str, Any] | None) -> tuple[Any, list[str]]:
    """Load a folder with transformers, and peft where it holds an adapter.

    kind: the class of transformers. base: of an adapter, the `path` and the `options` of what it goes over. Returns the
    network and what is wrong with the names of its weights.
    """
    import transformers

    auto = getattr(transformers, kind)
    path, options = (base["path"], base["options"]) if base else (folder, {"dtype": "auto", "device_map": "cpu"})
    module, info = auto.from_pretrained(path, output_loading_info=True, **options)
    for part in module.modules():  # on some CPUs bitsandbytes rounds 4-bit products to bf16, of some widths alone
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    if base is None:
        names = {*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return module.eval(), [f"{name} is missing, unknown or of another shape" for name in sorted(names)]
    from peft import PeftModel
    from safetensors import safe_open

    adapted = PeftModel.from_pretrained(module, folder)
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        odd = set(file.keys()) ^ set(_adapter(adapted))
    return adapted.eval(), [f"{name} is missing or unknown" for name in sorted(odd)]


def _adapter(module: Any) -> dict[str, torch.Tensor]:
    """Return an adapter's own tensors, of embeddings only the rows that it trains where it trains some."""
    from peft import get_peft_model_state_dict

    rows = getattr(module.peft_config["default"], "trainable_token_indices", None)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(module, save_embedding_layers=False if rows else "auto")
    return found


def outputs(module: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of the positions of the input, or what else comes first, in float32."""
    device = next(module.parameters()).device
    with torch.no_grad():
        found = module(**{key: value.to(device) for key, value in inputs.items()})
    logits = found.logits if hasattr(found, "logits") else found[0]
    positions = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    if logits.dim() == 3:  # virtual tokens stand before the others
        logits = logits[:, -positions:]
    return logits.float().cpu().contiguous()


def fingerprints(module: Any) -> dict[str, list[Any]]:
    """Return the shape, the type and the SHA-256 of every tensor of a network, of an adapter's own tensors, by name.

    Tensors that are not plain, as quantised ones, are left out.
    """
    held: Any = _adapter(module) if hasattr(module, "peft_config") else module.state_dict()
    found = {}
    for name, tensor in held.items():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            found[name] = [list(tensor.shape), str(tensor.dtype), hashlib.sha256(content).hexdigest()]
    return found


def main(request: str) -> None:
    """Load, call and describe what a request asks for; results go to the files that it names."""
    from safetensors.torch import load_file, save_file

    asked = ast.literal_eval(Path(request).read_text())
    module, faults = load(asked["folder"], asked["kind"], asked["base"])
    found = fingerprints(module)
    save_file({"outputs": outputs(module, load_file(asked["inputs"]))}, asked["outputs"])
    facts = {"faults": faults, "fingerprints": found, "own": "scaletrain" in sys.modules}
    Path(asked["facts"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
