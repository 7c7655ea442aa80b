"""The file of Kubernetes: the config as a ConfigMap, and a TrainJob (Kubeflow Trainer 2.2 or newer) that trains it."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fused_megatron.checks import InputError, check
from fused_megatron.planning.job_files.cluster_job import STOPPED_CODE, ClusterJob
from fused_megatron.planning.job_files.yaml_text import yaml_document

CONFIG_FOLDER = "/etc/fused-megatron"
"""Folder of the config in the container."""
GROUP = "trainer.kubeflow.org"
_MOST_CONFIG_BYTES = 1_000_000
"""A ConfigMap has 1 MiB at most."""
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_NODE = "node"
"""Name of the job and of the container of a runtime for torch."""


@dataclass(frozen=True)
class KubernetesOptions:
    """Options of the file.

    Attributes:
        image: container image with fused-megatron (the Dockerfile of the source builds one).
        claim: PersistentVolumeClaim that all pods can write (ReadWriteMany), with the data and the run.
        mount: folder at which the claim is mounted; it must be the working folder of the image.
        runtime: ClusterTrainingRuntime for torch.
        name: of the job; "": the name of the config.
    """

    image: str = "fused-megatron"
    claim: str = "shared"
    mount: str = "/shared"
    runtime: str = "torch-distributed"
    name: str = ""

    def __post_init__(self) -> None:
        check(
            bool(self.image) and self.image.isprintable() and len(self.image) <= 500 and " " not in self.image,
            f"image={self.image!r:.60} must be the name of a container image",
        )
        for key in ("claim", "runtime", "name"):
            text = getattr(self, key)
            check(
                _LABEL.fullmatch(text) is not None or (key == "name" and not text),
                f"{key}={text!r:.80} must be a name of Kubernetes: at most 63 of a-z, 0-9 and -, a letter first",
            )
        check(
            self.mount.startswith("/") and self.mount.isprintable() and PurePosixPath(self.mount) != PurePosixPath("/"),
            f"mount={self.mount!r:.60} must be the absolute path of a folder, such as /shared",
        )


def kubernetes_file(job: ClusterJob, options: KubernetesOptions, command: str) -> str:
    """Return the text of the file, two YAML documents.

    Args:
        job: the run and its nodes.
        options: of the file.
        command: the command that printed the file, for its head.

    Raises:
        InputError: the config is too large for a ConfigMap, or no text.
    """
    name = options.name or _label(job.config_path.stem)
    head = [
        command,
        *job.description(),
        f"{options.mount}: the claim {options.claim!r}; relative paths of the config and the run folder are there.",
        "A pod that is evicted, or has lost another, saves or ends; all pods start again from the newest checkpoint.",
    ]
    comments = "".join(f"# {line}\n" for line in head)
    documents = [_config_map(job, name), train_job(job, options, name)]
    return comments + "---\n".join(yaml_document(document) for document in documents)


def _label(text: str) -> str:
    """Return a name of Kubernetes that is like the text."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].strip("-")
    return label if _LABEL.fullmatch(label) else f"run-{label}".strip("-")


def _config_map(job: ClusterJob, name: str) -> dict[str, Any]:
    content = job.config_path.read_bytes()
    check(
        len(content) <= _MOST_CONFIG_BYTES,
        f"config={job.config_path} has {len(content):,} bytes: a ConfigMap has 1 MiB at most",
    )
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise InputError(f"config={job.config_path} must be text in UTF-8") from None
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {job.config_path.name: text},
    }


def train_job(job: ClusterJob, options: KubernetesOptions, name: str) -> dict[str, Any]:
    """Return the TrainJob as plain values.

    Args:
        job: the run and its nodes.
        options: of the file.
        name: of the TrainJob and of its ConfigMap.
    """
    ranks = job.cluster.gpus_per_node
    kind = "nvidia.com/gpu" if job.cluster.device == "cuda" else "cpu"
    mounted = [("run", options.mount), ("config", CONFIG_FOLDER), ("memory", "/dev/shm")]
    volumes = [
        {"name": "run", "persistentVolumeClaim": {"claimName": options.claim}},
        {"name": "config", "configMap": {"name": name}},
        # A container has 64 MB of shared memory by default, too little for NCCL and for our transport.
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    words = ["train", f"{CONFIG_FOLDER}/{job.config_path.name}", *job.words]
    pods = {
        "volumes": volumes,
        "containers": [{"name": _NODE, "volumeMounts": [{"name": n, "mountPath": path} for n, path in mounted]}],
    }
    patch: dict[str, Any] = {"template": {"spec": {"template": {"spec": pods}}}}
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": options.runtime},
            "trainer": {
                "image": options.image,
                "numNodes": job.num_nodes,
                "numProcPerNode": ranks,
                # The runtime sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR ..., which torchrun reads.
                "command": ["torchrun", "-m", "fused_megatron"],
                "args": words,
                # Else pods that have saved would count as done, and the others would wait for them forever.
                "env": [{"name": "FUSED_MEGATRON_STOPPED_CODE", "value": str(STOPPED_CODE)}],
                "resourcesPerNode": {"limits": {kind: ranks}, "requests": {kind: ranks}},
            },
            "runtimePatches": [
                {
                    "manager": "fused-megatron",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [{"name": _NODE, **patch}]}}},
                }
            ],
        },
    }
