"""Figures beside what the machine can do at most: the roofline, and the shares of it (MFU, HFU)."""

from collections.abc import Mapping
from dataclasses import dataclass

from fused_megatron.testing.side_by_side import OURS, Comparison

COPY = "copy_gb_per_s"
FORMULAS = (
    "MFU: model FLOPs a step / seconds / (ranks x the measured GFLOP/s of a large matrix product on one rank, same "
    "dtype and threads). Model FLOPs: those of the matrix products of the forward pass x 3 (backward makes two of "
    "each); attention's two products in full, though causal; no norm, no softmax, no embedding look-up.",
    "HFU: the same with hardware FLOPs, which count forward passes that are computed again.",
)


@dataclass(frozen=True)
class Ceilings:
    """Of a results file: Results.ceilings, some of which may be unknown."""

    measured: Mapping[str, float]

    @property
    def copy_gb_per_s(self) -> float | None:
        """The bytes a second of a large copy."""
        return self.measured.get(COPY)

    def gemm_gflop_per_s(self, dtype: str) -> float | None:
        """Of a large square matrix product on one rank."""
        return self.measured.get(f"gemm_gflop_per_s {dtype}")

    def roof_gflop_per_s(self, case: Comparison) -> float | None:
        """The most that the case's arithmetic can reach at its bytes: the lower of the two ceilings."""
        intensity, gemm, copy = case.intensity(), self.gemm_gflop_per_s(case.dtype), self.copy_gb_per_s
        if intensity is None or gemm is None or copy is None:
            return None
        return min(gemm, intensity * copy)

    def limit(self, case: Comparison) -> str:
        """Which of the two it is: "copy" or "product"."""
        return "product" if self.roof_gflop_per_s(case) == self.gemm_gflop_per_s(case.dtype) else "copy"

    def share_of_roof(self, case: Comparison, provider: str = OURS) -> float | None:
        """What a provider reaches of it; of an op without counted arithmetic: its bytes beside the copy's."""
        roof, reached = self.roof_gflop_per_s(case), case.gflop_per_s(provider)
        if roof is not None and reached is not None:
            return reached / roof
        gb_per_s = case.gb_per_s(provider)
        return None if gb_per_s is None or not self.copy_gb_per_s else gb_per_s / self.copy_gb_per_s

    def share_of_gemm(self, case: Comparison, provider: str, flops: int | None) -> float | None:
        """flops a step over the seconds, and over the ranks' products: MFU of model FLOPs, HFU of hardware FLOPs."""
        ms, gemm = case.ms(provider), self.gemm_gflop_per_s(case.dtype)
        if ms is None or gemm is None or flops is None:
            return None
        return flops / (ms.median / 1e3) / (case.ranks * gemm * 1e9)
