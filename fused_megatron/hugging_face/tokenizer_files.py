"""Special tokens of a model in the form of transformers: ids in config.json, and the files beside it."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.config import TransformerConfig
from fused_megatron.data.tokenizer import Tokenizer
from fused_megatron.hugging_face.source import CONFIG_FILE
from fused_megatron.weight_files import read_json

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Names of the padding token in known tokenizers; the first one in the vocabulary is used.
_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>")
# Tokens of a masked language model, by their keys in tokenizer_config.json.
_MASKED_LM = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that begin, end and pad a text; None: unknown, since the run has no tokenizer."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def as_fields(self) -> dict[str, int | None]:
        """Return the fields of config.json. They are there also if unknown: transformers' defaults are other tokens."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def special_ids(tokenizer: Tokenizer | None) -> SpecialIds:
    """Return the special ids of a model that was trained with this tokenizer.

    In training an end of document precedes each document. So it also begins a text, unless the tokenizer has a start
    token, which it then puts before every prompt. It pads texts, unless the tokenizer has a padding token.
    """
    if tokenizer is None:
        return SpecialIds()
    end, special = tokenizer.end_of_document, tokenizer.special_ids
    start = [int(each) for each in tokenizer.encode_prompt("")[:1] if int(each) in special.values()]
    pad = next((special[name] for name in _PADS if name in special), end)
    return SpecialIds(start[0] if start else end, end, pad)


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, config: TransformerConfig) -> None:
    """Write tokenizer_config.json beside a tokenizer.json, and generation_config.json for a model that generates.

    transformers' AutoTokenizer then pads on the left, where a continuation does not begin, and `generate` ends at the
    end of a document. Files that exist stay.
    """
    ids, names = special_ids(tokenizer), {index: name for name, index in tokenizer.special_ids.items()}
    tokens = {"bos_token": ids.bos, "eos_token": ids.eos, "pad_token": ids.pad}
    named = {key: names[index] for key, index in tokens.items() if index in names}
    if not config.traits.generates:
        named = named | {key: name for key, name in _MASKED_LM.items() if name in tokenizer.special_ids}
    _write_absent(
        folder / TOKENIZER_CONFIG_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.seq_len,
            "padding_side": "left" if config.traits.generates else "right",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **named,
        },
    )
    if config.traits.generates:
        _write_absent(folder / GENERATION_FILE, ids.as_fields())


def _write_absent(path: Path, values: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def end_tokens(run: RunFolder, tokenizer: Tokenizer) -> Collection[int]:
    """Return the ids that end a text: the end of a document, and what the files of an imported model name.

    Raises:
        InputError: a file is damaged.
    """
    found = {tokenizer.end_of_document}
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = run.hugging_face / name
        if path.is_file():
            value = read_json(path).get("eos_token_id")
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(each) is int for each in values):
                raise InputError(f"{path}: eos_token_id={value!r:.60} must be a whole number or a list of them")
            if values:
                return found | set(values)
    return found
