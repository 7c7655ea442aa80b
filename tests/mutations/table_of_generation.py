"""Table of mistakes in generation and in exported tokenizers: (name, file, old, new, tests) of a Mutation."""

_CACHE = "fused_megatron/models/key_value_cache.py"
_FILES = "fused_megatron/hugging_face/tokenizer_files.py"
_GENERATE = "fused_megatron/training/generate_text.py"
_GENERATION = ("tests/inference/test_generation.py",)
_LOGITS = ("tests/inference/test_generation.py::test_a_cache_changes_no_logit",)
_SAMPLING = ("tests/inference/test_sampling.py",)
_TOKENIZER = ("tests/hugging_face/test_tokenizer_files.py",)

MUTATIONS = (
    (
        "a cached window is one key too long",
        _CACHE,
        "max(0, stop - mask.window)",
        "max(0, stop - mask.window - 1)",
        _LOGITS,
    ),
    ("a short row sees the keys of no token", _CACHE, "key <= query", "key >= 0 * query", _LOGITS),
    (
        "a cached token has the position of the longest row",
        _CACHE,
        "torch.tensor(self.lengths, ",
        "torch.tensor([max(self.lengths)] * len(self.lengths), ",
        _LOGITS,
    ),
    ("the first row's last token counts for all", _CACHE, "return x[rows, torch", "return x[rows[:1], torch", _LOGITS),
    (
        "sequences share their random numbers",
        "fused_megatron/inference/sampling.py",
        "self.seed + row",
        "self.seed",
        _SAMPLING,
    ),
    (
        "top_p stops one token late",
        "fused_megatron/inference/sampling.py",
        "before < top_p",
        "before <= top_p",
        _SAMPLING,
    ),
    (
        "a text goes on after its end",
        "fused_megatron/inference/generation.py",
        "tokens[: first + 1]",
        "tokens",
        _GENERATION,
    ),
    (
        "a rank that is done reads on",
        "fused_megatron/inference/generation.py",
        "[min(n, len(row) - 1) for",
        "[n for",
        ("tests/hugging_face/test_mixtral.py::test_ranks_that_share_experts_generate_texts_of_their_own",),
    ),
    (
        "a character is shown in parts",
        "fused_megatron/inference/text_stream.py",
        "(wait and text.endswith(_INCOMPLETE))",
        "False",
        ("tests/inference/test_text_stream.py",),
    ),
    (
        "config.json keeps transformers' own ends",
        "fused_megatron/hugging_face/export_model.py",
        "written |= special_ids(tokenizer).as_fields()",
        "pass",
        _TOKENIZER,
    ),
    ("the tokenizer pads on the right", _FILES, '"left" if config', '"right" if config', _TOKENIZER),
    (
        "sizes that do not divide the key heads are offered",
        _GENERATE,
        "heads = model.num_heads % ranks == 0 and (model.kv_heads % ranks == 0 or shared)",
        "heads = model.kv_heads % ranks == 0 or shared",
        ("tests/training/test_generate_text.py::test_numbers_of_ranks_that_do_not_fit_are_named",),
    ),
    (
        "a learned table of positions is cut",
        "fused_megatron/training/config_of_this_machine.py",
        'model.position == "rotary" and ',
        "",
        ("tests/training/test_config_of_this_machine.py",),
    ),
)
