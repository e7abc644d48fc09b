"""Continuing texts with a causal language model: a batch of prompts at a time, the most likely tokens or drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from scaletrain.config import Strict
from scaletrain.errors import UserError, did_you_mean
from scaletrain.explain import decode
from scaletrain.networks._positions import positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scaletrain.data.turns import Template


class SamplingConfig(Strict):
    """How texts are continued."""

    max_new_tokens: int | None = Field(None, ge=1)
    """By default 64, or half of the network's positions where that is less."""
    temperature: float = Field(0.8, ge=0)
    """0 takes the most likely token."""
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)

    def changed(self, options: Mapping[str, Any]) -> SamplingConfig:
        """Return the same with some options changed. Raises UserError for one that there is not."""
        known = SamplingConfig.model_fields
        for key in options:
            if key not in known:
                raise UserError(f"no sampling option is called `{key}`.{did_you_mean(key, known)}")
        return decode(SamplingConfig, {**self.model_dump(), **options}, "sampling")


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    how: SamplingConfig,
    generator: torch.Generator,
    fill: int,
    ends: Sequence[int],
    batch: int = 16,
    lockstep: bool = False,
    streamer: Any = None,
) -> list[list[int]]:
    """Continue prompts, a batch at a time; returns the continuation of each, without what follows one of the ends.

    Drawn from `generator` alone; torch's global generators stay as they are. Prompts that leave too few positions for
    the continuation lose their beginning. lockstep: all ranks call this as often, and each calls the network until the
    last of them has ended.
    """
    from transformers import GenerationConfig

    limit = positions(model)
    new = how.max_new_tokens or min(64, limit // 2 if limit else 64)
    if limit and new >= limit:
        raise UserError(f"sampling.max_new_tokens={new}: the network has {limit} positions in all.")
    room = limit - new if limit else None
    drawn = {"temperature": how.temperature, "top_k": how.top_k or 0, "top_p": how.top_p} if how.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=bool(drawn), pad_token_id=fill, eos_token_id=list(ends) or None, **drawn
    )
    device, stops = generator.device, set(ends)
    out: list[list[int]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=device)))
        for first in range(0, len(prompts), batch):
            some = [p[-room:] if room else p for p in prompts[first : first + batch]]
            width = max(map(len, some))
            ids = torch.tensor([[fill] * (width - len(p)) + p for p in some], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=device)
            done = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                synced_gpus=lockstep or None,
                streamer=streamer,
            )
            for row in done[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in stops), len(row))
                out.append(row[:end])
    return out


def ends_of(tokenizer: PreTrainedTokenizerFast, model: Any, template: Template | None) -> list[int]:
    """Return the tokens after which a continuation is over.

    They are the tokenizer's end of text, those that the network's own generation settings name, and what the template
    of a chat puts after an answer.
    """
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if template and template.end:
        found.add(tokenizer.convert_tokens_to_ids(template.end))
    return sorted(i for i in found if i in special)


def streamer_to(tokenizer: PreTrainedTokenizerFast, told: Callable[[str], None]) -> Any:
    """Return what tells the text of one continuation while it is generated, in whole words."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            told(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
