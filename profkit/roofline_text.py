"""Ceilings and rooflines as text for the terminal, and as plain values for --json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from profkit import doubts
from profkit.ceilings import NOISY, Ceilings
from profkit.directories import plain
from profkit.roofline import Roofline

MOST_OPERATORS = 8
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def amount(value: float, unit: str = "", digits: int = 3) -> str:
    """Return a number with a prefix of the SI and its unit: 13.5 GFLOP."""
    if pd.isna(value):
        return "–"
    if not value:
        return f"0 {unit}".strip()
    size, prefix = next((one for one in PREFIXES if abs(value) >= one[0]), (1e-9, "n"))
    return f"{value / size:.{digits}g} {prefix}{unit}".strip()


def ceilings_report(found: Ceilings) -> Iterator[Table | str]:
    """Yield what the machine can do, beside what its maker says."""
    driver = f", {found.driver}" if found.driver else f", {found.threads} threads"
    yield f"[bold]{escape(found.device_name)}[/bold]{escape(driver)}, torch {escape(found.torch)}"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ceiling")
    for name in ("median", "p10 … p90", "spread", "datasheet", "of it"):
        table.add_column(name, justify="right", no_wrap=True)
    for what, unit, one, stated in found.rows():
        spread = f"{one.spread:.1%}"
        table.add_row(
            escape(what),
            amount(one.median, unit),
            f"{amount(one.p10)} … {amount(one.p90)}",
            f"[yellow]{spread}[/yellow]" if one.spread > NOISY else spread,
            amount(stated, unit),
            "–" if pd.isna(stated) else f"{one.median / stated:.0%}",
        )
    yield table
    if found.datasheet is None:
        yield "[dim]no datasheet of this device is known to profkit[/dim]"
    else:
        yield f"[dim]datasheet: {escape(found.datasheet.source)}[/dim]"
    for doubt in doubts.of_ceilings(found):
        yield f"[yellow]{escape(doubt)}[/yellow]"
    for note in found.notes:
        yield f"[yellow]note: {escape(note)}[/yellow]"


def report(found: Roofline) -> Iterator[Table | str]:
    """Yield the answers: stages, steps, latency, what would change, media tokens, what has no formula."""
    yield from _stages(found)
    clock = {"": "no times: nothing was run", "host": "host clock", "device": "device clock"}[found.clock]
    yield f"[dim]{clock}; {escape(meanings(found))}[/dim]"
    noisy = list(doubts.of_ceilings(found.limits.ceilings))  # which stands by the ceilings
    for doubt in doubts.of(found):
        if doubt not in noisy:
            yield f"[yellow]{escape(doubt)}[/yellow]"
    yield from _steps(found)
    yield _latency_line(found)
    if len(found.what_if):
        yield _what_if(found.what_if)
        yield "[dim]floors of a decode step, by arithmetic alone: nothing of this was run[/dim]"
    yield media_line(found)
    yield from _operators(found)
    yield f"[dim]{escape(how_counted(found))}[/dim]"


def _stages(found: Roofline) -> Iterator[Table]:
    """Yield a row a stage; where there are times, in two tables, so that 80 columns hold their figures."""
    work = {
        "FLOPs": lambda row: amount(row["flops"]),
        "bytes": lambda row: amount(row["bytes"], "B"),
        "FLOP/B": lambda row: _number(row["intensity"]),
        "launch ms": lambda row: _ms(row["launch_ms"]),
    }
    limit = {"floor ms": lambda row: _ms(row["floor_ms"]), "binds": lambda row: row["binds"] or "–"}
    times = {
        "ms": lambda row: _ms(row["time_ms"]),
        **limit,
        "of it": lambda row: _share(row["attained"]),
        "MFU": lambda row: _share(row["mfu"]),
        "MBU": lambda row: _share(row["mbu"]),
    }
    if found.stages["no_formula"].notna().any():
        times["no formula"] = lambda row: _share(row["no_formula"])
    for columns in (times, work) if found.clock else ({**work, **limit},):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("stage", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for stage, row in found.stages.iterrows():
            table.add_row(str(stage), *(cell(row) for cell in columns.values()))
        yield table


def _steps(found: Roofline) -> Iterator[str]:
    decode = found.steps[found.steps["phase"] == "decode"]
    if not len(decode):
        return
    ends = [decode.iloc[0]] if len(decode) == 1 else [decode.iloc[0], decode.iloc[-1]]
    for row in ends:
        time = f"{_ms(row['time_ms'])} ms, MFU {_share(row['mfu'])}, MBU {_share(row['mbu'])}; " if found.clock else ""
        yield (
            f"decode step {int(row['step'])}: {time}{amount(row['flops'], 'FLOP')}, weights "
            f"{amount(row['weight_bytes'], 'B')}, cache read {amount(row['cache_read_bytes'], 'B')}, floor "
            f"{_ms(row['floor_ms'])} ms ({row['binds']})"
        )


def _latency_line(found: Roofline) -> str:
    one = found.latencies
    measured = (one.ttft_ms, one.ttft_floor_ms), (one.tpot_ms, one.tpot_floor_ms)
    times = [f" of {_ms(took)} ms (×{took / floor:.1f})" if took == took and floor else "" for took, floor in measured]
    return (
        f"floor of TTFT [bold]{_ms(one.ttft_floor_ms)} ms[/bold]{times[0]} · "
        f"floor of TPOT [bold]{_ms(one.tpot_floor_ms)} ms[/bold]{times[1]}"
    )


def _what_if(rows: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("bits a weight", "batch", "floor ms", "tokens/s at most", "times", "binds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict(orient="records"):
        rate = f"{row['tokens_per_s']:.0f}"
        cells = (str(row["bits"]), str(row["batch"]), _ms(row["floor_ms"]), rate, f"×{row['times']:.1f}", row["binds"])
        table.add_row(*cells)
    return table


def media_line(found: Roofline) -> str:
    """Return how many tokens of the prompt are media and what they cost, in a sentence."""
    media = found.media
    if found.media_tokens is None or not found.prompt_tokens:
        return "prompt: how many of its tokens are media is not known"
    if media is None:
        return (
            f"prompt: {found.prompt_tokens - found.media_tokens} text and {found.media_tokens} media tokens; what "
            "these cost is not known, as it does not follow from the counted steps"
        )
    return (
        f"prompt: {media.text_tokens} text and {media.media_tokens} media tokens; the media make "
        f"{media.prefill_share:.0%} of the prefill's FLOPs ({amount(media.prefill_flops)}), and in every later step "
        f"{amount(media.step_flops, 'FLOP')} and {amount(media.step_cache_bytes, 'B')} of cache to read, at least "
        f"{media.step_floor_ms:.3f} ms (by arithmetic)"
    )


def _operators(found: Roofline) -> Iterator[str]:
    rows = found.without_formula
    if not len(rows):
        return
    known = rows["share"].notna().any()
    named = rows.head(MOST_OPERATORS)
    said = ", ".join(
        f"{row['name']} {row['share']:.1%}" if known else f"{row['name']} ({row['calls']} calls)"
        for row in named.to_dict(orient="records")
    )
    share = f", {rows['share'].sum():.1%} of the operators' time" if known else ""
    rest = f", and {len(rows) - len(named)} more" if len(rows) > len(named) else ""
    yield f"no FLOP formula: {len(rows)} operators{share}: {escape(said + rest)}"


NO_FORMULA = "no formula: share of the operators' time that counts as no FLOP"


def floor_meaning(found: Roofline) -> str:
    """Return what a floor is, and in which FLOP/s: each stage's own."""
    dtypes = dict.fromkeys(found.limits.dtype_of(str(name)) for name in found.stages.index[found.stages["flops"] > 0])
    return f"floor: the higher of FLOPs over {' or '.join(dtypes)} FLOP/s and bytes over B/s, as measured here"


def meanings(found: Roofline) -> str:
    """Return what the columns of the stages mean, in a sentence."""
    return (
        f"{floor_meaning(found)}; of it: floor over time; launch: as many operators, one by one, from the host; "
        f"{NO_FORMULA}."
    )


def energy_line(energy: Mapping[str, Any] | None) -> str:
    """Return what a run says of energy, in a sentence; "" if it does not."""
    if not energy or not energy["joules"]:
        return ""
    said = ", ".join(f"{stage} {amount(joules, 'J')}" for stage, joules in energy["joules"].items())
    return f"energy ({energy['meter']}, stages repeated in windows of their own): {said}; {energy['watts']:.1f} W"


def how_counted(found: Roofline) -> str:
    """Return how the work was counted, in a sentence or two."""
    about = found.work.about
    weights = "on a copy without weights" if about["weights"] == "fake" else f"on the model itself ({about['why']})"
    steps = f"{about['steps_counted']} of {about['steps']} steps"
    line = f"; the others follow by a line: {about['line']}" if about["line"] else ""
    gaps = ", ".join(f"{name} ({share:.1%} of the FLOPs)" for name, share in about.get("gaps", {}).items())
    missed = f" torch's FlopCounterMode would count as nothing: {gaps}." if gaps else ""
    return f"counted {weights}, {steps}{line}. FLOPs: {about['convention']}.{missed}"


def as_dict(found: Roofline) -> dict[str, Any]:
    """Return the answers as plain values; unknown numbers are null."""
    return plain(
        {
            "clock": found.clock or None,
            "stages": found.stages.reset_index().to_dict(orient="records"),
            "steps": found.steps.to_dict(orient="records"),
            "latency": asdict(found.latencies),
            "what_if": {"analytic": True, "rows": found.what_if.to_dict(orient="records")},
            "prompt_tokens": found.prompt_tokens or None,
            "media_tokens": found.media_tokens,
            "media": None if found.media is None else {"analytic": True, **asdict(found.media)},
            "without_formula": found.without_formula.to_dict(orient="records"),
            "doubts": doubts.of(found),
            "parts": found.work.parts.to_dict(orient="records"),
            "counted": dict(found.work.about),
            "ceilings": found.limits.ceilings.to_record(),
        }
    )


def ceilings_as_dict(found: Ceilings) -> dict[str, Any]:
    """Return ceilings as plain values, beside the datasheet's; unknown numbers are null."""
    rows = [
        {"what": what, "unit": unit, **asdict(one), "spread": one.spread, "datasheet": stated}
        for what, unit, one, stated in found.rows()
    ]
    return plain({**found.to_record(), "rows": rows})


def _ms(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _share(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
