"""Start here when Kubernetes refuses a printed file, or pods that saved do not start again."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from fused_megatron.checkpoint.run_folder import RunFolder
from fused_megatron.checks import InputError
from fused_megatron.cli import main
from fused_megatron.data.indexed_dataset import IndexedDatasetWriter
from fused_megatron.planning.job_files.kubernetes import CONFIG_FOLDER, KubernetesOptions
from fused_megatron.planning.job_files.yaml_text import yaml_document
from fused_megatron.planning.prediction.cluster import Cluster, cluster_text

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[3]
CONFIG = """# of a laptop
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
seq_len = 16
vocab_size = 300

[training]
num_steps = 200
global_batch_size = 4
microbatch_size = 2
eval_interval = 200
eval_batches = 1
log_interval = 1
checkpoint_interval = 1000
"""
CPUS = Cluster("cores", "cpu", 1, 8.0, 0.1, 0.5, 1.0, 0.5, 10.0, 1.0, 5.0, 10.0, 1.0, 30.0)


def schema() -> ModuleType:
    """Return the module train_job_fields beside this file."""
    spec = importlib.util.spec_from_file_location("train_job_fields", Path(__file__).parent / "train_job_fields.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_job_fields"] = module  # msgspec resolves the types of fields there
    spec.loader.exec_module(module)
    return module


def documents(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "My_Run.toml"
    path.write_text(CONFIG)
    assert main(["launch", "kubernetes", str(path), *words]) == 0
    config_map, train_job = yaml.safe_load_all(capsys.readouterr().out)
    return config_map, train_job


def test_the_file_has_the_fields_of_a_train_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--image", "registry/team/image:1", "--claim", "data", "--mount", "/data", "--runtime", "torch"]
    config_map, found = documents(tmp_path, capsys, "--nodes", "2", *own, "--training.seed", "7")
    fields = schema()
    job = msgspec.convert(found, fields.TrainJob)  # strict: no other field, and every text is a text
    assert config_map["data"] == {"My_Run.toml": CONFIG} and config_map["metadata"] == {"name": "my-run"}
    trainer, pods = job.spec.trainer, job.spec.runtime_patches[0].training_runtime_spec.template.spec
    assert (trainer.num_nodes, trainer.num_proc_per_node, trainer.image) == (2, 8, "registry/team/image:1")
    assert trainer.args[:4] == ["train", f"{CONFIG_FOLDER}/My_Run.toml", "--training.seed", "7"]
    assert trainer.args[4].startswith("--parallel.") and trainer.resources_per_node.limits == {"nvidia.com/gpu": 8}
    (node,) = pods.replicated_jobs
    volumes = node.template.spec.template.spec.volumes
    (container,) = node.template.spec.template.spec.containers
    assert (node.name, container.name, job.spec.runtime_ref.name) == ("node", "node", "torch")
    assert [volume.name for volume in volumes] == [mount.name for mount in container.volume_mounts]
    assert volumes[0].persistent_volume_claim.claim_name == "data" and volumes[1].config_map.name == "my-run"
    assert [mount.mount_path for mount in container.volume_mounts] == ["/data", CONFIG_FOLDER, "/dev/shm"]
    # The fields refuse what the API refuses.
    for change in ({"numProcPerNode": "8"}, {"numNode": 1}, {"args": "train"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(found | {"spec": found["spec"] | {"trainer": change}}, fields.TrainJob)


@pytest.mark.parametrize(
    ("name", "label"),
    [("175B.toml", "run-175b"), ("a.b.toml", "a-b"), ("--.toml", "run"), ("x" * 99 + ".toml", "x" * 50)],
)
def test_names_of_files_become_names_of_kubernetes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, label: str
) -> None:
    (tmp_path / name).write_text(CONFIG)
    assert main(["launch", "kubernetes", str(tmp_path / name), "--nodes", "1", "--gpus-per-node", "1"]) == 0
    text = capsys.readouterr().out
    assert [each["metadata"]["name"] for each in yaml.safe_load_all(text)] == [label, label]


def test_bad_options() -> None:
    for options in ({"name": "Name"}, {"runtime": ""}, {"image": "two words"}, {"mount": "/"}, {"mount": "a/b"}):
        with pytest.raises(InputError, match=next(iter(options))):
            KubernetesOptions(**options)


def test_yaml_of_awkward_texts() -> None:
    value = {
        "texts": ["yes", "1", "#", "a: b", "", "\u00e9", "- x", '"', "null"],
        "lists": [[1, [2]], [{"a": [], "b": {}}], {}, []],
        "block": "[model]\n\n  x = 1\n",
        "no end": "a\nb",
        "nested": {"list": [{"name": "x", "text": "one\ntwo\n"}], "flag": True},
    }
    assert yaml.safe_load(yaml_document(value)) == value


class Pods:
    """Two pods of the printed TrainJob, as torchrun sees them: two processes with the variables of the runtime."""

    def __init__(self, folder: Path, trainer: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.trainer = folder, trainer
        self.run = RunFolder(folder / "runs" / "My_Run")

    def start(self) -> list[subprocess.Popen[bytes]]:
        words = [word.replace(CONFIG_FOLDER, str(self.folder)) for word in self.trainer["args"]]
        assert self.trainer["command"] == ["torchrun", "-m", "fused_megatron"]
        env = {item["name"]: item["value"] for item in self.trainer["env"]}
        env |= {"PET_NNODES": str(self.trainer["numNodes"]), "PET_NPROC_PER_NODE": str(self.trainer["numProcPerNode"])}
        env |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(self.port)}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "-m", "fused_megatron", *words]
        with open(self.folder / "log", "ab") as log:
            return [
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env={**os.environ, **env, "PET_NODE_RANK": str(node)},
                    stdout=log,
                    stderr=log,
                )
                for node in range(2)
            ]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def steps(self) -> int:
        if not self.run.metrics.exists():
            return 0
        return max((record["step"] for record in self.run.read_metrics() if "loss" in record), default=0)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)


@pytest.mark.slow
def test_pods_that_are_asked_to_end_save_fail_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "set", np.dtype(np.int32), vocab_size=300) as writer:
        rng = np.random.default_rng(0)
        for length in rng.integers(5, 80, size=200):
            writer.add_document(rng.integers(0, 300, size=length))
    (tmp_path / "cores.toml").write_text(cluster_text(CPUS))
    words = ["--nodes", "2", "--cluster", str(tmp_path / "cores.toml"), "--data.path", "set"]
    pods = Pods(tmp_path, documents(tmp_path, capsys, *words)[1]["spec"]["trainer"])
    started = pods.start()
    pods.wait_until(lambda: pods.steps() > 10 or any(pod.poll() is not None for pod in started))
    started[1].send_signal(signal.SIGTERM)  # one pod is evicted
    codes = [pod.wait(300) for pod in started]
    reached = pods.steps()
    assert 0 not in codes and 10 < reached < 200, pods.log  # a pod with code 0 would never start again
    assert f"stopped by SIGTERM after step {reached}" in pods.log
    assert [pod.wait(300) for pod in pods.start()] == [0, 0], pods.log
    assert pods.steps() == 200 and f"(step {reached})" in pods.log
