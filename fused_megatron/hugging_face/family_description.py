"""What a family of models is."""

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
    """A family of transformers' models.

    Attributes:
        model_type: in config.json.
        architectures: the classes of the model; first the one with its head.
        prefix: of the names of all tensors but the head; a checkpoint of the bare model lacks it.
        read: config.json to the fields of config_type.
        write: the reverse; what it cannot say is found by reading it back.
        rules: of the tensors, for a config and a prefix.
        config_type: of the model here.
        untrained: glob patterns of tensors of heads that `train` does not train.
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
        """The class that holds the head, too."""
        return self.architectures[0]

    def read_config(self, settings: Settings) -> TransformerConfig:
        """The model that config.json describes.

        Raises:
            InputError: a field that is missing or malformed, or a feature that our models do not have.
        """
        settings.require("quantization_config", None, [None])
        settings.require("add_cross_attention", False, [False])
        try:
            return self.config_type(**self.read(settings))
        except InputError as error:
            source = "" if str(error).startswith(settings.source) else f"{settings.source}: "
            raise InputError(f"{source}{error}") from None

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """config.json of the model."""
        common = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_embeddings,
        }
        return common | self.write(config)

    def architecture_in(self, config_json: Mapping[str, Any]) -> str:
        """The class that config.json names, else the one that holds the head."""
        return str((config_json.get("architectures") or self.architectures)[0])

    def prefix_in(self, names: Iterable[str]) -> str:
        """The prefix of these tensors: the family's, or none in a checkpoint of the bare model."""
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""


# What old versions wrote beside the weights.
_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq", "*.embeddings.position_ids")


def is_buffer(name: str) -> bool:
    """Whether a tensor of theirs is no weight."""
    return any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in _BUFFERS)
