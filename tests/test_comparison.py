"""Runs side by side: intervals, pairs, equal work, gates, and the published case."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import small_llava
from click.testing import CliRunner

import profkit
from profkit import cli, comparison, sample_runs, stats
from profkit.comparison import Measured, compare, gap, gate, read, unlike
from profkit.errors import InputError

PUBLISHED = Path(__file__).parent.parent / "traces" / "published"


def measured(name="a", ids=None, about=None, new_tokens=10, prompt_tokens=100, media=1, **stages_ms) -> Measured:
    times = pd.DataFrame(stages_ms)
    work = pd.DataFrame(
        {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": 1, "media_items": media}, index=times.index
    )
    return Measured(name, about or {}, times, work, ids)


def noisy(size: int, seed: int, level: float = 10.0, spread: float = 0.05) -> np.ndarray:
    return level * (1 + spread * np.random.default_rng(seed).standard_normal(size))


def test_ratios_of_the_same_samples_are_paired():
    """Samples differ tenfold among each other; the second run is 10 % slower on each."""
    base = np.linspace(1, 10, 30)
    ids = [str(number) for number in range(30)]
    one = measured(ids=ids, prefill=base, decode=base)
    order = np.random.default_rng(0).permutation(30)
    two = measured(ids=[ids[i] for i in order], prefill=base[order] * 1.1, decode=base[order])
    table = compare(one, two)
    assert table.loc["prefill", ["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx([1.1] * 3)
    assert table.loc["prefill", "differs"] and not table.loc["decode", "differs"]
    assert table.loc["decode a step", "base_ms"] == pytest.approx(np.median(base) / 9)
    assert table.loc["prefill a prompt token", "base_ms"] == pytest.approx(np.median(base) / 100)
    apart = compare(measured(prefill=base), measured(prefill=base * 1.1))
    assert not apart.loc["prefill", "differs"]  # unpaired, the samples' own spread hides it


def test_runs_of_one_thing_seldom_differ():
    """Of 200 pairs of runs of the same distribution, about 5 % may look different."""
    differing = sum(
        compare(measured(prefill=noisy(20, 2 * pair)), measured(prefill=noisy(20, 2 * pair + 1))).loc[
            "prefill", "differs"
        ]
        for pair in range(200)
    )
    assert differing <= 20


def test_ten_percent_in_one_stage_is_found_there():
    one = measured(projector=noisy(40, 1), vision=noisy(40, 2), decode=noisy(40, 3))
    two = measured(projector=noisy(40, 4, 11.0), vision=noisy(40, 5), decode=noisy(40, 6))
    table = compare(one, two)
    stages = table.loc[["projector", "vision", "decode"]]
    assert stages.index[stages["differs"]].tolist() == ["projector"]
    assert 1.05 < stages.loc["projector", "ratio_low"] < 1.1 < stages.loc["projector", "ratio_high"] < 1.15


def test_of_the_published_case_most_is_output_length():
    """0.008 + 0.017 + 0.976 s for 45.5 tokens against 0.784 + 0.067 + 2.451 s for 102.4."""
    event = measured("EventGPT", load=[8.0] * 3, preprocess=[17.0] * 3, decode=[976.0] * 3, new_tokens=45.5)
    video = measured("Video-LLaVA", load=[784.0] * 3, preprocess=[67.0] * 3, decode=[2451.0] * 3, new_tokens=102.4)
    split = gap(event, video)
    assert split.total_ms == pytest.approx(3302 - 1001)
    # 56.9 tokens more, at 2451 / 101.4 = 24.17 ms each
    assert split.output_length_ms == pytest.approx(56.9 * 2451 / 101.4)
    assert "output length makes most of it, 1375.4 ms" in split.sentence("EventGPT", "Video-LLaVA")
    tokens = compare(event, video).loc["decode a step"]
    assert (tokens["base_ms"], tokens["other_ms"]) == pytest.approx((976 / 44.5, 2451 / 101.4))
    assert unlike(event, video) == ["output length: 45.5 and 102.4 (medians)"]


def test_a_gap_that_turns_round_at_equal_length():
    fast = measured("fast", decode=[100.0] * 3, new_tokens=11)
    long = measured("long", decode=[150.0] * 3, new_tokens=31)
    # 20 tokens at 5 ms: 100 ms of the 50 ms
    assert gap(fast, long).sentence("fast", "long") == (
        "long takes 50.0 ms longer than fast; output length makes 100.0 ms, and at equal length fast takes 50.0 ms "
        "longer than long."
    )
    assert "same length" in gap(measured(decode=[1.0]), measured(decode=[2.0])).sentence("a", "b")


def test_what_is_not_alike_is_said():
    about = {"dtype": "float32", "device_name": "x", "versions": {"torch": "2.13"}, "plan": {"warmup": 1}}
    other = {"dtype": "bfloat16", "device_name": "x", "versions": {"torch": "2.11"}, "plan": {"warmup": 0}}
    found = unlike(measured(about=about, decode=[1.0]), measured(about=other, decode=[1.0], prompt_tokens=5))
    assert found == [
        "dtype: float32 and bfloat16",
        "torch: 2.13 and 2.11",
        "prompt tokens: 100 and 5 (medians)",
        "warmup: 1 and 0",
    ]


def test_gates():
    table = compare(
        measured(prefill=noisy(30, 1), decode=noisy(30, 2)), measured(prefill=noisy(30, 3, 12), decode=noisy(30, 4))
    )
    assert gate("prefill > 5%", table).startswith("prefill is ")
    assert gate("prefill > 50%", table) == gate("decode>1%", table) == ""
    for wrong in ("prefill", "nothing > 5%", "prefill < 5%"):
        with pytest.raises(InputError, match="is not WHAT > PERCENT%"):
            gate(wrong, table)


def test_intervals_hold_the_median_of_what_they_were_drawn_from():
    inside = sum(low <= 10 <= high for low, high in (stats.median_interval(noisy(25, seed)) for seed in range(100)))
    assert inside >= 85
    assert np.isnan(stats.median_interval(np.array([1.0, 2.0]))).all()
    assert stats.median_interval(noisy(25, 0)) == stats.median_interval(noisy(25, 0))


def test_the_command_on_saved_runs(tmp_path):
    model, kwargs = small_llava()
    for name in ("one", "two"):
        profkit.trace(model, kwargs, out=tmp_path / name, repeat=4, profile=False)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    result = CliRunner().invoke(cli.cli, ["compare", *paths, "--json"])
    found = json.loads(result.stdout)["comparisons"][0]
    assert {row["what"] for row in found["rows"]} >= {"vision", "prefill", "decode", "total", "a new token"}
    assert found["not_alike"] == []
    result = CliRunner().invoke(cli.cli, ["compare", *paths, "--fail-if", "total > 900%"], env={"COLUMNS": "160"})
    assert result.exit_code == 0 and "LlavaForConditionalGeneration (two) over" in result.output
    for wrong, status, said in (
        ([paths[0]], 2, "two runs or more"),
        ([paths[0], str(tmp_path)], 2, "not a run directory"),
    ):
        result = CliRunner().invoke(cli.cli, ["compare", *wrong])
        assert result.exit_code == status and said in result.stderr
    assert comparison.measured(sample_runs.load_any(paths[0])).work["new_tokens"].tolist() == [5] * 4


def test_published_figures_say_that_most_of_the_gap_is_output_length():
    """FACTS: 976 ms for 45.5 tokens and 2451 ms for 102.4; of 2301 ms, (102.4 - 45.5) * 2451 / 102.4 = 1361.9 ms."""
    event, video = (read(PUBLISHED / f"{name}.json") for name in ("eventgpt", "video-llava"))
    found = gap(event, video)
    assert (round(found.total_ms, 1), round(found.output_length_ms, 1)) == (2301.0, 1361.9)
    assert "output length makes most of it" in found.sentence("EventGPT", "Video-LLaVA")
    assert any("published" in said for said in unlike(event, video))


def test_files_that_hold_no_figures(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "a"}')
    with pytest.raises(InputError, match="neither a run's directory nor a file of figures"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"name": "a", "stages_ms": {"vison": 1}, "unsplit_ms": 2, "new_tokens": 3}')
    with pytest.raises(InputError, match="there are no stages vison"):
        read(tmp_path / "a.json")


def with_samples(base: Measured, ids, contents, scale=1.0) -> Measured:
    return replace(base, ids=list(ids), contents=list(contents), times=base.times * scale)


def test_samples_of_one_name_and_other_content_are_no_pairs():
    times = [100.0, 200.0, 300.0, 400.0]
    base = with_samples(measured(decode=times), "abcd", ["1", "2", "3", "4"])
    same = with_samples(measured(decode=times), "abcd", ["1", "2", "", "4"], 1.1)
    assert compare(base, same).loc["decode", "ratio"] == pytest.approx(1.1) and unlike(base, same) == []
    other = with_samples(measured(decode=times), "abcd", ["9", "2", "3", "4"])
    assert unlike(base, other) == ["contents: 1 of 4 samples have one id and other files or prompts"]


def test_the_sentence_is_of_the_samples_that_the_table_is_of():
    base = with_samples(measured(decode=[100.0, 200.0, 300.0, 5000.0, 6000.0, 7000.0]), "abcxyz", [""] * 6)
    other = with_samples(measured(decode=[100.0, 200.0, 300.0]), "abc", [""] * 3)
    assert gap(base, other).total_ms == 0
    assert unlike(base, other) == ["samples: 6 and 3, 3 ids in both"]


def test_work_that_differs_sample_by_sample_is_seen_behind_equal_medians():
    base = with_samples(measured(decode=[1.0] * 3), "abc", [""] * 3)
    one, two = (replace(base, work=base.work.assign(prompt_tokens=tokens)) for tokens in ([5, 6, 7], [7, 6, 5]))
    assert unlike(one, two) == ["prompt tokens: other in 2 of 3 samples"]


def test_a_stage_that_some_samples_have_not_is_compared_where_it_is():
    base = with_samples(measured(prefill=[5.0] * 4, decode=[10.0] * 4), "abcd", [""] * 4)
    half = replace(base, times=pd.DataFrame({"prefill": [5.0] * 4, "decode": [12.0, 0.0, 12.0, 12.0]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(base, half).loc["decode", "ratio"] == pytest.approx(1.2)
        assert compare(half, base).loc["decode", "ratio"] == pytest.approx(1 / 1.2)


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"unsplit_ms": "nan"}, {"stages_ms": {"load": -1}}])
def test_published_figures_that_cannot_be(tmp_path, wrong):
    told = {"name": "a", "stages_ms": {"load": 1}, "unsplit_ms": 2, "new_tokens": 3}
    (tmp_path / "a.json").write_text(json.dumps({**told, **wrong}))
    with pytest.raises(InputError, match="must be numbers of ms, not negative, and new_tokens more than none"):
        read(tmp_path / "a.json")


def test_a_gate_sees_every_run_also_of_one_directory_name(tmp_path):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, repeat=6, profile=False, work=False)
    for name in ("base", "x/run", "y/run"):
        run.save(tmp_path / name)
    slow = measured(name="slow", prefill=noisy(20, 1, level=20.0))
    _, *others = comparison.told_apart([measured(prefill=noisy(20, 0)), slow, slow])
    assert [one.name for one in others] == ["2: slow", "3: slow"]
    result = CliRunner().invoke(cli.cli, ["compare", *(str(tmp_path / one) for one in ("base", "x/run", "y/run"))])
    assert "2: " in result.output and "3: " in result.output
