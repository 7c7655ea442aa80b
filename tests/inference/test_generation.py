"""Start here when generated tokens differ between ranks, layouts or batches, or with and without a key-value cache."""

from typing import Any

import pytest
import torch

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.inference.generation import continue_prompts, generate, reads_at_once
from fused_megatron.inference.sampling import Sampling
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT, cut_stages
from fused_megatron.models.key_value_cache import KeyValueCache
from fused_megatron.testing.run_on_ranks import run_on_ranks

CONFIG = GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=8, vocab_size=21, init_std=0.5)
START = torch.tensor([[3, 1, 4], [1, 5, 9]])


def sampled(rank: int, world_size: int, sequence_parallel: bool, temperature: float, top_k: int) -> torch.Tensor:
    model = GPT(CONFIG, layout=init_mesh(world_size).layout(sequence_parallel=sequence_parallel), seed=1)
    return generate(model, START, 12, temperature=temperature, top_k=top_k, seed=7)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (0.7, 5), (2.0, 100)])
def test_every_layout_draws_the_same(temperature: float, top_k: int) -> None:
    (one,) = run_on_ranks(sampled, 1, False, temperature, top_k)
    assert one.shape == (2, 15) and torch.equal(one[:, :3], START)
    assert int(one.max()) < 21  # never a padding entry of the vocabulary
    for sequence_parallel in (False, True):
        for other in run_on_ranks(sampled, 2, sequence_parallel, temperature, top_k):
            assert torch.equal(one, other)


def test_temperature_zero_takes_the_likeliest_and_top_1_too() -> None:
    model = GPT(CONFIG, seed=1)
    tokens = START
    for _ in range(10):
        logits = model(tokens[:, -8:])[:, -1, :21]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, START, 10, temperature=0.0), tokens)
    assert torch.equal(generate(model, START, 10, temperature=3.0, top_k=1), tokens)


def test_bad_input() -> None:
    model = GPT(CONFIG, seed=1)
    with pytest.raises(InputError, match=r"must be \[B, S\] with S above 0"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(InputError, match="temperature=-1"):
        generate(model, START, 3, temperature=-1)


class Fixed(torch.nn.Module):
    """A model with the same logits at every position."""

    tp_group, sequence_parallel, vocab_size, config = None, False, 4, CONFIG

    def forward(self, tokens: torch.Tensor, *, cache: KeyValueCache | None = None) -> torch.Tensor:
        return torch.tensor([2.0, 1.0, 1.9, 0.0]).expand(*tokens.shape, 4)


@pytest.mark.parametrize(
    ("top_k", "drawn"), [(1, {0}), (2, {0, 2}), (3, {0, 1, 2}), (4, {0, 1, 2, 3}), (0, {0, 1, 2, 3})]
)
def test_top_k_draws_from_the_likeliest_k_tokens(top_k: int, drawn: set[int]) -> None:
    tokens = generate(Fixed(), torch.zeros(50, 1, dtype=torch.int64), 4, temperature=2.0, top_k=top_k)
    assert set(tokens[:, 1:].flatten().tolist()) == drawn


LLAMA = {
    "position": "rotary",
    "normalization": "rms_norm",
    "activation": "swiglu",
    "num_heads": 4,
    "num_kv_heads": 2,
    "linear_biases": False,
    "tied_embeddings": False,
}
ORIGINAL = {"rotary_original_seq_len": 12, "rotary_scaling_factor": 2.0}
CAPACITY = "experts with a capacity"
# The last entry is the number of tokens up to which the cache serves.
FORMS: dict[str, tuple[dict[str, Any], int]] = {
    "learned positions": ({}, 24),
    "grouped heads": (LLAMA, 24),
    "one key head": ({**LLAMA, "num_kv_heads": 1, "query_key_norm": True, "qkv_bias": True}, 24),
    "a window": ({**LLAMA, "sliding_window": 5}, 24),
    "llama3": ({**LLAMA, **ORIGINAL, "rotary_scaling": "llama3"}, 24),
    "yarn": ({**LLAMA, **ORIGINAL, "rotary_scaling": "yarn", "sliding_window": 7}, 24),
    "dynamic": ({**LLAMA, **ORIGINAL, "rotary_scaling": "dynamic"}, 12),
    "experts": ({**LLAMA, "num_experts": 4, "num_shared_experts": 1}, 24),
    CAPACITY: ({**LLAMA, "num_experts": 4, "capacity_factor": 1.0}, 0),
}
# Of three lengths, so that rows of a batch are at different positions; together with NUM_NEW past seq_len.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [1, 5], [20, 7, 7, 7]]
NUM_NEW = 20
SAMPLING = Sampling(1.0, 9, 0.9, seed=2)


def model_of(form: str, **changes: Any) -> GPT:
    fields = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_len": 24, "vocab_size": 37, "init_std": 0.5}
    return GPT(GPTConfig(**(fields | FORMS[form][0] | changes)), seed=1, dtype=torch.float64).eval()


def prompts_of(form: str) -> list[list[int]]:
    """Return prompts of several lengths, or of one length where padding would change a text."""
    return [[*prompt, 8, 8, 8, 8][:6] for prompt in PROMPTS] if form in (CAPACITY, "dynamic") else PROMPTS


# Tokens of each row in each forward: rows of several lengths, and of one.
UNEVEN, EVEN = [[4, 1, 2], [1, 1, 1], [2, 3, 1], [1, 1, 1]], [[5, 5, 5], [1, 1, 1], [1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize("news", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("form", FORMS)
def test_a_cache_changes_no_logit(form: str, news: list[list[int]]) -> None:
    """Each row's next logits equal those of a forward over its tokens from the first one."""
    model, generator = model_of(form), torch.Generator().manual_seed(3)
    assert reads_at_once(model.config) == FORMS[form][1]
    lengths = [0, 0, 0]
    rows = torch.randint(37, (3, 9), generator=generator)
    if form == CAPACITY:
        return  # never cached: the number of tokens decides which of them an expert drops
    cache = KeyValueCache(3, 12)
    for new in news:
        width = max(new)
        tokens = torch.full((3, width), 30)
        for row, (start, count) in enumerate(zip(lengths, new, strict=True)):
            tokens[row, :count] = rows[row, start : start + count]
        lengths = [start + count for start, count in zip(lengths, new, strict=True)]
        cache.begin(new, width)
        with torch.no_grad():
            found = model(tokens, cache=cache)
            cache.keep()
            for row, length in enumerate(lengths):
                expected = model(rows[row : row + 1, :length])[0, -1]
                torch.testing.assert_close(found[row, 0], expected, rtol=0, atol=1e-12)
    assert cache.lengths == lengths


@pytest.mark.parametrize(
    "form",
    [
        form if form in ("a window", "dynamic", CAPACITY) else pytest.param(form, marks=pytest.mark.slow)
        for form in FORMS
    ],
)
def test_prompts_in_a_batch_go_on_as_each_does_alone_and_without_a_cache(form: str) -> None:
    model, prompts = model_of(form), prompts_of(form)
    found = continue_prompts(model, prompts, NUM_NEW, Sampling(1.0, 0, 0.95, seed=5))
    assert [len(row) for row in found] == [NUM_NEW] * 3
    for row, prompt in enumerate(prompts):
        alone = Sampling(1.0, 0, 0.95, seed=5 + row)
        assert continue_prompts(model, [prompt], NUM_NEW, alone, use_cache=row != 1) == [found[row]]


def counted(model: GPT) -> list[int]:
    """Return a list that gets the number of tokens of each forward."""
    counts: list[int] = []
    model.register_forward_pre_hook(lambda _, tokens: counts.append(tokens[0].shape[1]))
    return counts


def test_a_token_costs_a_forward_over_one_position_up_to_seq_len() -> None:
    model = model_of("grouped heads")
    counts = counted(model)
    continue_prompts(model, PROMPTS, NUM_NEW)
    assert counts == [7] + [1] * 17 + [24] * 2
    counts.clear()
    continue_prompts(model, [PROMPTS[0]], 3, use_cache=False)
    assert counts == [7, 8, 9]


def test_a_text_stops_at_its_end_and_the_batch_at_the_last_end() -> None:
    model = model_of("grouped heads")
    whole = continue_prompts(model, PROMPTS, NUM_NEW, Sampling(seed=5))
    ends = {whole[0][4], whole[1][8], whole[2][6]}
    shown: list[list[int | None]] = []
    found = continue_prompts(model, PROMPTS, NUM_NEW, Sampling(seed=5), end_tokens=ends, on_tokens=shown.append)
    for row, (stopped, full) in enumerate(zip(found, whole, strict=True)):
        last = next(i for i, token in enumerate(full) if token in ends)
        assert stopped == full[: last + 1]
        assert [tokens[row] for tokens in shown] == stopped + [None] * (len(shown) - len(stopped))
    assert len(shown) == max(map(len, found)) < NUM_NEW
    tokens = generate(model, torch.tensor(PROMPTS[:1]), NUM_NEW, seed=5, end_tokens=ends)
    assert tokens.tolist() == [PROMPTS[0] + found[0]]
    two = generate(model, torch.tensor([PROMPTS[0]] * 2), NUM_NEW, seed=5, end_tokens=[found[0][-1]])
    assert two.shape[0] == 2 and two[0, 7 + len(found[0]) - 1 :].unique().tolist() == [found[0][-1]]


def test_a_failure_leaves_the_model_in_training_mode() -> None:
    def fail(_: list[int | None]) -> None:
        raise BrokenPipeError

    model = model_of("grouped heads").train()
    with pytest.raises(BrokenPipeError):
        continue_prompts(model, PROMPTS, 3, on_tokens=fail)
    assert model.training


def test_nothing_to_add_and_nothing_to_continue() -> None:
    model = model_of("grouped heads")
    assert continue_prompts(model, PROMPTS, 0) == [[], [], []]
    with pytest.raises(InputError, match="prompts must not be empty, and each must have a token"):
        continue_prompts(model, [[1], []], 3)
    with pytest.raises(InputError, match="prompts must not be empty"):
        continue_prompts(model, [], 3)
    with pytest.raises(InputError, match=r"prompts of 2, 4, 7 tokens must have one length, since capacity_factor=1\.0"):
        continue_prompts(model_of(CAPACITY), PROMPTS, 3)
    with pytest.raises(InputError, match="one length, since rotary_scaling='dynamic' counts padding beyond 12 tokens"):
        continue_prompts(model_of("dynamic"), PROMPTS, 6)
    assert continue_prompts(model_of("dynamic"), PROMPTS, 5)
    with pytest.raises(InputError, match="cache must be None in training"):
        model.train()(torch.ones(1, 3, dtype=torch.int64), cache=KeyValueCache(1, 3))


def texts_of_layouts(rank: int, world_size: int, forms: list[str]) -> dict[str, list[list[int]]]:
    """Return the tokens of each form at two tensor-parallel ranks, also sequence-parallel, and in two stages."""
    meshes = {"tp": init_mesh(2), "pp": init_mesh(1, 2)}
    found = {}
    for form in forms:
        config = model_of(form).config
        built = {
            "tp": GPT(config, layout=meshes["tp"].layout(), seed=1, dtype=torch.float64),
            "sp": GPT(config, layout=meshes["tp"].layout(sequence_parallel=True), seed=1, dtype=torch.float64),
            "pp": ModelStages(
                cut_stages(config, 2),
                (0, 1),
                meshes["pp"].pp_group,
                lambda span, config=config: GPT(config, seed=1, stage=span, dtype=torch.float64),
            ),
        }
        if form == "dynamic":
            del built["sp"]  # beyond 12 tokens the padding to a multiple of 2 counts as length
        for layout, model in built.items():
            found[f"{form}: {layout}"] = continue_prompts(model, prompts_of(form), NUM_NEW, SAMPLING)
    return found


@pytest.mark.parametrize(
    "forms",
    [
        pytest.param(["one key head", "dynamic", "experts"], id="some"),
        pytest.param(list(FORMS), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_layout_continues_every_form_the_same(forms: list[str]) -> None:
    expected = {form: continue_prompts(model_of(form), prompts_of(form), NUM_NEW, SAMPLING) for form in forms}
    for of_rank in run_on_ranks(texts_of_layouts, 2, forms):
        assert len(of_rank) == 3 * len(forms) - 1
        for name, tokens in of_rank.items():
            assert tokens == expected[name.split(":")[0]], name
