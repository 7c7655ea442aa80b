"""Start here when TRL's trainers compute other losses of a model in shards than of the whole model."""

import copy
import os

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch.nn import functional as F

import fused_megatron as fm
from fused_megatron.interop.whole_head import show_whole_heads
from fused_megatron.testing import run_on_ranks

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 37, "intermediate_size": 24, "num_attention_heads": 4}
IDS = torch.arange(16).view(2, 8) % 37


def llama(ties):
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=ties)
    return hf.LlamaForCausalLM(config)


def loss_of(model):
    """Multiply by the weight of the head, as TRL does."""
    head = model.get_output_embeddings()
    assert head.bias is None
    return F.cross_entropy(F.linear(model.model(IDS).last_hidden_state, head.weight).flatten(0, 1), IDS.flatten())


def compare(rank, world_size, ties, sequence_parallel):
    original = llama(ties)
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    model = fm.parallelize(copy.deepcopy(original), mesh, sequence_parallel=sequence_parallel)
    show_whole_heads(model)
    expected, found = loss_of(original), loss_of(model)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    gradients = {name: p.grad for name, p in original.named_parameters()}
    for name, p in model.named_parameters():
        full = fm.interop.full_tensor(p, p.grad, mesh.tp_group)
        torch.testing.assert_close(full, gradients[name], rtol=1e-4, atol=1e-6)
    assert copy.deepcopy(model).get_output_embeddings().weight.shape == (37, 16)


@pytest.mark.parametrize(
    ("ties", "sequence_parallel"), [pytest.param(False, False, marks=pytest.mark.slow), (True, True)]
)
def test_losses_and_gradients_from_the_weight_of_a_head(ties, sequence_parallel):
    run_on_ranks(compare, 2, ties, sequence_parallel)


def fine_tune(rank, world_size, folder):
    """Return the logs of TRL's SFTTrainer."""
    import trl  # noqa: PLC0415 - the test skips without it
    from datasets import Dataset  # noqa: PLC0415 - trl needs it
    from tokenizers import Tokenizer, models  # noqa: PLC0415 - only here

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    model = llama(False)
    callbacks = []
    if world_size > 1:
        fm.parallelize(model, fm.init_mesh(tensor_parallel_size=2))
        callbacks = [fm.TrainerCallback()]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(37)}, unk_token="t0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 37, (9 - i % 3,), generator=draw).tolist()} for i in range(16)]
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
    options |= {"learning_rate": 1e-2, "max_grad_norm": 0.3, "save_steps": 2, "report_to": "none", "use_cpu": True}
    options |= {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "seed": 3}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder / str(world_size)), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_fine_tuning_with_trl(tmp_path):
    pytest.importorskip("trl")
    (expected,) = run_on_ranks(fine_tune, 1, tmp_path, timeout_s=400)
    assert len(expected) == 4
    found = run_on_ranks(fine_tune, 2, tmp_path, timeout_s=400)[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    saved = hf.LlamaForCausalLM.from_pretrained(tmp_path / "2" / "checkpoint-4").state_dict()
    wanted = hf.LlamaForCausalLM.from_pretrained(tmp_path / "1" / "checkpoint-4").state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-5)
