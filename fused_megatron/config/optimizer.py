"""Settings of the optimizer and its learning rate.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_one_of, check_positive

SCHEDULES = ("cosine", "constant", "wsd", "linear")
"""Schedules of the learning rate after warm-up."""
STATE_DTYPES = ("float32", "bfloat16")
LR_ADJUSTMENTS = ("match_rms_adamw", "original")
"""Values of adjust_lr_fn, as in torch.optim.Muon."""


@dataclass(frozen=True)
class _Kind:
    """Keys that only some kinds of optimizer read.

    Attributes:
        keys: the keys that it reads.
        momentum, nesterov: defaults of these two keys.
    """

    keys: frozenset[str]
    momentum: float = 0.0
    nesterov: bool = False


_ADAM_KEYS = frozenset({"beta1", "beta2", "eps"})
_OWN_KEYS = (*sorted(_ADAM_KEYS), "momentum", "nesterov", "adjust_lr_fn")
_KINDS = {
    "adamw": _Kind(_ADAM_KEYS),
    "sgd": _Kind(frozenset({"momentum", "nesterov"}), momentum=0.9),
    "lion": _Kind(frozenset({"beta1", "beta2"})),
    "muon": _Kind(_ADAM_KEYS | {"momentum", "nesterov", "adjust_lr_fn"}, momentum=0.95, nesterov=True),
}


KINDS = tuple(_KINDS)
"""Values of optimizer.kind."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    kind: str = "adamw"
    """Update rule: adamw, sgd, lion, or muon (matrices of the blocks by Muon, all other parameters by AdamW)."""
    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate after the decay."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """Learning rate after warm-up: cosine or linear (decay to min_lr), wsd (constant, decay at the end), constant."""
    decay_steps: int | None = None
    """Steps of the decay from lr to min_lr. None: all steps after warm-up; for wsd, the last tenth of the steps.
    Set it if the run may be extended later: the learning rate then does not depend on num_steps."""
    beta1: float = 0.9
    """Decay of the first moment; lion: share of the momentum in an update. Not for sgd."""
    beta2: float = 0.95
    """Decay of the second moment; lion: decay of the momentum. Not for sgd."""
    eps: float = 1e-8
    """Added to the square root of the second moment (adamw, muon)."""
    momentum: float | None = None
    """Decay of the momentum (sgd, muon). None: 0.9 for sgd, 0.95 for muon."""
    nesterov: bool | None = None
    """Look one step ahead along the momentum (sgd, muon). None: False for sgd, True for muon."""
    adjust_lr_fn: str | None = None
    """Factor of lr for a matrix [O, I] (muon): match_rms_adamw, 0.2 sqrt(max(O, I)), so that lr and weight_decay may be
    AdamW's; original, sqrt(max(1, O / I)). None: match_rms_adamw."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors (biases, norms) have none. Decoupled; sgd adds it to the gradient, as torch."""
    state_dtype: str = "float32"
    """Dtype in which moments are stored: float32, or bfloat16 with stochastic rounding. Main weights are float32."""
    clip_norm: float = 1.0
    """Largest global 2-norm of the gradients: larger gradients are scaled down to it. 0: no clipping."""

    def __post_init__(self) -> None:
        self._check_kind()
        check(self.lr > 0, f"lr={self.lr} must be above 0")
        check(0 <= self.min_lr <= self.lr, f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        check_one_of("schedule", self.schedule, SCHEDULES)
        if self.decay_steps is not None:
            check_positive("decay_steps", self.decay_steps)
            check(
                self.schedule != "constant",
                f"decay_steps={self.decay_steps} has no place in schedule='constant': leave it out, or choose "
                f"schedule='wsd'",
            )
        check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in [0, 1)")
        check(self.eps > 0, f"eps={self.eps} must be above 0")
        check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must be 0 or more")
        check(self.clip_norm >= 0, f"clip_norm={self.clip_norm} must be 0 or more")

    def _check_kind(self) -> None:
        check_one_of("optimizer.kind", self.kind, KINDS)
        check_one_of("state_dtype", self.state_dtype, STATE_DTYPES)
        for name in _OWN_KEYS:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            readers = ", ".join(repr(kind) for kind, own in _KINDS.items() if name in own.keys)
            check(
                value == default or name in _KINDS[self.kind].keys,
                f"{name}={value} has no effect with optimizer.kind={self.kind!r}: leave it out, or set kind to one of: "
                f"{readers}",
            )
        if self.momentum is not None:
            check(0 <= self.momentum < 1, f"momentum={self.momentum} must lie in [0, 1)")
        check(
            not (self.nesterov and self.kind == "sgd" and self.momentum == 0),
            "nesterov=True needs a momentum above 0: set optimizer.momentum",
        )
        if self.adjust_lr_fn is not None:
            check_one_of("adjust_lr_fn", self.adjust_lr_fn, LR_ADJUSTMENTS)

    @property
    def momentum_used(self) -> float:
        """The momentum of this kind: as configured, or its default."""
        return _KINDS[self.kind].momentum if self.momentum is None else self.momentum

    @property
    def nesterov_used(self) -> bool:
        """Whether this kind looks ahead along its momentum: as configured, or its default."""
        return _KINDS[self.kind].nesterov if self.nesterov is None else self.nesterov
