"""Start here when a printed job file has another layout than the config or the planner, or refuses one that fits."""

import dataclasses
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.command_line import layout_words
from fused_megatron.planning.job_files.cluster_job import ClusterJob, has_layout, plan_job
from fused_megatron.planning.job_files.command import run_launch
from fused_megatron.planning.search.best_layouts import find_best
from fused_megatron.planning.search.model_source import read_workload

MODEL = "[model]\nnum_layers = 24\nhidden_size = 2048\nnum_heads = 16\nseq_len = 2048\n"
TRAINING = '[training]\nglobal_batch_size = 512\nmicrobatch_size = 1\ndtype = "bfloat16"\n'


def config_file(folder: Path, parallel: str = "", model: str = MODEL) -> Path:
    path = folder / "my run.toml"
    path.write_text(f"{model}[parallel]\n{parallel}\n{TRAINING}")
    return path


def job_of(folder: Path, parallel: str = "", num_nodes: int = 8, **keys: object) -> ClusterJob:
    return plan_job(config_file(folder, parallel), (), num_nodes=num_nodes, **keys)  # type: ignore[arg-type]


def test_a_config_without_a_layout_gets_the_fastest_one_as_options_of_train(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    workload = read_workload(str(job.config_path), num_gpus=64)
    best = find_best(workload.config, 64, job.cluster, num_best=1).plans[0]
    # The words turn the user's file into the plan, and change nothing else.
    trained = load_config(job.config_path, job.words)
    assert trained.parallel == best.config.parallel == job.config.parallel
    assert trained.training == best.config.training
    assert trained.model == dataclasses.replace(best.config.model, vocab_size=None)
    assert trained.parallel.num_ranks == 64
    assert "of the planner" in job.origin and job.cluster.name == "h100-80gb" and job.whole_nodes


def test_words_also_take_settings_back(tmp_path: Path) -> None:
    path = config_file(tmp_path, "tensor_parallel_size = 8\npipeline_cut = [24]\nsequence_parallel = true")
    job = plan_job(path, ("--model.recompute", "full"), num_nodes=1, search=True)
    trained = load_config(path, job.words)
    assert trained.parallel == job.config.parallel and trained.parallel.pipeline_cut is None
    assert trained.model.recompute == job.config.model.recompute
    assert layout_words(trained, trained) == []


def test_a_layout_of_the_config_is_kept(tmp_path: Path) -> None:
    job = job_of(tmp_path, "tensor_parallel_size = 4\npipeline_parallel_size = 2")
    assert job.words == () and "of the config" in job.origin
    assert job.config.parallel.data_parallel_size == 8
    assert [line.split() for line in job.description()[3:7]] == [
        ["axis", "ranks", "distance", "where"],
        ["tp", "4", "1", "inside", "a", "node"],
        ["dp", "8", "4", "inside", "and", "between"],
        ["pp", "2", "32", "between", "nodes"],
    ]
    searched = job_of(tmp_path, "tensor_parallel_size = 4\npipeline_parallel_size = 2", search=True)
    assert "of the planner" in searched.origin
    assert not has_layout(load_config(config_file(tmp_path, "tensor_parallel_size = 1")).parallel)


def test_a_part_of_a_node_and_the_cluster_of_the_config(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    job = plan_job(path, ("--training.cluster", "a100"), num_nodes=1, gpus_per_node=2)
    assert (job.cluster.name, job.num_ranks, job.whole_nodes) == ("a100-80gb", 2, False)


LARGE = "[model]\nnum_layers = 96\nhidden_size = 12288\nnum_heads = 96\nseq_len = 2048\n"


@pytest.mark.parametrize(
    ("parallel", "model", "keys", "message"),
    [
        ("", MODEL, {"num_nodes": 0}, "nodes=0 must be 1 or more"),
        ("", MODEL, {"num_nodes": 10**6}, "nodes=1000000 must be 100,000 or fewer"),
        ("", MODEL, {"num_nodes": 1, "cluster_name": "h"}, "cluster='h' must be one of a100-80gb"),
        ("", MODEL, {"num_nodes": 1, "gpus_per_node": 9}, "gpus_per_node=9 must be at most 8, the GPUs of a node"),
        ("", LARGE, {"num_nodes": 1}, r"does not fit 1 node of 8 x h100-80gb: it needs 6 \(--nodes 6\)"),
        ("", MODEL, {"num_nodes": 13_000}, "has no layout on 13,000 nodes of 8 x h100-80gb: "),
        ("data_parallel_size = 4", MODEL, {"num_nodes": 2}, "has 4 ranks, but 2 nodes of 8 GPUs have 16"),
        ("tensor_parallel_size = 3", MODEL, {"num_nodes": 1}, "num_heads=16 must be divisible"),
        ("tensor_parallel_size = 16", MODEL, {"num_nodes": 1}, "does not fit 1 node of 8 GPUs: ranks=8 must be div"),
        ("pipeline_parallel_size = 2", LARGE, {"num_nodes": 1}, r"a rank needs .* GB, and h100-80gb has 80 GB"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, parallel: str, model: str, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        plan_job(config_file(tmp_path, parallel, model), (), **keys)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("slurm", "launch slurm needs a config file"),
        ("slurm CONFIG", "launch slurm needs --nodes"),
        ("kubernetes CONFIG --nodes two", "nodes='two' must be a whole number"),
        ("slurm CONFIG --nodes 1 --time soon", "time='soon' must be a time limit of Slurm"),
        ("slurm CONFIG --nodes 1 --time 5 --stop-before 300", "stop_before=300 must be 1 to 65,535 seconds, and less"),
        ("slurm CONFIG --nodes 1 --image x", "unknown option --image"),
        ("kubernetes CONFIG --nodes 1 --claim My_Claim", "claim='My_Claim' must be a name of Kubernetes"),
        ("kubernetes CONFIG --nodes 1 --mount shared", "mount='shared' must be the absolute path"),
        ("kubernetes CONFIG --nodes 1 --model.layers 3", "unknown option --model.layers"),
    ],
)
def test_bad_words_are_one_line(tmp_path: Path, words: str, message: str) -> None:
    config = str(config_file(tmp_path))
    with pytest.raises(InputError, match=message):
        run_launch([config if word == "CONFIG" else word for word in words.split()])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_launch(["slurm", "--help"]) == 0
    assert "--stop-before" in capsys.readouterr().out
