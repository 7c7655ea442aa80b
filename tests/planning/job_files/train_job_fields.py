"""Fields of a TrainJob of Kubeflow Trainer 2.2 and 2.3 (trainer.kubeflow.org/v1alpha1) that a job of ours may use.

A field that is not listed is refused, as `kubectl apply --validate=strict` does. Fields of Kubernetes itself (volumes,
env) are listed as far as the files have them.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Text253 = Annotated[str, Meta(min_length=1, max_length=253)]
Label = Annotated[str, Meta(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Int32 = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
Words = Annotated[list[Annotated[str, Meta(max_length=65536)]], Meta(max_length=128)]
Text = Annotated[str, Meta(max_length=500)]
Quantity = int | str


class Strict(Struct, forbid_unknown_fields=True, rename="camel"):
    """A mapping with these keys only, in camelCase."""


class EnvVar(Strict):
    name: str
    value: str = ""


class Resources(Strict):
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Trainer(Strict):
    image: Text | None = None
    command: Words = []
    args: Words = []
    env: Annotated[list[EnvVar], Meta(max_length=128)] = []
    num_nodes: Int32 | None = None
    num_proc_per_node: Int32 | None = None
    resources_per_node: Resources | None = None


class RuntimeRef(Strict):
    name: Text253
    api_group: Text253 = "trainer.kubeflow.org"
    kind: Text253 = "ClusterTrainingRuntime"


class Claim(Strict):
    claim_name: str


class NamedConfig(Strict):
    name: str


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""


class Volume(Strict):
    name: Label
    persistent_volume_claim: Claim | None = None
    config_map: NamedConfig | None = None
    empty_dir: EmptyDir | None = None


class VolumeMount(Strict):
    name: Label
    mount_path: str


class ContainerPatch(Strict):
    """Env of the container `node` may be given by Trainer only."""

    name: Text253
    volume_mounts: Annotated[list[VolumeMount], Meta(max_length=128)] = []


class PodSpecPatch(Strict):
    volumes: Annotated[list[Volume], Meta(max_length=128)] = []
    containers: Annotated[list[ContainerPatch], Meta(max_length=64)] = []


class PodTemplatePatch(Strict):
    spec: PodSpecPatch


class JobSpecPatch(Strict):
    template: PodTemplatePatch


class JobTemplatePatch(Strict):
    spec: JobSpecPatch


class ReplicatedJobPatch(Strict):
    name: Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=253)]
    template: JobTemplatePatch


class JobSetSpecPatch(Strict):
    replicated_jobs: Annotated[list[ReplicatedJobPatch], Meta(max_length=100)]


class JobSetTemplatePatch(Strict):
    spec: JobSetSpecPatch


class TrainingRuntimeSpecPatch(Strict):
    template: JobSetTemplatePatch


class RuntimePatch(Strict):
    manager: Text253
    training_runtime_spec: TrainingRuntimeSpecPatch


class Spec(Strict):
    runtime_ref: RuntimeRef
    trainer: Trainer
    runtime_patches: Annotated[list[RuntimePatch], Meta(max_length=16)] = []
    suspend: bool = False


class Metadata(Strict):
    name: Label


class TrainJob(Strict):
    api_version: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: Spec
