"""What makes a roofline's figures doubtful, in sentences: times below floors, noise, and what is not known."""

from __future__ import annotations

from collections.abc import Iterator

from profkit.ceilings import NOISY, Ceilings
from profkit.roofline import Roofline


def of(found: Roofline) -> list[str]:
    """Return every doubt about these answers, the gravest first."""
    return [*_below_floors(found), *of_ceilings(found.limits.ceilings), *_unknown(found)]


def of_ceilings(found: Ceilings) -> Iterator[str]:
    """Yield that ceilings are noisy, and which."""
    noisy = [(what, one.spread) for what, _, one, _ in found.rows() if one.spread > NOISY]
    if noisy:
        named = ", ".join(f"{what} {spread:.0%}" for what, spread in noisy)
        yield (
            f"noisy: rounds of the ceilings lie further apart than {NOISY:.0%} ({named}); measure again on a quiet "
            "machine, with profkit roofline --again"
        )


def _below_floors(found: Roofline) -> Iterator[str]:
    """Yield what took less than the least that it can take: then the least is wrong."""
    one = found.latencies
    named = [str(stage) for stage, attained in found.stages["attained"].items() if attained > 1]
    named += ["TTFT"] * (one.ttft_ms < one.ttft_floor_ms) + ["TPOT"] * (one.tpot_ms < one.tpot_floor_ms)
    if named:
        yield (
            f"faster than the floor: {', '.join(named)}; no time can be, so a ceiling was measured too low (or more "
            "was counted than had to be done), and MFU, MBU and floors are not to be trusted"
        )


def _unknown(found: Roofline) -> Iterator[str]:
    silent = found.limits.unmeasured(found.stages)
    for dtype, names in silent.items():
        yield (
            f"the FLOP/s of {dtype} were not measured: for {', '.join(names)} there is no MFU, the floor is that of "
            "memory alone, and which limit binds is not known"
        )
    if packed := found.work.about.get("packed"):
        yield (
            f"{', '.join(packed)} reads weights that are no tensors of the model: their bytes and FLOPs are not known, "
            "so floors, MFU and MBU are too low"
        )
