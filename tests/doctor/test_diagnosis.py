"""Start here when the doctor reports a finding without its cause, or misses one."""

import dataclasses
from typing import Any

import pytest

from fused_megatron.doctor.diagnosis import diagnose
from fused_megatron.doctor.facts import (  # fmt: skip
    AttentionKernel,
    Buses,
    Facts,
    Gpu,
    GpuTrials,
    Installation,
    Library,
    Machine,
    Network,
    OpKernels,
    OpTrial,
    Package,
    Tools,
    Torch,
    TwoRanks,
    numbers,
)
from fused_megatron.doctor.finding import BROKEN, NOTE, SLOW
from fused_megatron.doctor.output_formats import as_json, plain, verdict

H100 = Gpu("NVIDIA H100", "9.0", 80.0)
CODES = ("sm_80", "sm_90a", "sm_100a", "ptx_100")


def healthy() -> Facts:
    """A machine with two GPUs and no findings."""
    packages = (
        Package("torch", "2.13", "2.13.0+cu130"), Package("numpy", "1.26", "2.1"),
        Package("tokenizers", "0.20", "0.22", "text"),
    )  # fmt: skip
    ops = (OpKernels("layer_norm", "kernel", "CUDA"), OpKernels("cross_entropy", "kernel", "Triton"))
    return Facts(
        Installation("0.1.0", "3.12.1", "Linux x86_64", "/src", packages),
        Torch(None, "CUDA 13.0", {"gloo": True, "nccl": True}, 2, 16),
        Library("/src/_torch_ops.so", True, True, "", CODES, None, ops, toolkit="13.0"),
        Tools("g++ 12", "/usr/bin/gcc", "/usr/local/bin/nvcc", "13.0"),
        Machine(
            "Xeon",
            ("AVX-512",),
            16,
            16.0,
            128.0,
            100.0,
            64.0,
            (H100, H100),
            "580.1",
            {"NV18": 1},
            "13.0",
            Buses(2, {"00000000:1B:00.0": 0, "00000000:BC:00.0": 0}, ("mlx5_0/1: ACTIVE, 400 Gb/sec",), True),
        ),
        Network("node1", {"lo": "127.0.0.1", "eth0": "10.0.0.7"}, ("10.0.0.7",), ("10.0.0.7",), 0.01, 0.01, None, 20.0),
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        (),
        GpuTrials(
            (OpTrial("layer_norm", 1e-3), OpTrial("cross_entropy", 2e-3)),
            (AttentionKernel("bfloat16", "FLASH_ATTENTION", "torch's first choice"),),
            "9.20.0",
            TwoRanks(320.0, None, True),
        ),
    )


def changed(**parts: Any) -> Facts:
    """Return the healthy machine with some facts replaced: part={field: value}."""
    facts = healthy()
    for name, fields in parts.items():
        old = getattr(facts, name)
        new = {**old, **fields} if isinstance(old, dict) else dataclasses.replace(old, **fields)
        facts = dataclasses.replace(facts, **{name: new})
    return facts


def packages(**installed: str | None) -> dict[str, Any]:
    have = healthy().installation.packages
    return {"packages": tuple(dataclasses.replace(p, installed=installed.get(p.name, p.installed)) for p in have)}


CPU_TORCH = {"build": "CPU", "sees_gpus": 0, "backends": {"gloo": True, "nccl": False}}
NO_GPU = {"gpus": (), "driver": None, "links": {}, "driver_cuda": None, "buses": Buses()}
NOT_TRIED = {"ops": (), "attention": (), "cudnn": None, "two_ranks": None}
CASES = {
    "torch absent": (
        {"installation": packages(torch=None), "torch": {"error": "ModuleNotFoundError: No module named 'torch'"}},
        BROKEN, "torch is missing", 'pip install --upgrade "torch>=2.13"',
    ),
    "torch broken": (
        {"torch": {"error": "ImportError: libcudart.so.13"}},
        BROKEN, "does not import: ImportError: libcudart.so.13", 'pip install --force-reinstall "torch>=2.13"',
    ),
    "torch old": (
        {"installation": packages(torch="2.9.1")},
        BROKEN, "torch 2.9.1 is too old", 'pip install --upgrade "torch>=2.13"',
    ),
    "extra missing": (
        {"installation": packages(tokenizers=None)}, NOTE, "optional part 'text'", 'pip install "tokenizers>=0.20"',
    ),
    "library absent": (
        {"library": {"exists": False, "loads": False, "reason": "is not built"}},
        SLOW, "no compiled kernels: all ops", "cd /src && pip install --no-build-isolation -e .",
    ),
    "library and compiler absent": (
        {"library": {"exists": False, "loads": False}, "tools": {"cxx": None}, "installation": {"checkout": None}},
        SLOW, "apt-get install g++", "pip install --force-reinstall --no-deps .",
    ),
    "library damaged": (
        {"library": {"loads": False, "reason": "does not load (file too short)"}},
        BROKEN, "the compiled library does not load (file too short)", "pip install --no-build-isolation -e .",
    ),
    "library older than its sources": (
        {"library": {"changed_since": "csrc/launch.h"}}, NOTE, "csrc/launch.h has changed", "cd /src && pip install",
    ),
    "library of another release": (
        {"library": {"ops": (OpKernels("new_op", "reference", "reference"),)}},
        SLOW, "no CPU kernel for new_op", "pip install",
    ),
    "library switched off": (
        {"environment": {"FUSED_MEGATRON_LIBRARY": ""}, "library": {"loads": False}},
        SLOW, "FUSED_MEGATRON_LIBRARY=: all ops", "unset FUSED_MEGATRON_LIBRARY",
    ),
    "library chosen and gone": (
        {"environment": {"FUSED_MEGATRON_LIBRARY": "/x.so"}, "library": {"loads": False}},
        BROKEN, "FUSED_MEGATRON_LIBRARY=/x.so: all ops", "unset FUSED_MEGATRON_LIBRARY",
    ),
    "CPU torch beside GPUs": ({"torch": CPU_TORCH}, SLOW, "2 x NVIDIA H100, but torch is a CPU build", "pip install"),
    "GPUs hidden": (
        {"torch": {"sees_gpus": 0}, "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        SLOW, "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES",
    ),
    "driver too old": ({"torch": {"sees_gpus": 0}}, BROKEN, "driver 580.1 is too old", "nvidia-smi"),
    "some GPUs hidden": (
        {"torch": {"sees_gpus": 1}, "environment": {"CUDA_VISIBLE_DEVICES": "1"}}, NOTE, "torch sees 1 of 2 x", "",
    ),
    "no NCCL": ({"torch": {"backends": {"gloo": True, "nccl": False}}}, SLOW, "has no NCCL", "pip install"),
    "small /dev/shm": ({"machine": {"shared_memory_gb": 0.067}}, SLOW, "/dev/shm has 67 MB", "--shm-size"),
    "no CUDA kernels": ({"library": {"device_code": ()}}, SLOW, "no CUDA kernels", "FUSED_MEGATRON_CUDA=on pip"),
    "GPU without code": (
        {"machine": {"gpus": (Gpu("Tesla T4", "7.5", 16.0),)}, "torch": {"sees_gpus": 1}},
        BROKEN, "Tesla T4 (compute capability 7.5) runs none of the library's code", "export FUSED_MEGATRON_LIBRARY=",
    ),
    "GPU on PTX": (
        {"machine": {"gpus": (Gpu("B300", "10.3", 288.0),)}, "torch": {"sees_gpus": 1}},
        NOTE, "runs the library's PTX", "",
    ),
    "nvcc old": (
        {"library": {"device_code": ()}, "tools": {"nvcc_release": "12.4"}}, NOTE, "nvcc 12.4", "export PATH=",
    ),
    "no Triton": (
        {"library": {"ops": (OpKernels("cross_entropy", "kernel", "reference"),)}},
        SLOW, "Triton is not installed: losses", 'pip install "triton>=3.6"',
    ),
    "no C compiler": ({"tools": {"cc": None}}, BROKEN, "cross_entropy fail on a GPU", "apt-get install gcc"),
    "name server silent about 127.0.0.1": (
        {"network": {"localhost_lookup_s": None}}, SLOW, "the name of 127.0.0.1 takes longer", "/etc/hosts",
    ),
    "name server silent about the host": (
        {"network": {"host_lookup_s": None, "host_addresses": (), "local_addresses": (), "loopback_ms": None}},
        SLOW, "'node1' takes longer than the doctor waits", "export GLOO_SOCKET_IFNAME=eth0",
    ),
    "name server slow": ({"network": {"host_lookup_s": 5.01}}, SLOW, "takes 5.0 s", "export GLOO_SOCKET_IFNAME=eth0"),
    "host without address": (
        {"network": {"host_addresses": (), "local_addresses": ()}},
        NOTE, "resolves to no address of this machine", "export GLOO_SOCKET_IFNAME=eth0",
    ),
    "host is 127.0.1.1": (
        {"network": {"host_addresses": ("127.0.1.1",), "local_addresses": ("127.0.1.1",)}},
        NOTE, "resolves to 127.0.1.1", "export GLOO_SOCKET_IFNAME=eth0",
    ),
    "gloo on an interface that is not there": (
        {"environment": {"GLOO_SOCKET_IFNAME": "ib0"}}, BROKEN, "has lo, eth0", "unset GLOO_SOCKET_IFNAME",
    ),
    "NCCL on an interface that is not there": (
        {"environment": {"NCCL_SOCKET_IFNAME": "ib"}}, BROKEN, "has lo, eth0", "unset NCCL_SOCKET_IFNAME",
    ),
    "no gloo": ({"torch": {"backends": {"gloo": False, "nccl": True}}}, BROKEN, "no gloo", "pip install"),
    "gloo fails": (
        {"network": {"loopback_error": "Connection refused", "loopback_ms": None}},
        BROKEN, "could not add up: Connection refused", "export GLOO_SOCKET_IFNAME=lo",
    ),
    "container with few cores": (
        {"machine": {"usable_cores": 4.0}},
        SLOW, "takes 16 threads, this process may use 4", "export OMP_NUM_THREADS=4",
    ),
    "too many threads asked": (
        {"environment": {"OMP_NUM_THREADS": "64"}, "torch": {"threads": 64}},
        SLOW, "OMP_NUM_THREADS=64 threads share 16 cores", "export OMP_NUM_THREADS=16",
    ),
    "one thread a rank": (
        {"torch": {**CPU_TORCH}, "machine": NO_GPU},
        NOTE, "torchrun then gives each rank one thread", "export OMP_NUM_THREADS=8",
    ),
    "launches blocked": (
        {"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, SLOW, "CUDA_LAUNCH_BLOCKING=1", "unset CUDA_LAUNCH_BLOCKING",
    ),
    "collectives checked": (
        {"environment": {"TORCH_DISTRIBUTED_DEBUG": "detail"}}, SLOW, "TORCH_DISTRIBUTED_DEBUG=DETAIL", "unset TORCH",
    ),
    "one connection": (
        {"environment": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}, NOTE, "is not needed", "unset CUDA_DEVICE_MAX",
    ),
    "a kernel is wrong": (
        {"gpu_trials": {"ops": (OpTrial("layer_norm", 0.7, "its results in float32 are off by 7e-01"),)}},
        BROKEN, "layer_norm (CUDA) on GPU 0: its results in float32 are off", "export FUSED_MEGATRON_LIBRARY=",
    ),
    "a Triton kernel raises": (
        {"gpu_trials": {"ops": (OpTrial("cross_entropy", None, "no kernel image"),)}},
        BROKEN, "cross_entropy (Triton) on GPU 0: no kernel image", "",
    ),
    "attention stores its scores": (
        {"gpu_trials": {"attention": (AttentionKernel("float32", "MATH", "not FLASH_ATTENTION: float32"),)}},
        SLOW, "attention of float32 stores all scores: MATH (not FLASH_ATTENTION: float32)", "",
    ),
    "NCCL fails": (
        {"gpu_trials": {"two_ranks": TwoRanks(problem="unhandled system error")}},
        BROKEN, "two NCCL ranks on this machine could not add up: unhandled system error", "NCCL_DEBUG=INFO",
    ),
    "NCCL does not take NVLink": (
        {"gpu_trials": {"two_ranks": TwoRanks(22.0, None, True)}}, SLOW, "two NCCL ranks reach 22 GB/s", "NCCL_DEBUG",
    ),
    "no symmetric memory": (
        {"gpu_trials": {"two_ranks": TwoRanks(320.0, None, False)}}, NOTE, "do not map each other's memory", "",
    ),
    "library newer than the driver": (
        {"machine": {"driver_cuda": "12.8"}},
        BROKEN, "driver 580.1 is of CUDA 12.8, the library of CUDA 13.0", "export FUSED_MEGATRON_LIBRARY=",
    ),
    "GPUs at two memory nodes": (
        {"machine": {"buses": Buses(2, {"a": 0, "b": 1})}}, NOTE, "at 2 memory nodes", "--numa-binding node",
    ),
    "a network card is down": (
        {"machine": {"buses": Buses(1, {}, ("mlx5_1/1: DOWN, 10 Gb/sec",), True)}}, NOTE, "mlx5_1/1: DOWN", "",
    ),
    "no peer memory": (
        {"machine": {"buses": Buses(1, {}, ("mlx5_0/1: ACTIVE, 400 Gb/sec",), False)}},
        NOTE, "nvidia_peermem is not loaded", "sudo modprobe nvidia_peermem",
    ),
    "fixed segments": (
        {"environment": {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}},
        NOTE, "expandable segments", "export PYTORCH_ALLOC_CONF=expandable_segments:True",
    ),
    "left over from torchrun": (
        {"environment": {"WORLD_SIZE": "8", "RANK": "0"}}, NOTE, "RANK=0, WORLD_SIZE=8", "unset RANK WORLD_SIZE",
    ),
}  # fmt: skip


def test_a_healthy_machine_has_no_findings() -> None:
    assert diagnose(healthy()) == []
    assert verdict([]) == (0, "This machine can train.")


@pytest.mark.parametrize(("parts", "level", "text", "command"), CASES.values(), ids=CASES)
def test_finding(parts: dict[str, Any], level: str, text: str, command: str) -> None:
    facts = changed(**parts)
    found = diagnose(facts)
    (finding,) = [f for f in found if text in f.text]
    assert finding.level == level
    assert command in finding.command and bool(command) == bool(finding.command)
    assert found[0].level == BROKEN or all(f.level != BROKEN for f in found), "the worst is said first"
    code, line = verdict(found)
    assert code == (1 if any(f.level == BROKEN for f in found) else 0)
    assert ("broken" in line) == bool(code)
    shown = "\n".join(plain(facts, found))
    assert finding.text in shown and finding.command in shown and shown.isascii()
    assert f'"can_train": {"false" if code else "true"}' in as_json(facts, found)


@pytest.mark.parametrize("parts", [
    {"environment": {"GLOO_SOCKET_IFNAME": "eth0"}, "network": {"host_lookup_s": None, "local_addresses": ()}},
    {"environment": {"NCCL_SOCKET_IFNAME": "eth,ib"}},
    {"environment": {"NCCL_SOCKET_IFNAME": "^docker"}},
    {"environment": {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}},
    {"environment": {"OMP_NUM_THREADS": "1"}, "torch": {"threads": 1}},
    {"environment": {"CUDA_LAUNCH_BLOCKING": "0"}},
    {"environment": {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments: True"}},
    {"machine": {"driver_cuda": "13.1"}},
    {"machine": {"driver_cuda": None}},
    {"gpu_trials": {"two_ranks": None}, "machine": {"links": {}}},
    {"machine": {"gpus": (Gpu("A10", "8.6", 24.0), H100)}},
    {"tools": {"cc": None}, "torch": CPU_TORCH, "machine": NO_GPU, "environment": {"OMP_NUM_THREADS": "16"}},
], ids=str)  # fmt: skip
def test_harmless_facts_give_no_finding(parts: dict[str, Any]) -> None:
    assert diagnose(changed(**parts)) == []


def test_lines_of_the_trials() -> None:
    lines = "\n".join(plain(healthy(), []))
    for line in (
        "2 of 2 as in float64 on the CPU",
        "9.20.0",
        "added up 64 MiB at 320 GB/s",
        "symmetric memory  ",
        "580.1, CUDA 13.0; the library needs CUDA 13",
        "1B:00.0 at node 0",
        "mlx5_0/1: ACTIVE",
        "FLASH_ATTENTION",
    ):
        assert line in lines
    without = "\n".join(plain(changed(torch=CPU_TORCH, machine=NO_GPU, gpu_trials=NOT_TRIED), []))
    assert without.count("no GPU") == 8


def test_versions_compare_by_number() -> None:
    assert numbers("2.13.0+cu130") == numbers("2.13") == (2, 13)
    assert numbers("2.9.1") < numbers("2.13") < numbers("2.13.1") < numbers("3")
    assert numbers("2.14.0a0+git") == (2, 14)
    assert numbers("") == ()
