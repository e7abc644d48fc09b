"""Tokenizers: read from a folder or the Hub, or trained on the spot, and what the text pipeline asks of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from scaletrain.config import Strict
from scaletrain.data.cache import cached, content_key
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("scaletrain")

END, PAD = "<|endoftext|>", "<|pad|>"
"""What a tokenizer that is trained here puts after each document, and where there is nothing."""
PIECE = 1 << 20
"""Characters that are tokenised at once: a document of many gigabytes must not become one list of Python objects."""

# ChatML, except that a turn ends with the tokenizer's own end of text, which generation already stops at.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class TokenizerConfig(Strict):
    """Where the tokenizer comes from: `path`, or a byte-level BPE of `vocab_size` trained on the training text."""

    path: str | None = None
    """A folder or a Hub id; by default that of the network."""
    vocab_size: int | None = Field(None, ge=258)
    """At least the 256 bytes, an end of text and a padding token."""

    @model_validator(mode="after")
    def _one(self) -> TokenizerConfig:
        if self.path and self.vocab_size:
            raise ValueError("give `path` or `vocab_size`, not both")
        return self


def load_tokenizer(path: str, key: str) -> PreTrainedTokenizerFast:
    """Read a tokenizer from a folder or the Hub.

    key: of the recipe, for messages. Raises UserError when there is none or it has no fast implementation.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without a setting, the library warns whenever a process that has tokenised starts a worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{key}: no tokenizer can be read from `{path}` ({reason}). "
            "Set objective.tokenizer.path to a folder that holds a tokenizer.json."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{key}: the tokenizer of `{path}` has no fast implementation (a tokenizer.json is needed).")
    # What a tokenizer.json was saved with would cut and pad every text.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, fingerprint: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (Sennrich et al., 2016; Radford et al., 2019), once for the same text and size.

    texts: the training text. fingerprint: of its content. Raises UserError when the text is too short for the size.
    """
    from tokenizers import __version__

    def write(folder: Path) -> None:
        _byte_level_bpe(texts, vocab_size).save_pretrained(folder)

    folder = cached("tokenizers", content_key("byte-level BPE", vocab_size, fingerprint, __version__), write)
    return load_tokenizer(str(folder), "objective.tokenizer")


def _byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise UserError(
            f"objective.tokenizer.vocab_size={vocab_size}: the training text gives only {backend.get_vocab_size()} "
            "tokens. Ask for so many, or train on more text."
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)


def pieces(text: str) -> Iterator[str]:
    """Cut a long text into parts of about `PIECE` characters, at a line end inside the text where there is one.

    There, between two characters that are not blank, byte-level tokenizers cut too: the tokens stay the same.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        if line_end := re.compile(r"(?<=\S)\n(?=\S)").search(text, end, end + PIECE):
            end = line_end.end()
        yield text[start:end]
        start = end
    yield text[start:]


def identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of all that determines which tokens a text becomes."""
    from tokenizers import __version__

    return content_key(
        tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, __version__
    )


def leading(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text, such as the beginning of sentence."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token after which a text is over. Raises UserError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer names no end-of-text token, so that a model could not learn to stop: "
            "set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def filler(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return a token for places that hold none. It may be the end of text: what is learned is said by masks."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))


def read_chat_template(path: str) -> str:
    """Read a chat template from a Jinja file. Raises UserError when there is none, or Jinja does not understand it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = Path(path).read_text(encoding="utf-8")
        _compile_jinja_template(template)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"objective.chat_template: `{path}` cannot be read: {error}") from error
    except Exception as error:  # of jinja2, which is imported with the library
        line = f" line {error.lineno}" if hasattr(error, "lineno") else ""
        raise UserError(f"objective.chat_template: `{path}`{line} is no Jinja template: {error}") from error
    return template


def ensure_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer that has no chat template one in the manner of ChatML, and say so.

    Raises UserError where it has several and none of them is for all conversations.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(tokenizer.chat_template))}), and none is "
            "its `default`: put the one to use into a file, and give that as objective.chat_template."
        )
    if tokenizer.chat_template is None:
        end_of_text(tokenizer)
        tokenizer.chat_template = CHATML
        log.info("the tokenizer has no chat template: it gets ChatML, each turn ended by %s", tokenizer.eos_token)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, embeddings: int, key: str) -> None:
    """Raise UserError when the tokenizer has tokens that the network has no embedding for."""
    if len(tokenizer) > embeddings:
        raise UserError(
            f"{key}: the tokenizer has {len(tokenizer):,} tokens, the network embeds {embeddings:,}. "
            "Use the tokenizer that the network was trained with, or a network with a larger `vocab_size`."
        )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what the configuration of a new network says of this tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
