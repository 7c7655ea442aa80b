"""Figures beside what the machine can do at most: the roofline, and the shares of it (MFU, HFU)."""

from collections.abc import Mapping
from dataclasses import dataclass

from fused_megatron.benchmarking.side_by_side import OURS, Comparison

COPY, GEMM = "copy_gb_per_s", "gemm_gflop_per_s"
FORMULAS = (
    "MFU: model FLOPs a step / seconds / (ranks x the GFLOP/s of a large matrix product on each rank, measured in the "
    "same run with the same dtype and threads). Model FLOPs: the matrix products alone, forward and twice that "
    "backward; attention's two in full, though causal; no norm, softmax, look-up or optimizer.",
    "HFU: the same with hardware FLOPs, which count what is computed again.",
)


@dataclass(frozen=True)
class Ceilings:
    """Of a results file: Results.ceilings, some of which may be unknown."""

    measured: Mapping[str, float]

    @property
    def copy_gb_per_s(self) -> float | None:
        """The bytes a second of a large copy."""
        return self.measured.get(COPY)

    def gemm_gflop_per_s(self, dtype: str, ranks: int = 1) -> float | None:
        """Of a large square matrix product on one rank, while as many compute; where that was not measured, of any."""
        name = f"{GEMM} {dtype}"
        return self.measured.get(f"{name}, {ranks} rank{'s' * (ranks > 1)}", self.measured.get(name))

    def roof_gflop_per_s(self, case: Comparison) -> float | None:
        """The most that the case's arithmetic can reach at its bytes: the lower of the two ceilings."""
        intensity, gemm, copy = case.intensity(), self.gemm_gflop_per_s(case.dtype, case.ranks), self.copy_gb_per_s
        if intensity is None or gemm is None or copy is None:
            return None
        return min(gemm, intensity * copy)

    def limit(self, case: Comparison) -> str:
        """Which of the two it is: "copy" or "product"."""
        return "product" if self.roof_gflop_per_s(case) == self.gemm_gflop_per_s(case.dtype, case.ranks) else "copy"

    def share_of_roof(self, case: Comparison, provider: str = OURS) -> float | None:
        """What a provider reaches of it; of an op without counted arithmetic: its bytes beside the copy's."""
        roof, reached = self.roof_gflop_per_s(case), case.gflop_per_s(provider)
        if roof is not None and reached is not None:
            return reached / roof
        gb_per_s = case.gb_per_s(provider)
        return None if gb_per_s is None or not self.copy_gb_per_s else gb_per_s / self.copy_gb_per_s

    def share_of_gemm(self, case: Comparison, provider: str, flops: int | None) -> float | None:
        """flops a step over the seconds, and over the ranks' products: MFU of model FLOPs, HFU of hardware FLOPs."""
        ms, gemm = case.ms(provider), self.gemm_gflop_per_s(case.dtype, case.ranks)
        if ms is None or gemm is None or flops is None:
            return None
        return flops / (ms.median / 1e3) / (case.ranks * gemm * 1e9)
