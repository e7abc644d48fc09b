"""What the objectives share that teach a causal language model in another way than by the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from scaletrain.config import Strict
from scaletrain.objectives import base, causal_lm
from scaletrain.objectives.base import Networks, Request, Samples

if TYPE_CHECKING:
    from torch import nn

C = TypeVar("C", bound=Strict)


class Speaking(base.Objective[C]):
    """An objective with a network that continues texts: what concerns it and its tokenizer alone is `language`'s."""

    throughput: ClassVar[str] = "tokens"
    windowed: ClassVar[bool] = True
    takes_prompts: ClassVar[bool] = True
    data_keys: ClassVar[frozenset[str]] = frozenset({"seq_len", "packing"})
    language: causal_lm.Objective

    def facts(self) -> dict[str, str]:
        """Return the tokenizer's."""
        return self.language.facts()

    def restore(self, folders: Mapping[str, Path]) -> None:
        """Take the tokenizer and the format of prompts from the network's folder."""
        self.language.restore(folders)

    def save_assets(self, network: str, folder: Path) -> None:
        """Write the tokenizer and the format of prompts beside the network."""
        if network == self.language.speaker:
            self.language.save_assets(network, folder)

    def sample(self, networks: Networks, request: Request) -> Samples:
        """Continue prompts: those of the request, else some of the data."""
        return self.language.sample(networks, request)

    def reply(
        self,
        networks: Networks,
        messages: Sequence[Mapping[str, Any]],
        request: Request,
        told: Callable[[str], None],
    ) -> str:
        """Answer a conversation."""
        return self.language.reply(networks, messages, request, told)

    def language_model(self, networks: Networks) -> tuple[nn.Module, Any]:
        """Return the network that continues texts, and its tokenizer."""
        return self.language.language_model(networks)
