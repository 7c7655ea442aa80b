"""Start here when transformers' Trainer with fm.TrainerCallback trains, saves or evaluates unlike one process."""

import copy
import os

import numpy as np
import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
import transformers.trainer  # as above

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.testing import run_on_ranks

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 37, "intermediate_size": 24, "num_attention_heads": 4}
SAMPLES, STEPS = 32, 6


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=16))


def gpt2():
    torch.manual_seed(0)
    dropouts = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_head=4, n_layer=1, vocab_size=37, n_positions=16, **dropouts))


def samples(count=SAMPLES):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(37, (9,), generator=draw) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def as_torchrun_does(rank, world_size):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})


def trainer_of(model, folder, world_size, data_parallel_size=1, callbacks=(), **options):
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // data_parallel_size,
        "per_device_eval_batch_size": 4 // data_parallel_size,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.3,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_cpu": True,
        "seed": 3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    optimizers = options.pop("optimizers", (None, None))
    held_out = options.pop("held_out", samples(8))
    arguments = hf.TrainingArguments(str(folder), **{**values, **options})
    callbacks = [*callbacks, *([fm.TrainerCallback()] if world_size > 1 else [])]
    return hf.Trainer(
        model,
        arguments,
        train_dataset=samples(),
        eval_dataset=held_out,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def logged(trainer):
    """Return (step, loss, gradient norm) of all steps, and (step, held-out loss) of all evaluations."""
    history = trainer.state.log_history
    steps = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    return np.array(steps), np.array([(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry])


def files_of(folder):
    """Return the weights of a checkpoint, as from_pretrained reads them, and the optimizer's state."""
    weights = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights, torch.load(folder / "optimizer.pt", weights_only=True)["state"]


class SeenNorms(hf.TrainerCallback):
    """A reporter, which gets the logs before fm.TrainerCallback does."""

    def __init__(self):
        self.norms = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []


def train(rank, world_size, folder, name, tensor_parallel_size=1, resume_from=None, **options):
    as_torchrun_does(rank, world_size)
    mesh = fm.init_mesh(tensor_parallel_size=tensor_parallel_size)
    model = {"llama": llama, "gpt2": gpt2}[options.pop("kind", "llama")]()
    zero_stage = options.pop("zero_stage", None)
    if world_size > 1:
        fm.parallelize(model, mesh)
    if zero_stage is not None:
        fm.shard_data_parallel(model, mesh, zero_stage)
        # Trainer's own default has no weight decay.
        options["optimizers"] = (fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0), None)
    reporter = SeenNorms()
    trainer = trainer_of(model, folder / name, world_size, mesh.dp_size, [reporter], **options)
    trainer.train(resume_from_checkpoint=resume_from)
    steps, evaluations = logged(trainer)
    predicted = trainer.predict(samples(7))
    trainer.save_model(str(folder / name / "final"))
    begun = int(steps[-1][0]) - len(reporter.norms)
    np.testing.assert_array_equal(reporter.norms, steps[begun:, 2])
    return steps, evaluations, predicted.predictions, predicted.metrics["test_loss"]


def assert_equal_runs(found, expected, predicts=True):
    steps, evaluations, predictions, test_loss = found
    assert len(steps) == STEPS and len(evaluations) == STEPS // 3
    np.testing.assert_allclose(steps, expected[0], rtol=1e-4)
    np.testing.assert_allclose(evaluations, expected[1], rtol=1e-5)
    if predicts:  # Trainer's own loss of a set that ranks do not divide counts some samples twice
        np.testing.assert_allclose(test_loss, expected[3], rtol=1e-5)
    assert predictions.shape == expected[2].shape == (7, 9, 37)
    np.testing.assert_allclose(predictions, expected[2], rtol=1e-2, atol=2e-4)


def assert_equal_checkpoints(found, expected):
    (weights, moments), (other_weights, other_moments) = files_of(found), files_of(expected)
    assert weights.keys() == other_weights.keys() and moments.keys() == other_moments.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=2e-5)
    for index, of_parameter in moments.items():
        assert of_parameter.keys() == other_moments[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in of_parameter.items():
            torch.testing.assert_close(value, other_moments[index][key], rtol=1e-3, atol=2e-6)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    (found,) = run_on_ranks(train, 1, folder, "one", timeout_s=240)
    assert found[0][-1, 1] < found[0][0, 1] and (found[0][:, 2] > 0.3).all()  # it learns, and every step is clipped
    return folder / "one", found


def test_tensor_parallel_ranks_do_as_one_process(one_process, tmp_path):
    reference, expected = one_process
    found, other = run_on_ranks(train, 2, tmp_path, "two", 2, timeout_s=300)
    assert_equal_runs(found, expected)
    np.testing.assert_array_equal(found[2], other[2])
    for step in ("checkpoint-3", "checkpoint-6"):
        assert_equal_checkpoints(tmp_path / "two" / step, reference / step)
    final = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final").state_dict()
    last = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint-6").state_dict()
    assert all(torch.equal(value, last[name]) for name, value in final.items())


def test_checkpoints_resume_on_any_number_of_ranks(one_process, tmp_path):
    reference, expected = one_process
    found = run_on_ranks(train, 2, tmp_path, "resumed", 2, str(reference / "checkpoint-3"), timeout_s=300)[0]
    assert_equal_runs(found, expected)
    assert_equal_checkpoints(tmp_path / "resumed" / "checkpoint-6", reference / "checkpoint-6")
    (back,) = run_on_ranks(train, 1, tmp_path, "back", 1, str(tmp_path / "resumed" / "checkpoint-6"), timeout_s=300)
    np.testing.assert_allclose(back[2], found[2], rtol=1e-3, atol=1e-5)


def run_with_options(rank, world_size, folder, name, size, options):
    return train(rank, world_size, folder, name, size, **options)


@pytest.mark.parametrize(
    "zero_stage", [None, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_data_parallel_ranks_divide_the_samples(one_process, tmp_path, zero_stage):
    """Also where they share the state. Accelerate's loader draws the same samples in a step for 1 and 2 ranks."""
    reference, expected = one_process
    options = {} if zero_stage is None else {"zero_stage": zero_stage, "save_only_model": False}
    found = run_on_ranks(run_with_options, 4, tmp_path, "four", 2, options, timeout_s=400)
    assert_equal_runs(found[0], expected, predicts=False)
    np.testing.assert_array_equal(found[0][2], found[3][2])
    if zero_stage is None:
        assert_equal_checkpoints(tmp_path / "four" / "checkpoint-6", reference / "checkpoint-6")
    else:
        resumed = {**options, "resume_from": str(tmp_path / "four" / "checkpoint-3")}
        again = run_on_ranks(run_with_options, 2, tmp_path, "again", 1, resumed, timeout_s=400)
        assert_equal_runs(again[0], expected, predicts=False)


@pytest.mark.slow
def test_transposed_weights_and_the_best_model(tmp_path):
    """GPT-2 stores [I, O]. Trainer loads the best checkpoint at the end, which here is an early one."""
    options = {"kind": "gpt2", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options |= {"greater_is_better": True}
    (expected,) = run_on_ranks(run_with_options, 1, tmp_path, "one", 1, options, timeout_s=300)
    found = run_on_ranks(run_with_options, 2, tmp_path, "two", 2, options, timeout_s=300)[0]
    assert_equal_runs(found, expected)
    assert_equal_checkpoints(tmp_path / "two" / "checkpoint-6", tmp_path / "one" / "checkpoint-6")
    saved, best = (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / name).state_dict()
        for name in ("final", "checkpoint-3")
    )
    assert all(torch.equal(value, best[name]) for name, value in saved.items())


def misuse(rank, world_size, folder):
    as_torchrun_does(rank, world_size)
    mesh = fm.init_mesh(tensor_parallel_size=2)
    with pytest.raises(InputError, match=r"LlamaForCausalLM is not in shards \(fm.parallelize\(model, mesh\) before"):
        trainer_of(llama(), folder, world_size)
    model = fm.parallelize(llama(), mesh)
    without = trainer_of(model, folder, 1)
    with pytest.raises(InputError, match=r"DistributedDataParallel .*fm.TrainerCallback"):
        without.train()
    fm.TrainerCallback(without)
    assert without.accelerator.parallelism_config.tp_size == 2 and type(without).__name__ == "Trainer"
    adafactor = trainer_of(copy.deepcopy(model), folder, world_size, optim="adafactor")
    with pytest.raises(InputError, match=r"Adafactor: exp_avg_sq_row has the shape .* computed from a shard"):
        adafactor.train()
    with pytest.raises(InputError, match=r"fm.TrainerCallback\(\) got no Trainer"):
        fm.TrainerCallback().on_init_end(None, None, None)


def test_mistakes_end_in_one_line(tmp_path):
    run_on_ranks(misuse, 2, tmp_path, timeout_s=240)
