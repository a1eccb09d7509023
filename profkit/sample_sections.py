"""The sections of the page of a run over many samples."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from profkit import figures, findings, page, sample_checks, verdict_sections
from profkit.page import MOST_ROWS, Column
from profkit.sample_runs import SampleRun

LACKS = (
    ("steps", "the time of each step, its spread over passes, cache growth"),
    ("layers and modules", "the heat map and the tree"),
    ("timeline", "one prefill and one decode step, slice by slice"),
    ("kernels and operators", "no sample is profiled"),
    ("device times", "samples are timed on the host's clock"),
    ("anatomy", "the parts of the model"),
)


def sections(run: SampleRun, key: str) -> Iterator[str]:
    """Yield what the page says of a run; `key` begins the names of its figures."""
    yield page.guarded("The answer", _answer(run, key))
    if run.unreadable:
        yield page.items(run.unreadable, "warning")
    yield page.guarded("The list of checks", verdict_sections.verdicts(sample_checks.verdicts(run)))
    if len(run.good):
        yield page.section("Worth optimising", [page.items(findings.worth_optimising_of_samples(run))])
        yield page.section("Stages", _stages(run))
        yield page.section("Latency and sizes", _latency(run))
    if len(run.bad):
        yield page.section("Samples in error", [_errors(run)])
    yield page.section("What a run over samples does not hold", _lacks())


def _answer(run: SampleRun, key: str) -> Iterator[str]:
    yield page.paragraph(findings.answer_of_samples(run), "answer")
    if len(run.good):
        means = {str(name): float(value) for name, value in run.breakdown()["mean_ms"].items()}
        yield page.figure(figures.stage_bars({"mean of a sample, host clock": means}), f"{key}-stages")
        totals = run.by_stage.sum(axis=1)
        p10, median, p90 = totals.quantile([0.1, 0.5, 0.9])
        yield page.paragraph(
            f"Over {len(run.good)} samples, one pass each: median {median:.2f} ms, p10 {p10:.2f}, p90 {p90:.2f}; the "
            f"bar is the mean, whose stages add up to {totals.mean():.2f} ms.",
            "note",
        )


def _stages(run: SampleRun) -> Iterator[str]:
    columns = [
        *(Column("classic_stage", "of 1 to 4", 0), Column("stage", "stage"), Column("mean_ms", "mean ms")),
        *(Column("share", "share", percent=True), Column("median_ms", "median"), Column("p10_ms", "p10")),
        Column("p90_ms", "p90"),
    ]
    yield page.table(run.breakdown().reset_index(), columns)
    yield page.paragraph("Means add up to the mean total; median, p10 and p90 are each row's own over samples.", "note")
    if len(parts := run.parts().reset_index()):
        yield "<h3>Preprocessing</h3>"
        yield page.table(parts, [Column("part", "part"), Column("mean_ms", "mean ms"), Column("median_ms", "median")])


def _latency(run: SampleRun) -> Iterator[str]:
    found = run.latency()
    if not found:
        yield page.paragraph("The rows tell neither latency nor tokens.", "note")
        return
    rows = pd.DataFrame({"what": [name.replace("_", " ") for name in found], "median": list(found.values())})
    yield page.table(rows, [Column("what", "median over samples"), Column("median", "")])


def _errors(run: SampleRun) -> str:
    return page.table(run.bad, [Column("id", "sample"), Column("error", "error")], MOST_ROWS)


def _lacks() -> Iterator[str]:
    yield page.items(f"{what}: {why}" for what, why in LACKS)
    yield page.paragraph(
        "A run of one sample, profkit trace MODEL with that sample's files, holds all of this.", "note"
    )
