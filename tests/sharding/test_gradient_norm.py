"""Start here when the gradient norm depends on the layout, or clipping scales by another norm."""

import copy
import zlib

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

# Imported here: transformers imports a model at its first use, which each rank would repeat.
from transformers import LlamaConfig, LlamaForCausalLM

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import BERT, GPT, cut_stages
from fused_megatron.sharding import Replicas, full_tensor, parameter_parts
from fused_megatron.sharding.gradient_norm import clip_coefficient, global_gradient_norm, non_finite_gradients
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_len": 8, "vocab_size": 50}
# With 4 ranks of 32 rows each, 2 ranks have padding only.
PADDED = {**SIZES, "pad_vocab_size_to_multiple_of": 128}
CASES = {
    "tied": (GPT, GPTConfig(**SIZES, pad_vocab_size_to_multiple_of=8)),
    "untied, padded": (GPT, GPTConfig(**PADDED, tied_embeddings=False)),
    "one key-value head, stacked": (GPT, GPTConfig(**PADDED, num_kv_heads=1, activation="swiglu")),
    "two key-value heads, frozen": (GPT, GPTConfig(**PADDED, num_kv_heads=2)),
    "BERT, a head without a group": (BERT, BERTConfig(**PADDED, next_sentence_head=True)),
}
FROZEN = ("final_norm.weight", "blocks.1.attention")


def test_parameters_in_place_of_the_module_are_one_line():
    with pytest.raises(InputError, match=r"model=generator must be the module itself, not its parameters"):
        fm.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)


def whole_gradient(name, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fill_gradients_(case, model):
    """Set the gradients to this rank's shards of the full gradients; return the parameters with a gradient, by name."""
    frozen = FROZEN if "frozen" in case else ()
    trained = {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}
    for name, parameter in trained.items():
        parameter.grad = torch.zeros_like(parameter)
        for part in parameter_parts(parameter):
            held = part.held(parameter.grad)
            held.tensor.copy_(whole_gradient(part.full_name(name), held.full_shape)[held.box.slices()])
    return trained


def norms(rank, world_size, tp, pp):
    """Return for each case: norm of the public function (this stage), the trainer's norm, stage, clipping is right."""
    mesh, found = fm.init_mesh(tensor_parallel_size=tp, pipeline_parallel_size=pp), {}
    for case, (kind, config) in CASES.items():
        stage = None if pp == 1 else cut_stages(config, pp)[mesh.pp_rank]
        model = kind(config, layout=mesh.layout(), stage=stage, dtype=torch.float64)
        trained = fill_gradients_(case, model)
        gradients = {parameter: parameter.grad.clone() for parameter in trained.values()}
        trainers = global_gradient_norm(trained, gradients, mesh.tp_group, mesh.pp_group)
        public = fm.clip_grad_norm_(model, 1.0)
        clipped = all(torch.allclose(p.grad, g / (public + 1e-6), rtol=1e-12) for p, g in gradients.items())
        found[case] = (float(public), float(trainers), mesh.pp_rank, clipped)
    return found


@pytest.fixture(scope="module")
def expected_norms():
    expected = {}
    for case, (kind, config) in CASES.items():
        trained = fill_gradients_(case, kind(config, dtype=torch.float64))
        expected[case] = float(torch.cat([p.grad.flatten() for p in trained.values()]).norm())
    return expected


GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}  # by ranks: tensor, pipeline


@pytest.mark.parametrize("ranks", GRIDS)
def test_the_norm_is_that_of_the_whole_model(ranks, expected_norms):
    for grid, by_rank in zip(GRIDS[ranks], run_cases_on_ranks(norms, ranks, GRIDS[ranks]), strict=True):
        for case, expected in expected_norms.items():
            found = [rank[case] for rank in by_rank]
            of_stages = {stage: public for public, _, stage, _ in found}
            whole = sum(public**2 for public in of_stages.values()) ** 0.5
            assert whole == pytest.approx(expected, rel=1e-9), (grid, case)
            for public, trainers, stage, clipped in found:
                assert public == of_stages[stage], (grid, case)
                assert trainers == pytest.approx(expected, rel=1e-9), (grid, case)
                assert clipped, (grid, case)


def backward(model, rows=slice(None)):
    ids = torch.randint(0, 13, (4, 8), generator=torch.Generator().manual_seed(1))[rows]
    if isinstance(model, GPT):
        model(ids, ids, reduction="sum").backward()
    else:
        model(ids, labels=ids).loss.backward()


def norms_of_a_backward(rank, world_size, tp, sequence_parallel):
    mesh = fm.init_mesh(tensor_parallel_size=tp)
    config = GPTConfig(**PADDED, num_kv_heads=1)
    model = GPT(config, layout=mesh.layout(sequence_parallel=sequence_parallel), seed=1, dtype=torch.float64)
    backward(model)
    trained = dict(model.named_parameters())
    trainers = global_gradient_norm(trained, {p: p.grad for p in trained.values()}, mesh.tp_group)
    return [float(trainers), float(fm.clip_grad_norm_(model, 1.0))]


def test_the_norm_of_what_backward_leaves():
    (expected, _), *_ = run_on_ranks(norms_of_a_backward, 1, 1, False)
    for ranks, layouts in ((2, [(2, False), (2, True)]), (4, [(4, True)])):
        for layout, by_rank in zip(layouts, run_cases_on_ranks(norms_of_a_backward, ranks, layouts), strict=True):
            for found in by_rank:
                assert found == pytest.approx([expected, expected], rel=1e-9), layout


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 2_000_003])
def test_long_vectors_are_summed_accurately(size):
    parameter = nn.Parameter(torch.zeros(size))
    gradients = GradientBuckets([parameter], Replicas())
    gradients[parameter].copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-3)
    norm = global_gradient_norm({"p": parameter}, gradients, None)
    assert float(norm) == pytest.approx(float(gradients[parameter].double().norm()), rel=1e-7)


def test_clip_coefficient_is_that_of_torch():
    for norm in (0.5, 1.0, 7.0):
        p = nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        assert norm * clip_coefficient(norm, 1.0) == pytest.approx(float(p.grad), rel=1e-6)
    assert clip_coefficient(1e9, 0.0) == 1.0


def test_names_of_parameters_that_are_not_finite():
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in "abc"}
    gradients = GradientBuckets(list(parameters.values()), Replicas())
    gradients[parameters["b"]][1] = float("nan")
    gradients[parameters["c"]][2] = float("-inf")
    assert non_finite_gradients(gradients.by_name(parameters)) == ["b", "c"]


def llama():
    """Make a model with a key-value head that two ranks hold, a tied head, and an odd vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=13, intermediate_size=24,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt_with_one_key_value_head(tp_group=None):
    return GPT(GPTConfig(**PADDED, num_kv_heads=1), layout=ParallelLayout(tp_group), seed=1)


def clips(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    for norm_type in (2.0, 1.0, float("inf")):
        original = llama()
        model = fm.parallelize(copy.deepcopy(original), mesh)
        for one in (original, model):
            backward(one)
        expected = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.01, norm_type)
        torch.testing.assert_close(fm.clip_grad_norm_(model, 0.01, norm_type), expected, rtol=1e-5, atol=0)
        gradients = {name: p.grad for name, p in original.named_parameters()}
        for name, p in model.named_parameters():
            whole = full_tensor(p, p.grad, mesh.tp_group)
            torch.testing.assert_close(whole, gradients[name], rtol=1e-4, atol=1e-7)
    model.lm_head.weight.grad[0, 0] = float("nan")  # of one rank's shard, refused on both
    with pytest.raises(RuntimeError, match=r"the gradient norm of order 2\.0 is nan"):
        fm.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def test_a_parallelized_model_and_other_orders_of_norm():
    run_on_ranks(clips, 2, timeout_s=240)


def test_a_model_without_shards():
    model = nn.Linear(3, 3)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(torch.ones(2, 3)).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    assert torch.equal(fm.clip_grad_norm_(model, 0.1), expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def with_fsdp2(rank, world_size):
    """Clip under FSDP2, which loses the records; the second rank counts only the query rows of a stack with copies."""
    mesh = fm.init_mesh(tensor_parallel_size=2)
    pairs = [(llama(), None), (gpt_with_one_key_value_head(), gpt_with_one_key_value_head(mesh.tp_group))]
    for original, model in pairs:
        model = fm.parallelize(copy.deepcopy(original), mesh) if model is None else model
        fully_shard(model, mesh=mesh.device_mesh["dp"])
        backward(model, slice(2 * mesh.dp_rank, 2 * mesh.dp_rank + 2))
        for rows in (slice(0, 2), slice(2, 4)):
            backward(original, rows)
        for p in original.parameters():
            p.grad /= 2
        expected = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.01)
        torch.testing.assert_close(fm.clip_grad_norm_(model, 0.01), expected, rtol=1e-5, atol=0)
        norm, wanted = (m.model.norm if hasattr(m, "model") else m.final_norm for m in (model, original))
        torch.testing.assert_close(norm.weight.grad.full_tensor(), wanted.weight.grad, rtol=1e-4, atol=1e-7)


def test_fsdp2_around_shards():
    run_on_ranks(with_fsdp2, 4, timeout_s=240)
