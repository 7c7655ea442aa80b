"""Description of a Hugging Face model family: how its config.json and its tensor names translate to ours."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig, TransformerConfig
from fused_megatron.hugging_face.rules import Rule
from fused_megatron.hugging_face.settings import Settings


@dataclass(frozen=True)
class Family:
    """A Hugging Face model family.

    Attributes:
        model_type: the model_type of its config.json.
        architectures: transformers classes of the model; the first one has the language-model head.
        prefix: prefix of all tensor names except the head's. A checkpoint of the model without a head has no prefix.
        read: converts config.json to the fields of config_type.
        write: converts our config to config.json. Fields that it cannot express show when the result is read back.
        rules: returns the tensor rules for a config and a prefix.
        config_type: our config class.
        untrained: glob patterns of the tensors of heads that `train` does not train.
    """

    model_type: str
    architectures: tuple[str, ...]
    prefix: str
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any, str], list[Rule]]
    config_type: type[TransformerConfig] = GPTConfig
    untrained: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The transformers class with the head."""
        return self.architectures[0]

    def read_config(self, settings: Settings) -> TransformerConfig:
        """Convert config.json to our config.

        Raises:
            InputError: a field is missing or malformed, or needs a feature that our models do not have.
        """
        settings.require("quantization_config", None, [None])
        settings.require("add_cross_attention", False, [False])
        try:
            return self.config_type(**self.read(settings))
        except InputError as error:
            source = "" if str(error).startswith(settings.source) else f"{settings.source}: "
            raise InputError(f"{source}{error}") from None

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """Convert our config to config.json."""
        common = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_embeddings,
        }
        return common | self.write(config)

    def architecture_in(self, config_json: Mapping[str, Any]) -> str:
        """Return the class that config.json names; by default the class with the head."""
        return str((config_json.get("architectures") or self.architectures)[0])

    def prefix_in(self, names: Iterable[str]) -> str:
        """Return the prefix of these tensor names: the family's, or "" for a model without a head."""
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""


# Buffers that old versions of transformers wrote with the weights.
_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq", "*.embeddings.position_ids")


def is_buffer(name: str) -> bool:
    """Whether a tensor of a Hugging Face folder is a buffer, not a weight."""
    return any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in _BUFFERS)
