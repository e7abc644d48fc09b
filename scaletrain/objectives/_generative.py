"""What the objectives share whose network continues texts: sampling, conversation, and the worth of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field

from scaletrain.config import Recipe, Strict
from scaletrain.data import formats
from scaletrain.data.answers import Answers
from scaletrain.data.dataset import Dataset
from scaletrain.data.text import LanguageDataset
from scaletrain.data.tokenizers import filler
from scaletrain.data.turns import Template
from scaletrain.errors import UserError
from scaletrain.evaluate.generation import SamplingConfig, ends_of, generate, streamer_to
from scaletrain.evaluate.text_metrics import METRICS
from scaletrain.objectives import base
from scaletrain.objectives.base import Networks, Request
from scaletrain.player import Batch, Term

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast


class JudgeConfig(Strict):
    """Answers that are generated at each evaluation, of the most likely tokens, and compared with those wanted."""

    rows: int = Field(64, ge=1)
    """How many of each source of `data.eval`."""
    metrics: list[Literal["exact_match", "f1", "rouge"]] = Field(["exact_match", "f1", "rouge"], min_length=1)
    max_new_tokens: int | None = Field(None, ge=1)
    """By default 64, or half of the network's positions where that is less."""


class GenerativeConfig(Strict):
    """Options that such objectives have."""

    template_options: dict[str, Any] = Field(default_factory=dict)
    """Values for the chat template, such as {enable_thinking: false}."""
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig | None = None
    """By default nothing is generated at an evaluation."""


G = TypeVar("G", bound=GenerativeConfig)


class Generative(base.Objective[G]):
    """An objective over `tokenizer`, whose network `speaker` continues texts in the format of the data."""

    takes_prompts: ClassVar[bool] = True
    speaker: str = "model"

    def __init__(self, config: G, recipe: Recipe):
        super().__init__(config, recipe)
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._format: formats.FormatName = "text"
        self.prompts: list[list[int]] = []

    def check_judge(self) -> None:
        """Raise UserError where answers are to be compared and the data have none."""
        if self.config.judge and self._format == "text":
            raise UserError("objective.judge: plain text has no answers to compare with, prompts and chats have.")

    def sample(self, networks: Networks, request: Request) -> base.Samples:
        """Continue prompts: those of the request, else some of the data, else nothing but the end of text."""
        tokenizer, fmt = self._language_of_prompts()
        how = self.config.sampling.changed(request.options)
        prompts = [fmt.prompt(p) for p in request.prompts] or self.prompts or [[]]
        start = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
        count = max(request.count, len(request.prompts))
        prompts = [prompts[i * len(prompts) // count] or [start] for i in range(count)]
        found = self._continue(networks, prompts, how, request.generator)
        ids = [prompt + own for prompt, own in zip(prompts, found, strict=True)]
        return base.Samples(texts=tokenizer.batch_decode(ids, skip_special_tokens=True))

    def reply(
        self,
        networks: Networks,
        messages: Sequence[Mapping[str, Any]],
        request: Request,
        told: Callable[[str], None],
    ) -> str:
        """Answer a conversation. Data that are no chats have no turns: then the last message alone is the prompt."""
        from jinja2 import TemplateError

        tokenizer, fmt = self._language_of_prompts()
        how = self.config.sampling.changed(request.options)
        if not self._talks and messages[0]["role"] == "system":
            raise UserError(f"this run learned from the format {self._format}, which has no system turn.")
        try:
            prompt = fmt.prompt(list(messages) if self._talks else messages[-1]["content"])
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        streamer = streamer_to(tokenizer, told)
        (ids,) = self._continue(networks, [prompt], how, request.generator, streamer=streamer)
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def language_model(self, networks: Networks) -> tuple[nn.Module, PreTrainedTokenizerFast]:
        """Return the network that speaks, and the tokenizer."""
        assert self.tokenizer is not None
        return networks[self.speaker], self.tokenizer

    def answers(self, held: Dataset) -> Dataset | None:
        """Return the rows whose answers are compared. Raises UserError when none has a prompt and an answer."""
        judge = self.config.judge
        if judge is None:
            return None
        assert isinstance(held, LanguageDataset)
        found = Answers(held.tokens, judge.rows, held.fill)
        if not len(found):
            raise UserError("objective.judge: none of the rows to evaluate on has a prompt and a learned answer.")
        return found

    def judge(self, networks: Networks, batch: Batch, lockstep: bool) -> dict[str, Term]:
        """Answer prompts, and compare each answer with the row's."""
        judge, tokenizer = self.config.judge, self.tokenizer
        assert judge is not None
        assert tokenizer is not None
        prompts, wanted = (_rows(batch[n], batch[f"{n}_lengths"]) for n in ("prompt", "answer"))
        how = SamplingConfig(temperature=0.0, max_new_tokens=judge.max_new_tokens)
        generator = torch.Generator(batch["prompt"].device).manual_seed(0)
        found = self._continue(networks, prompts, how, generator, batch=len(prompts), lockstep=lockstep)
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (found, wanted))
        sums: dict[str, float] = {}
        for pair in zip(*texts, strict=True):
            for metric in judge.metrics:
                for name, value in METRICS[metric](*pair).items():
                    sums[name] = sums.get(name, 0.0) + value
        return {name: Term(torch.tensor(total), per="answers", weight=0.0) for name, total in sums.items()}

    def _language_of_prompts(self) -> tuple[PreTrainedTokenizerFast, Any]:
        """Return the tokenizer, and the format that prompts are written in."""
        assert self.tokenizer is not None
        name = "completion" if self._format == "text" else self._format
        return self.tokenizer, formats.language_format(name, self.tokenizer, None, self.config.template_options)

    @property
    def _talks(self) -> bool:
        """Whether the data are chats."""
        return self._format not in ("text", "completion")

    def _continue(
        self, networks: Networks, prompts: list[list[int]], how: SamplingConfig, generator: torch.Generator, **more: Any
    ) -> list[list[int]]:
        model, tokenizer = self.language_model(networks)
        return generate(model, prompts, how, generator, filler(tokenizer), self.ends(model), **more)

    def ends(self, model: nn.Module) -> list[int]:
        """Return the tokens after which an answer is over."""
        assert self.tokenizer is not None
        template = Template(self.tokenizer, self.config.template_options) if self._talks else None
        return ends_of(self.tokenizer, model, template)


def _rows(ids: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
