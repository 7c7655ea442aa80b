"""Start here when positions, dropout, overlap or a seed reach only some of a model's layers."""

import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_megatron.checks import InputError
from fused_megatron.config import MODEL_FAMILIES, BERTConfig, GPTConfig
from fused_megatron.data.batch import Batch
from fused_megatron.mesh import ParallelLayout, init_mesh
from fused_megatron.models import BERT, GPT, BatchSlice, new_model
from fused_megatron.models.registry import MODELS
from fused_megatron.models.rotary import rotary_tables
from fused_megatron.sharding import SequenceLayout, SequencePartition
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks

SIZES = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "seq_len": 16, "vocab_size": 101, "init_std": 0.3}
DROPOUT = {"hidden_dropout": 0.3, "embedding_dropout": 0.3}
S, B, BATCH_SLICE = 16, 3, BatchSlice(5, 2, 8)
CONFIGS = [
    GPTConfig(**SIZES, **DROPOUT),
    GPTConfig(**SIZES, **DROPOUT, recompute="full", tied_embeddings=False),
    BERTConfig(**SIZES, **DROPOUT),
]


def batch_of_tokens():
    generator = torch.Generator().manual_seed(5)
    tokens, target = torch.randint(101, (2, B, S), generator=generator)
    return Batch(tokens, target)


def without_attention(model):
    """Remove attention's output, so that the loss of a token depends on no other token."""
    for name, parameter in model.named_parameters():
        if name.endswith("attention.projection.weight"):
            torch.nn.init.zeros_(parameter)
    return model


def on_context_parallel_ranks(rank, world_size):
    """Compare logits and gradients; return the refusals without a partition, and with one for other ranks."""
    mesh = init_mesh(context_parallel_size=2)
    batch, partition = batch_of_tokens(), SequencePartition.contiguous(S, 2)
    config = dataclasses.replace(CONFIGS[0], attention_dropout=0.1)
    whole = new_model(config, seed=3, dtype=torch.float64)
    model = new_model(config, layout=mesh.layout(), seed=3, dtype=torch.float64)
    refusals = []
    for wrong in (None, SequencePartition.contiguous(S, 4)):
        with pytest.raises(InputError) as refused:
            model(batch.inputs, batch.targets, batch_slice=BATCH_SLICE, partition=wrong)
        refusals.append(str(refused.value))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch.inputs), whole.eval()(batch.inputs))
    part = batch.take(partition.layouts[rank])
    loss = model.train()(part.inputs, part.targets, batch_slice=BATCH_SLICE, partition=partition, reduction="sum")
    loss.backward()
    whole.train()(batch.inputs, batch.targets, batch_slice=BATCH_SLICE, reduction="sum").backward()
    for found, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        torch.distributed.all_reduce(found.grad)
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9)
    return refusals


def test_context_parallel_ranks_have_parts_of_one_sequence():
    for missing, other in run_on_ranks(on_context_parallel_ranks, 2):
        assert missing.startswith("partition=None must be given for the 2 ranks of cp_group")
        assert other == "partition has 4 ranks, and cp_group has 2"


def losses_of_a_part(rank, world_size, ranges, sequence_parallel):
    """Return for each config the largest error of losses and gradients at these positions, by the whole sequence."""
    mesh, errors = init_mesh(world_size), []
    sequence = SequenceLayout(S, ranges)
    batch = batch_of_tokens()
    part = batch.take(sequence)
    for config in CONFIGS:
        whole = without_attention(new_model(config, seed=3, dtype=torch.float64))
        losses = whole(batch.inputs, batch.targets, batch_slice=BATCH_SLICE)[:, sequence.positions()]
        losses.sum().backward()
        layout = mesh.layout(sequence_parallel=sequence_parallel)
        model = without_attention(new_model(config, layout=layout, seed=3, dtype=torch.float64))
        found = model(part.inputs, part.targets, batch_slice=BATCH_SLICE, sequence=sequence)
        found.sum().backward()
        errors.append(float((found - losses).detach().abs().max()))
        table, wanted = model.position_embedding.grad, whole.position_embedding.grad
        errors.append(float((table - wanted).abs().max()))
    return errors


@pytest.mark.parametrize(("ranks", "parts"), [
    (1, [((4, 8), (12, 16)), ((10, 16), (1, 2), (4, 5))]),
    (2, [((0, 4), (12, 16)), ((4, 7), (9, 14))]),
])  # fmt: skip
def test_a_rank_embeds_and_drops_what_the_whole_model_has_at_its_positions(ranks, parts):
    cases = [(ranges, ranks > 1) for ranges in parts]
    for case, by_rank in zip(cases, run_cases_on_ranks(losses_of_a_part, ranks, cases), strict=True):
        for errors in by_rank:
            assert max(errors) < 1e-9, (case, errors)


@pytest.mark.parametrize("scaling", [{}, {"rotary_scaling": "dynamic", "rotary_original_seq_len": 8}])
def test_a_rank_rotates_by_its_positions_in_the_whole_sequence(scaling):
    model = GPT(GPTConfig(**SIZES, position="rotary", **scaling))
    x, layout = torch.zeros(1), SequenceLayout.zigzag(S, 1, 2)
    for table, whole in zip(model._rotary(layout, x), model._rotary(SequenceLayout.whole(S), x), strict=True):
        assert torch.equal(table, whole[layout.positions()])


def test_rotary_tables_stay_until_another_layout_or_dtype_needs_others():
    model = GPT(GPTConfig(**SIZES, position="rotary"))
    # The meta device stands for a GPU.
    x, whole = torch.zeros(1, device="meta"), SequenceLayout.whole(S)
    with torch.inference_mode():
        tables = model._rotary(whole, x)
    assert model._rotary(SequenceLayout.whole(S), x + 1) is tables
    assert not any(table.is_inference() or table.requires_grad for table in tables)
    for layout, like in ((SequenceLayout.zigzag(S, 1, 2), x), (whole, x.double()), (whole, torch.zeros(1)), (whole, x)):
        found, right = model._rotary(layout, like), rotary_tables(layout, model.config, device=like.device)
        assert found is not tables and found[0].device == like.device and found[0].shape == right[0].shape
        assert found[0].dtype == (torch.float64 if like.dtype == torch.float64 else torch.float32)
        if not like.is_meta:
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not any("table" in name for name in model.state_dict())
    assert copy.deepcopy(model)._rotary(whole, x) is not model._rotary(whole, x)
    with FakeTensorMode(), torch.no_grad():
        fake = model._rotary(whole, torch.zeros(1, device="meta"))
    assert isinstance(fake[0], FakeTensor)


def test_positions_that_are_not_those_of_the_tokens():
    model, tokens = GPT(GPTConfig(**SIZES)), torch.zeros(1, 8, dtype=torch.int64)
    for sequence in (SequenceLayout.whole(9), SequenceLayout(32, ((0, 8),))):
        with pytest.raises(InputError, match="must have 8 positions, as many as there are tokens, and"):
            model(tokens, sequence=sequence)


def overlaps(rank, world_size):
    """Return the overlap setting of each layer of each model."""
    layout = ParallelLayout(init_mesh(world_size).tp_group, sequence_parallel=True, overlap=3)
    forms = [GPTConfig(**SIZES, num_kv_heads=2, activation="swiglu"), BERTConfig(**SIZES, next_sentence_head=True)]
    models = [new_model(config, layout=layout, device=torch.device("meta")) for config in forms]
    return [[m.overlap for m in model.modules() if hasattr(m, "overlap")] for model in models]


def test_overlap_reaches_every_layer():
    for gpt, bert in run_on_ranks(overlaps, 2):
        assert gpt == 8 * [3] and bert == 11 * [3]


def test_each_family_of_the_config_has_a_model_and_the_reverse():
    assert MODELS.keys() == MODEL_FAMILIES.keys()
    for family, traits in MODEL_FAMILIES.items():
        config = dataclasses.replace(traits.config(), **SIZES)
        assert config.family == family and type(new_model(config, device=torch.device("meta"))) is MODELS[family]
    assert not issubclass(BERTConfig, GPTConfig)
    with pytest.raises(InputError, match="family='gpt' must be a GPTConfig, not a BERTConfig"):
        BERTConfig(family="gpt")


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = BERT(BERTConfig(**SIZES), seed=1)
    twin = copy.deepcopy(model)
    tokens = batch_of_tokens().inputs
    assert torch.equal(model(tokens), twin(tokens))
    twin.reset_parameters(2)
    assert not torch.equal(model(tokens), twin(tokens))
