"""Speed limits of a machine, and the shares of them that a case reaches: roofline, MFU, HFU."""

from collections.abc import Mapping
from dataclasses import dataclass

from fused_megatron.benchmarking.side_by_side import OURS, Comparison

COPY, GEMM = "copy_gb_per_s", "gemm_gflop_per_s"
FORMULAS = (
    "MFU: model FLOPs a step / seconds / (ranks x the GFLOP/s of a large matrix product on each rank, measured in the "
    "same run with the same dtype and threads). Model FLOPs: only the matrix products, once forward and twice "
    "backward; attention's two in full, though causal; no norm, softmax, look-up or optimizer.",
    "HFU: the same with hardware FLOPs, which include recomputation.",
)


@dataclass(frozen=True)
class Ceilings:
    """Speed limits in a results file (Results.ceilings); some may be unknown."""

    measured: Mapping[str, float]

    @property
    def copy_gb_per_s(self) -> float | None:
        """Speed of a large copy."""
        return self.measured.get(COPY)

    def gemm_gflop_per_s(self, dtype: str, ranks: int = 1) -> float | None:
        """Return a rank's speed in a large matrix product while `ranks` ranks compute, or any number if unknown."""
        name = f"{GEMM} {dtype}"
        return self.measured.get(f"{name}, {ranks} rank{'s' * (ranks > 1)}", self.measured.get(name))

    def roof_gflop_per_s(self, case: Comparison) -> float | None:
        """Return the roofline of a case: the lower of matrix-product speed, and copy speed times intensity."""
        intensity, gemm, copy = case.intensity(), self.gemm_gflop_per_s(case.dtype, case.ranks), self.copy_gb_per_s
        if intensity is None or gemm is None or copy is None:
            return None
        return min(gemm, intensity * copy)

    def limit(self, case: Comparison) -> str:
        """Return which speed limits the case: "copy" or "product"."""
        return "product" if self.roof_gflop_per_s(case) == self.gemm_gflop_per_s(case.dtype, case.ranks) else "copy"

    def share_of_roof(self, case: Comparison, provider: str = OURS) -> float | None:
        """Return the share of the roofline that a provider reaches; without counted FLOPs, its GB/s over the copy's."""
        roof, reached = self.roof_gflop_per_s(case), case.gflop_per_s(provider)
        if roof is not None and reached is not None:
            return reached / roof
        gb_per_s = case.gb_per_s(provider)
        return None if gb_per_s is None or not self.copy_gb_per_s else gb_per_s / self.copy_gb_per_s

    def share_of_gemm(self, case: Comparison, provider: str, flops: int | None) -> float | None:
        """Return flops per second over the matrix-product speed of all ranks: MFU or HFU, by the kind of flops."""
        ms, gemm = case.ms(provider), self.gemm_gflop_per_s(case.dtype, case.ranks)
        if ms is None or gemm is None or flops is None:
            return None
        return flops / (ms.median / 1e3) / (case.ranks * gemm * 1e9)
