"""Constants of a cluster: speeds of its GPUs and links, read from a TOML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fused_megatron.checks import InputError, check, check_one_of, check_positive
from fused_megatron.config import TrainConfig
from fused_megatron.untrusted_files import convert, parse_toml, read_bounded

SHIPPED = Path(__file__).parent / "clusters"
"""Folder of the cluster files that come with the package."""
_MOST_BYTES = 1 << 16
_LEAST_FACTOR, _MOST_FACTOR = 0.1, 10.0
"""Bounds of the measured over the predicted time of a block."""
_LARGEST = 1e15
"""Bound of all constants, so that no sum of times or sizes overflows."""


@dataclass(frozen=True)
class Fitted:
    """The runs to which the constants of a cluster were fitted.

    Attributes:
        error_percent: 90 % of the predictions of other runs of these sources err by no more.
        engines: the programs that ran them.
        rows: digests of the fitted rows, as PublishedRun.digest; errors are of all other rows.
        ranges: smallest and largest value of gpus, hidden_size, seq_len, microbatch_tokens, tensor_parallel_size,
            pipeline_parallel_size, context_parallel_size, expert_parallel_size.
    """

    error_percent: float
    engines: tuple[str, ...]
    rows: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]


BlockShape = tuple[int, int, int, int, int]
"""Sizes of a block: hidden_size, num_heads, seq_len, tensor_parallel_size, tokens of a microbatch on a rank."""


@dataclass(frozen=True)
class MeasuredBlock:
    """How much longer than predicted the blocks of one shape take on a cluster.

    Attributes:
        hidden_size, num_heads, seq_len: of the model.
        tensor_parallel_size: ranks that share the block.
        microbatch_tokens: tokens of a microbatch on a rank.
        factor: measured over predicted time of the block.
        rows: digests of the measured steps behind it, as PublishedRun.digest.
    """

    hidden_size: int
    num_heads: int
    seq_len: int
    tensor_parallel_size: int
    microbatch_tokens: int
    factor: float
    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "seq_len", "tensor_parallel_size", "microbatch_tokens"):
            check_positive(name, getattr(self, name))
        bounds = f"{_LEAST_FACTOR} to {_MOST_FACTOR}"
        check(_LEAST_FACTOR <= self.factor <= _MOST_FACTOR, f"factor={self.factor} of a block must be {bounds}")

    @property
    def shape(self) -> BlockShape:
        """The sizes, as block_shape returns them."""
        return (
            self.hidden_size,
            self.num_heads,
            self.seq_len,
            self.tensor_parallel_size,
            self.microbatch_tokens,
        )


def block_shape(config: TrainConfig) -> BlockShape:
    """Return the sizes of a run by which a MeasuredBlock knows its blocks."""
    model, parallel, tokens = config.model, config.parallel, config.training.microbatch_size * config.most_positions
    return model.hidden_size, model.num_heads, model.seq_len, parallel.tensor_parallel_size, tokens


@dataclass(frozen=True)
class Cluster:
    """Constants of a cluster of equal GPUs, or of equal CPU ranks.

    Attributes:
        name: printed in reports.
        device: "cuda": the host launches kernels ahead of the device; "cpu": an op ends before the next one starts.
        gpus_per_node: GPUs that the fast links of a node connect. On a CPU: cores, which the ranks of a node share.
        memory_gb: memory of a GPU, in 10^9 bytes.
        peak_tflops: 10^12 operations per second of dense 16-bit matrix products (on a CPU, of float32 products).
        product_efficiency: share of the peak that large products reach.
        product_us: time of a product beyond its operations: filling and draining of the device.
        attention_efficiency: share of the peak that a fused attention kernel reaches.
        memory_gb_per_s: speed of memory that memory-bound kernels reach, reads and writes together.
        launch_us: time of the host for one op of a training step.
        node_gb_per_s: bus bandwidth of a collective inside a node, of one GPU. On a CPU whose ranks share memory: bytes
            that a rank reads and writes in a second of a collective.
        node_latency_us: time of a collective inside a node beyond its bytes, for each rank beside the first.
        network_gb_per_s: bus bandwidth of a collective between nodes, of one GPU.
        network_latency_us: time of a message between nodes beyond its bytes.
            On a CPU, collectives of one machine go through shared memory (node_*), messages of a pipeline through gloo
            (network_*).
        step_ms: time of a step that does not depend on the model: reading of a batch, logging, scheduling.
        transfer_overlap: share of a transfer that work beside it hides. Transfers on a GPU slow products down; on a CPU
            it is 0 where the thread that computes also copies, as for shared memory.
        fitted: the measured runs behind the constants; None: they come from data sheets.
        blocks: measured times of blocks, at most one for each shape; other blocks take the predicted time.
    """

    name: str
    device: str
    gpus_per_node: int
    memory_gb: float
    peak_tflops: float
    product_efficiency: float
    product_us: float
    attention_efficiency: float
    memory_gb_per_s: float
    launch_us: float
    node_gb_per_s: float
    node_latency_us: float
    network_gb_per_s: float
    network_latency_us: float
    step_ms: float = 0.0
    transfer_overlap: float = 1.0
    fitted: Fitted | None = dataclasses.field(default=None, hash=False)
    blocks: tuple[MeasuredBlock, ...] = ()

    def __post_init__(self) -> None:
        check_one_of("device", self.device, ("cuda", "cpu"))
        check(self.gpus_per_node >= 1, f"gpus_per_node={self.gpus_per_node} must be 1 or more")
        for name in CONSTANTS:
            value = getattr(self, name)
            may_be_zero = name.endswith(("_us", "_ms", "_overlap"))
            check(
                value <= _LARGEST and (value > 0 or (may_be_zero and value == 0)),
                f"{name}={value} must be {'0 or more' if may_be_zero else 'above 0'}, and at most {_LARGEST:g}",
            )
        for name in ("product_efficiency", "attention_efficiency", "transfer_overlap"):
            check(getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be at most 1: a share")
        shapes = [block.shape for block in self.blocks]
        check(len(set(shapes)) == len(shapes), "blocks must differ in their sizes: two of them are of the same shape")

    def measured_block(self, config: TrainConfig) -> MeasuredBlock | None:
        """Return the measured block of a run's shape; None if there is none."""
        if not self.blocks:
            return None
        shape = block_shape(config)
        return next((block for block in self.blocks if block.shape == shape), None)


CONSTANTS = tuple(
    field.name
    for field in dataclasses.fields(Cluster)
    if field.name not in ("name", "device", "gpus_per_node", "fitted", "blocks")
)
"""Fields that are speeds, times and sizes."""


def load_cluster(name_or_path: str | Path) -> Cluster:
    """Read a cluster file, or one that comes with the package.

    Args:
        name_or_path: path of a .toml file; or the name of a shipped cluster, or a prefix that only one name has.

    Raises:
        InputError: no such name or file, no TOML, or a key that is missing, unknown or out of range.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    path = Path(name_or_path)
    if path.suffix != ".toml":
        given = str(name_or_path).lower()
        found = [name for name in shipped if name == given] or [name for name in shipped if name.startswith(given)]
        wanted = f"one of {', '.join(shipped)}, a prefix that only one of them has, or a path of a .toml file"
        check(bool(given) and len(found) == 1, f"cluster={str(name_or_path)!r:.60} must be {wanted}")
        path = SHIPPED / f"{found[0]}.toml"
    try:
        table = parse_toml(read_bounded(path, _MOST_BYTES))
        known = {field.name: field for field in dataclasses.fields(Cluster)}
        if unknown := sorted(table.keys() - known.keys()):
            raise InputError(f"unknown key {unknown[0]} (keys: {', '.join(known)})")
        missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in table]
        check(not missing, f"{', '.join(missing)} must be given (fused-megatron calibrate writes a whole file)")
        return convert(table, Cluster)
    except FileNotFoundError:
        raise InputError(f"cluster={path} does not exist (shipped: {', '.join(shipped)})") from None
    except OSError as error:
        raise InputError(f"cluster={path} cannot be read: {error}") from None
    except InputError as error:
        raise InputError(f"cluster={path}: {error}") from None


def cluster_text(cluster: Cluster) -> str:
    """Return the cluster as TOML that load_cluster reads."""
    table = {name: value for name, value in dataclasses.asdict(cluster).items() if value not in (None, ())}
    return tomli_w.dumps(table)
