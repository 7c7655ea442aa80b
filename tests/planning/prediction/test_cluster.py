"""Start here when a cluster file is read wrongly, or a mistake in one is reported badly."""

import dataclasses

import pytest

from fused_megatron.checks import InputError
from fused_megatron.planning.prediction.cluster import (
    CONSTANTS,
    SHIPPED,
    Cluster,
    Fitted,
    MeasuredBlock,
    cluster_text,
    load_cluster,
)

CLUSTER = Cluster("one", "cuda", 8, 80.0, 300.0, 0.8, 5.0, 0.4, 1500.0, 10.0, 200.0, 10.0, 20.0, 20.0, 1.0, 0.5)

TABLE = (
    "{hidden_size = 8, num_heads = 2, seq_len = 8, tensor_parallel_size = 1, microbatch_tokens = 8, factor = %s, "
    'rows = ["12ab"]}'
)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_clusters_load_and_have_at_most_15_constants(path):
    assert load_cluster(path.stem).name == path.stem
    assert len(CONSTANTS) + 1 <= 15  # and gpus_per_node


@pytest.mark.parametrize(
    ("prefix", "name"), [("a100", "a100-80gb"), ("H100", "h100-80gb"), ("h2", "h200"), ("b", "b200")]
)
def test_unique_prefix_is_enough(prefix, name):
    assert load_cluster(prefix).name == name


BLOCK = MeasuredBlock(1024, 16, 2048, 2, 4096, 1.25, ("12ab", "34cd"))


@pytest.mark.parametrize("fitted", [None, Fitted(7.5, ("megatron-core",), ("12ab",), {"gpus": (1.0, 8.0)})])
@pytest.mark.parametrize("blocks", [(), (BLOCK, dataclasses.replace(BLOCK, tensor_parallel_size=4))])
def test_text_reads_back_as_the_same_cluster(tmp_path, fitted, blocks):
    cluster = dataclasses.replace(CLUSTER, fitted=fitted, blocks=blocks)
    (tmp_path / "one.toml").write_text(cluster_text(cluster))
    assert load_cluster(tmp_path / "one.toml") == cluster


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "device, gpus_per_node"),
        ("memory_gb = 0", "memory_gb=0"),
        ("peak_tflops = nan", "peak_tflops=nan must be above 0, and at most"),
        ("memory_gb = 1e300", "memory_gb=1e+300 must be above 0, and at most"),
        ("product_efficiency = 1.2", "product_efficiency=1.2 must be at most 1"),
        ("gpus_per_node = 0", "gpus_per_node=0 must be 1 or more"),
        ('device = "tpu"', "device='tpu' must be one of"),
        ("launch_us = -1", "launch_us=-1"),
        ('memory_gb = "80"', "memory_gb"),
        ("speed = 3", "unknown key speed"),
        ("= 3", "no TOML"),
        ("blocks = 3", "blocks"),
        ("blocks = [{hidden_size = 8}]", "blocks"),
        (f"blocks = [{TABLE % 20.0}]", "factor=20.0 of a block must be 0.1 to 10"),
        (f"blocks = [{TABLE % float('nan')}]", "factor=nan of a block must be 0.1 to 10"),
        (f"blocks = [{TABLE % 1.5}, {TABLE % 2.5}]", "blocks must differ in their sizes"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, change, message):
    path = tmp_path / "bad.toml"
    key = change.partition(" ")[0]
    lines = [line for line in cluster_text(CLUSTER).splitlines() if line.partition(" ")[0] != key] if change else []
    path.write_text("\n".join([*lines, change]) if change else 'name = "one"')
    with pytest.raises(InputError) as error:
        load_cluster(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "x100", "h", "h100-40gb", "none.toml"])
def test_unknown_names_list_the_shipped_ones(name):
    with pytest.raises(InputError, match=r"a100-80gb, b200, h100-80gb, h200"):
        load_cluster(name)
