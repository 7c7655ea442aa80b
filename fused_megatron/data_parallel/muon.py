"""Muon: an update rule that orthogonalizes the momentum of whole matrices, for the matrices of the blocks."""

import math
from collections.abc import Mapping, Sequence

import torch

from fused_megatron.config import OptimizerConfig
from fused_megatron.data_parallel.update_rules import ParameterGroup, UpdateStep, round_main_weights
from fused_megatron.data_parallel.whole_matrices import Matrix, WholeMatrices

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic polynomial with the largest slope at 0 for which singular values end near 1 (as torch.optim.Muon)."""
_ITERATIONS = 5
_EPS = 1e-7
"""Least norm that a matrix is divided by (as torch.optim.Muon)."""


class Muon:
    """torch.optim.Muon for matrices that are sharded over ranks.

        m = m + (g - m) (1 - momentum)              u = g + (m - g) momentum; without nesterov u = m
        w = w (1 - lr weight_decay) - lr factor(O, I) orthogonal(u)

    where u is the whole matrix [O, I] of a full parameter, and adjust_lr_fn names the factor. Each named part of a
    stacked parameter (query, key, value; gate and up) is a matrix of its own, as in a checkpoint. So the update does
    not depend on the layout.

    torch multiplies matrices in bfloat16. This rule does so for bfloat16 parameters, with torch's bits. For float32
    parameters it multiplies in float32: bfloat16 would make an update differ by a per cent between layouts whose
    gradients differ by their last bit.

    Args:
        config: momentum, nesterov and adjust_lr_fn.
        matrices: matrices of all parameters that this rule updates. All ranks of its group update together.

    Communication: as WholeMatrices.map, in the dtype of the parameters.
    Memory: as WholeMatrices.map, and five more matrices while a rank computes one.

    Paper: Muon is Scalable for LLM Training (Liu et al., arXiv 2502.16982);
        https://kellerjordan.github.io/posts/muon
    """

    state_names: tuple[str, ...] = ("momentum_buffer",)
    elementwise = False
    refuses_on_device = False

    def __init__(self, config: OptimizerConfig, matrices: WholeMatrices) -> None:
        self._momentum, self._nesterov = config.momentum_used, config.nesterov_used
        self._factor = _FACTORS[config.adjust_lr_fn or "match_rms_adamw"]
        self._matrices = matrices

    def update(self, group: ParameterGroup, step: UpdateStep) -> None:
        """As UpdateRule.update, for all matrices at once."""
        main = _by_name(group, group.main)
        gradient = _by_name(group, group.gradient)
        buffers = _by_name(group, group.state["momentum_buffer"])
        like = group.low[0] if group.low else group.main[0]

        def direction(matrix: Matrix) -> torch.Tensor:
            g = gradient[matrix.name][matrix.rows] * step.gradient_scale
            buffer = buffers[matrix.name][matrix.rows].lerp_(g, 1 - self._momentum)
            u = g.lerp_(buffer, self._momentum) if self._nesterov else buffer
            return u.to(like.dtype)

        for matrix, update in self._matrices.map(direction, orthogonal, like):
            weight = main[matrix.name][matrix.rows]
            weight.mul_(1 - step.lr * group.weight_decay)
            weight.add_(update, alpha=-step.lr * self._factor(*matrix.shape))
        round_main_weights(group)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix with the singular vectors of a matrix [O, I], and singular values between 0.7 and 1.2 or so.

    Five iterations of Newton-Schulz. Singular values far below the norm of the matrix stay small.

    Numerics: in the dtype of the matrix; in bfloat16 bit for bit as torch.optim.Muon.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _original(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / columns))


def _match_rms_adamw(rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns))


_FACTORS = {"original": _original, "match_rms_adamw": _match_rms_adamw}
"""Factor of the learning rate for each optimizer.adjust_lr_fn."""


def _by_name(group: ParameterGroup, tensors: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return dict(zip(group.names, tensors, strict=True))
