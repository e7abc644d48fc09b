"""What the builders over transformers share: find a model, check its settings, read its weights."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr, model_validator
from torch import nn

from scaletrain.config import NetworkSpec, Open, QuantizeSpec
from scaletrain.errors import UserError, did_you_mean

log = logging.getLogger("scaletrain")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a pretrained network is read. trusted: the code that comes with it may be run."""

    quantize: QuantizeSpec | None = None
    trusted: bool = False


class TransformersConfig(Open):
    """Settings of a transformers architecture, under the names of its own configuration class.

    For a new network, `model_type` (llama, gpt2, qwen3, bert ...) is needed; of a pretrained one, settings are changed.
    """

    model_type: str | None = None
    _reading: Reading = PrivateAttr(default_factory=lambda: Reading())

    def read_as(self, spec: NetworkSpec) -> TransformersConfig:
        """Take from a network's spec how weights are read; returns this."""
        quantize = spec.quantize
        if quantize and spec.adapter:  # what is trained whole is not quantised
            quantize = quantize.model_copy(update={"skip": [*quantize.skip, *spec.adapter.train_also]})
        self._reading = Reading(quantize, spec.trust_remote_code)
        return self

    @property
    def reading(self) -> Reading:
        """How weights are read."""
        return self._reading

    @property
    def options(self) -> dict[str, Any]:
        """The settings that are given, without the model_type."""
        return self.model_dump(exclude={"model_type"}, exclude_unset=True)

    @model_validator(mode="after")
    def _known(self) -> TransformersConfig:
        if self.model_type is not None:
            check_settings(self.options, config_class(self.model_type))
        return self


def config_class(model_type: str) -> type[Any]:
    """Return the configuration class of an architecture. Raises ValueError with the closest name."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ValueError(f"transformers has no `{model_type}`.{hint if 'mean' in hint else ''}")
    found: type[Any] = CONFIG_MAPPING[model_type]
    return found


def check_settings(settings: dict[str, Any], cls: type[Any]) -> None:
    """Raise ValueError for a setting that a configuration class does not have."""
    known = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map) | {"attn_implementation", "num_labels"}
    if "rope_parameters" in known:  # older names, which the library still takes
        known |= {"rope_theta", "rope_scaling"}
    for key in settings:
        if key not in known:
            raise ValueError(f"{cls.model_type} has no setting `{key}`.{did_you_mean(key, known)}")


def new_config(config: TransformersConfig) -> Any:
    """Make the configuration of a new network. Raises UserError for a missing model_type or values that do not fit."""
    if config.model_type is None:
        raise UserError(
            "config.model_type is missing: say which architecture, or give `path` for a pretrained network."
        )
    try:
        found = config_class(config.model_type)(**config.options)
        found._attn_implementation = attention(found, config)
        return found
    except Exception as error:  # the library's validation errors share no narrower base class
        raise UserError(f"config: {' '.join(str(error).split())}") from error


def read_config(path: str, config: TransformersConfig) -> Any:
    """Read the configuration of a pretrained network and change what the recipe says.

    Raises UserError when there is no such folder or Hub id, or it needs code of its own, or for an unknown setting.
    """
    from transformers import AutoConfig

    require_model(path)
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.reading.trusted)
        check_settings(config.options, type(found))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if config.model_type not in (None, found.model_type):
        raise UserError(f"`{path}` is a {found.model_type}, not the {config.model_type} of `config.model_type`.")
    for key, value in config.options.items():
        try:
            setattr(found, key, value)
        except Exception as error:  # the library's validation errors share no narrower base class
            raise UserError(f"config.{key}: {' '.join(str(error).split())}") from error
    return found


def require_model(path: str) -> None:
    """Raise UserError unless `path` is a folder with a `config.json`, or a Hub id that can be read."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            raise UserError(f"the folder `{path}` holds no config.json: it is not a network in transformers' layout.")
        return
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"there is no folder `{path}`, and it does not have the form of a Hub id.")
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        model_info(path, timeout=10)
    except GatedRepoError as error:
        raise UserError(f"the Hub's `{path}` is gated: accept its terms there and run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"`{path}` is no folder here and no network on the Hub.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"`{path}` is no folder here, and the Hub cannot be reached to look for it there.") from error
    except Exception as error:  # httpx's own errors, which are not OSErrors
        raise UserError(f"`{path}` is no folder here, and the Hub cannot be asked for it: {error}") from error


def read_weights(
    auto: type[Any], path: str, config: TransformersConfig, dtype: torch.dtype, new_head: bool
) -> nn.Module:
    """Read a pretrained network.

    auto: the Auto class. new_head: whether weights outside the base network may be missing (then they are drawn from
    torch's generator, and that is said). A `vocab_size` that is larger than the network's gives it new tokens, whose
    embeddings are the mean of the others. Raises UserError, also when the folder holds another kind of network.
    """
    reading, settings = config.reading, read_config(path, config)
    kind = attention(settings, config)
    tokens = new_tokens(path, config)
    if tokens:
        settings.get_text_config().vocab_size = tokens.start
    how: dict[str, Any] = {}
    if reading.quantize:
        from scaletrain.networks.quantised import settings_of

        with torch.device("meta"):
            how["quantization_config"] = settings_of(reading.quantize, _empty(auto, path, config, dtype))
    try:
        module, loaded = auto.from_pretrained(
            path, config=settings, dtype=dtype, attn_implementation=kind, trust_remote_code=reading.trusted,
            ignore_mismatched_sizes=new_head, output_loading_info=True, **how,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(path, error) from error
    missing = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    base = f"{module.base_model_prefix}."
    wanting = [key for key in missing if key.startswith(base) or not new_head]
    if wanting:
        raise UserError(
            f"`{path}` lacks weights of a {type(module).__name__}, such as {', '.join(wanting[:3])} "
            f"({len(wanting)} in all): it holds another kind of network."
        )
    if missing:
        log.info("new weights, since `%s` has none that fit: %s", path, ", ".join(missing))
    if tokens:
        _add_tokens(module, tokens)
        log.info("%s new tokens: their embeddings are the mean of those of `%s`", f"{len(tokens):,}", path)
    if reading.quantize:
        from scaletrain.networks.quantised import settle

        settle(module)
        log.info("weights of linear modules are held in %s", reading.quantize.type)
    return module


def new_tokens(path: str, config: TransformersConfig) -> range:
    """Return the rows that embeddings of a pretrained network get by `config.vocab_size`. Raises UserError."""
    wanted = config.options.get("vocab_size")
    if wanted is None:
        return range(0)
    plain = type(config)(model_type=config.model_type)
    plain._reading = config.reading
    has = read_config(path, plain).get_text_config().vocab_size
    if wanted < has:
        raise UserError(f"config.vocab_size is {wanted:,}, and `{path}` has {has:,} tokens: none can be taken away.")
    return range(has, wanted)


@torch.no_grad()
def _add_tokens(module: Any, tokens: range) -> None:
    """Give a network rows for new tokens, each the mean of the old ones; exactly as many as are asked for."""
    module.resize_token_embeddings(tokens.stop, mean_resizing=False)
    ends = [module.get_input_embeddings(), module.get_output_embeddings()]
    matrices = {id(t): t for end in ends if end is not None for t in (end.weight, getattr(end, "bias", None))}
    for values in matrices.values():
        if values is not None:
            values[tokens.start :] = values[: tokens.start].float().mean(0).to(values.dtype)


def outline(auto: type[Any], path: str, config: TransformersConfig, dtype: torch.dtype) -> nn.Module:
    """Build a pretrained network as `read_weights` does, without its weights. Raises UserError."""
    module = _empty(auto, path, config, dtype)
    if config.reading.quantize:
        from scaletrain.networks.quantised import pack

        pack(module, config.reading.quantize)
    return module


def _empty(auto: type[Any], path: str, config: TransformersConfig, dtype: torch.dtype) -> nn.Module:
    settings, trusted = read_config(path, config), config.reading.trusted
    kind = attention(settings, config)
    module: nn.Module = auto.from_config(settings, dtype=dtype, attn_implementation=kind, trust_remote_code=trusted)
    return module


def attention(settings: Any, config: TransformersConfig) -> str | None:
    """Return what the recipe says, or eager where scores are capped, which torch's attention does not do.

    None: torch's attention where the architecture takes it.
    """
    capped = getattr(settings.get_text_config(), "attn_logit_softcapping", None) is not None
    found: str | None = config.options.get("attn_implementation", "eager" if capped else None)
    return found


def _unreadable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return UserError(
            f"`{path}` needs code of its own, which may do anything. Read it, and if you trust it set "
            "`trust_remote_code: true` for this network, beside its `path`."
        )
    return UserError(f"`{path}` cannot be read: {reason}")
