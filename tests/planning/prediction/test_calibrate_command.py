"""Start here when `fused-megatron calibrate` fails, or writes a file that cannot be read."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.planning.prediction.calibrate import Plan, machine_name
from fused_megatron.planning.prediction.calibrate_command import CalibrateArguments, run_calibrate
from fused_megatron.planning.prediction.calibration_steps import Shape
from fused_megatron.planning.prediction.cluster import CONSTANTS, load_cluster
from fused_megatron.planning.prediction.machine_measurements import Sizes

TINY = Sizes(((8, 8, 8), (16, 8, 8)), (1 << 10, 1 << 12), (64, 1 << 12), enough_s=0.01, repeats=2)
TINY_SHAPE = Shape(2, 16, 2, 32, 8, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tiny_calibration_writes_a_cluster(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = {"one": TINY_SHAPE.config("float32", data_parallel_size=ranks)}
    if ranks == 2:
        configs |= {
            "shared layers": TINY_SHAPE.config("float32", tensor_parallel_size=2),
            "a pipeline": TINY_SHAPE.config("float32", pipeline_parallel_size=2),
        }
    output = tmp_path / "here.toml"
    assert run_calibrate(CalibrateArguments(ranks, output, "cpu"), Plan("cpu", TINY, configs, rounds=2)) == 0
    cluster = load_cluster(output)
    assert cluster.device == "cpu" and cluster.gpus_per_node >= 1 and cluster.transfer_overlap == 0.0
    assert all(math.isfinite(getattr(cluster, name)) for name in CONSTANTS)
    assert cluster.fitted is not None and cluster.fitted.error_percent >= 10
    assert cluster.fitted.ranges["gpus"] == (1, ranks) and cluster.fitted.ranges["hidden_size"] == (16, 16)
    printed = capsys.readouterr().out
    assert f"{ranks} rank(s) of " in printed and "products, GFLOP/s: 8x8x8 " in printed
    assert ("all_reduce, us: 64 B " in printed) == ("message, us: 64 B " in printed) == (ranks == 2)
    table = [line.split()[0] for line in printed.splitlines() if "%" in line and not line.startswith("warning")]
    assert table.count("products") == 1 and len(table) == (3 + len(configs) if ranks == 1 else 5 + len(configs))


def test_bad_arguments(tmp_path: Path) -> None:
    good = CalibrateArguments(2, tmp_path / "c.toml", "cpu")
    for changes, message in (
        ({"ranks": 0}, "ranks=0 must be 1 or more"),
        ({"output": tmp_path / "absent" / "c.toml"}, "must be in a folder that exists"),
        ({"output": tmp_path}, "must be the name of a file, and is a folder"),
        *(() if torch.cuda.is_available() else [({"device": "cuda"}, "needs a GPU")]),
    ):
        with pytest.raises(InputError, match=message):
            run_calibrate(dataclasses.replace(good, **changes))


def test_names_of_machines() -> None:
    assert machine_name("AMD EPYC(TM) 7763", "cpu", 2) == "amd-epyc-tm-7763-2-cores"
    assert machine_name("", "cuda", 8) == "cuda-8-gpus"
