"""What texts say to networks, in one vector or many. Beside a network's weights are kept some, to draw samples by, and
what stands for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from scaletrain.errors import UserError

COLUMNS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
_SOME, _NONE = "texts/some.safetensors", "texts/none.safetensors"  # not beside what a network's weights are read from


def save(folder: Path, some: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> None:
    """Write what there is."""
    from safetensors.torch import save_file

    for name, tensors in ((_SOME, some), (_NONE, null)):
        if tensors:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / name)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read what `save` wrote."""
    some, null = (_read(folder / name) if (folder / name).exists() else {} for name in (_SOME, _NONE))
    return some, null


def summary(told: Mapping[str, Tensor]) -> Tensor:
    """Return one vector (B, E) for what is told of texts: their encoder's own, or the mean over its tokens."""
    if "pooled_prompt_embeds" in told:
        return told["pooled_prompt_embeds"]
    embeds = told["prompt_embeds"]
    mask = told.get("prompt_attention_mask", embeds.new_ones(embeds.shape[:2]))
    return (mask.to(embeds.dtype)[..., None] * embeds).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def read_null(path: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what stands for no text, (...) each, for columns (N, ...). Raises UserError for other names or shapes."""
    if not Path(path).is_file():
        raise UserError(f"objective.no_text: there is no file `{path}`.")
    found = _read(Path(path))
    for name, value in like.items():
        if name not in found or found[name].shape != value.shape[1:]:
            has = f"{tuple(found[name].shape)}" if name in found else "missing"
            raise UserError(
                f"objective.no_text: `{name}` in `{path}` is {has}; in the data it is {tuple(value.shape[1:])}."
            )
    return {name: found[name].float() for name in like}


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found
