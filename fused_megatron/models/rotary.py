"""Tables of cosines and sines for rotary position embedding, also scaled for contexts longer than in training."""

import math

import torch

from fused_megatron.config import TransformerConfig
from fused_megatron.sharding import SequenceLayout


def rotary_tables(
    sequence: SequenceLayout,
    config: TransformerConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of position * frequency, [positions of the rank, rotary_dim / 2].

    With `positions`, [B, positions of the rank] int64, every token has its own row: [positions of the rank, B,
    rotary_dim / 2]. Backward keeps the tables, 4 rotary_dim bytes a row.

    Angles are float64: in float32 they are wrong by 0.004 at position 100,000. KeptTables keeps the result.

    The frequency of pair i by rotary_scaling, with f_i = rotary_base^(-2 i / rotary_dim), the scaling factor s and the
    original context length L:

        none      f_i
        linear    f_i / s
        dynamic   f_i with a larger base: the slowest pair makes as many turns over seq_len as before over L
        llama3    by the number of turns over the original context, L f_i / 2 pi: f_i / s below rotary_slow_turns, f_i
                  above rotary_fast_turns, and between them an average of both, weighted by the turns
        yarn      as llama3, but weighted by i; cos and sin are scaled, too

    Papers: Chen et al. 2023 (linear, arXiv:2306.15595); Peng et al. 2023 (dynamic, yarn, arXiv:2309.00071); Grattafiori
    et al. 2024 (llama3, arXiv:2407.21783).
    """
    rows = sequence.positions(device) if positions is None else positions.t().contiguous()
    angles = rows.to(torch.float64).unsqueeze(-1) * _frequencies(sequence.seq_len, config, device)
    scale = _attention_factor(config)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class KeptTables:
    """The last tables of a stage without positions of tokens: the same memory in every forward of the same layout.

    No buffer of a module: neither a cast nor a state dict has them, and copies of the model make their own. Other
    positions, a longer sequence, another device or dtype replace them.
    """

    def __init__(self) -> None:
        self._key: tuple[SequenceLayout, TransformerConfig, torch.device, torch.dtype] | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def __deepcopy__(self, memo: object) -> "KeptTables":
        return KeptTables()

    def __reduce__(self) -> tuple[type["KeptTables"], tuple[()]]:
        return KeptTables, ()

    def of(
        self, sequence: SequenceLayout, config: TransformerConfig, like: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotary_tables(..) on the device of `like`, computed only if they are not the last ones.

        Under torch.compile they are part of the graph. Fake tensors are not kept, since their mode may end, nor are
        tables of a CPU, which launches and captures nothing: there a step leaves no memory behind.
        """
        device, key = like.device, (sequence, config, like.device, dtype)
        plain = type(like) in (torch.Tensor, torch.nn.Parameter) and device.type != "cpu"
        if torch.compiler.is_compiling() or not plain:
            return rotary_tables(sequence, config, device=device, dtype=dtype)
        if self._tables is None or self._key != key:
            # In inference mode they would be tensors that autograd cannot save.
            with torch.inference_mode(False), torch.no_grad():
                self._tables = rotary_tables(sequence, config, device=device, dtype=dtype)
            self._key = key
        return self._tables


def _frequencies(seq_len: int, config: TransformerConfig, device: torch.device) -> torch.Tensor:
    """Compute the angle of each pair per token, in radians, [rotary_dim / 2] float64.

    On the device itself: a copy from the host would wait for all kernels before it, and a CUDA graph cannot have one.
    """
    dim, base, factor = config.rotary_dim, config.rotary_base, config.rotary_scaling_factor
    original = config.rotary_original_seq_len or seq_len
    if config.rotary_scaling == "dynamic":
        longer = max(seq_len, original) / original
        base *= (factor * longer - (factor - 1)) ** (dim / (dim - 2))
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    frequencies = base ** (-pairs / dim)
    if config.rotary_scaling == "linear":
        return frequencies / factor
    if config.rotary_scaling == "llama3":
        turns = original * frequencies / (2 * math.pi)
        slow, fast = config.rotary_slow_turns, config.fast_turns
        return frequencies * _blend(((turns - slow) / (fast - slow)).clamp(0, 1), factor)
    if config.rotary_scaling == "yarn":
        # The pairs that make fast_turns and rotary_slow_turns turns, rounded outwards to whole pairs.
        first = max(0, math.floor(_pair_of_turns(config.fast_turns, config, original)))
        last = min(dim - 1, math.ceil(_pair_of_turns(config.rotary_slow_turns, config, original)))
        slowness = (torch.arange(dim // 2, dtype=torch.float64, device=device) - first) / max(last - first, 0.001)
        return frequencies * _blend(1 - slowness.clamp(0, 1), factor)
    return frequencies


def _blend(unscaled: torch.Tensor, factor: float) -> torch.Tensor:
    return unscaled + (1 - unscaled) / factor


def _pair_of_turns(turns: float, config: TransformerConfig, original: int) -> float:
    """Return the (fractional) index of the pair that makes `turns` turns over the original context."""
    return config.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))


def _attention_factor(config: TransformerConfig) -> float:
    if config.rotary_scaling != "yarn":
        return 1.0
    if config.rotary_attention_factor is not None:
        return config.rotary_attention_factor
    return 0.1 * math.log(config.rotary_scaling_factor) + 1.0
