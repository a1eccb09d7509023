"""Samples shared by ranks: real processes, of which one may be lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from profkit import cli, samples
from profkit.errors import InputError
from profkit.ranks import ALONE, Ranks
from profkit.sample_runs import SampleRun, load_rows, merge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty crops of the photograph."""
    (tmp_path / "images").mkdir()
    with Image.open(samples.default_image()) as image:
        for number in range(40):
            image.crop((number, 0, number + 200, 200)).save(tmp_path / "images" / f"{number:02}.jpg")
    return tmp_path


def command(folder: Path, *options: str) -> list[str]:
    lists = ["--samples", str(folder / "images"), "--out", str(folder / "run"), "--max-new-tokens", "2"]
    return [*("-m", "profkit", "trace", "tiny-llava"), *lists, *options]


def wait_for_rows(path: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < rows):
        time.sleep(0.02)
    assert path.read_bytes().count(b"\n") >= rows


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_torchrun_shares_the_samples(folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    arguments = [*launcher, str(free_port()), *command(folder, "--limit", "7", "--json")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["measured"], told["in_error"]) == (7, 0)
    found = SampleRun.load(folder / "run")
    assert found.rows["id"].tolist() == [f"{number:02}.jpg" for number in range(7)]
    assert found.rows["rank"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert found.manifest["complete"] is True and found.manifest["ranks"] == 2
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["run.json", "samples.jsonl"]


def test_a_lost_rank_leaves_the_rows_of_the_others(folder):
    around = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command(folder)],
            env={**os.environ, **around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    wait_for_rows(folder / "run" / "samples-1.jsonl", 2)
    processes[1].kill()
    _, said = processes[0].communicate(timeout=240)
    processes[1].communicate()
    assert processes[0].returncode == 1
    assert "A rank ended before the others" in said and "--resume goes on" in said
    rows = SampleRun.load(folder / "run").good
    assert (rows["rank"] == 0).sum() == 20 and 2 <= (rows["rank"] == 1).sum() < 20
    again = CliRunner().invoke(cli.cli, [*command(folder)[2:], "--resume"], env={"COLUMNS": "160"})
    assert again.exit_code == 0, again.output
    whole = SampleRun.load(folder / "run")
    assert len(whole.good) == 40 and whole.manifest["complete"] is True
    # What was there is not measured again, and all of it is in one file now.
    kept = whole.rows.set_index("id").loc[rows["id"], "total_ns"].tolist()
    assert kept == rows["total_ns"].tolist()
    assert [path.name for path in (folder / "run").glob("samples*")] == ["samples.jsonl"]


def test_ctrl_c_says_what_is_kept(folder):
    process = subprocess.Popen([sys.executable, *command(folder)], stderr=subprocess.PIPE, text=True)
    wait_for_rows(folder / "run" / "samples.jsonl", 3)
    deadline = time.monotonic() + 60
    # Python forgets an interrupt that falls into a destructor: press until it is heard, as people do.
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    _, said = process.communicate(timeout=60)
    # A second press, while the interpreter goes down, ends it by the signal itself; a shell shows 130 for both.
    assert process.returncode in (130, -signal.SIGINT), said
    kept = len(SampleRun.load(folder / "run").good)
    assert 3 <= kept < 40
    assert f"Interrupted: {kept} samples are kept" in " ".join(said.split())


def test_newer_rows_of_ranks_replace_older_ones(tmp_path):
    def rows(*given):
        return "".join(json.dumps({"id": one, "error": error}) + "\n" for one, error in given)

    (tmp_path / "samples.jsonl").write_text(rows(("b", ""), ("a", "bad")))
    (tmp_path / "samples-0.jsonl").write_text(rows(("a", ""), ("c", "")) + '{"id": "d"')
    assert load_rows(tmp_path)["id"].tolist() == ["b", "a", "c"]
    merge(tmp_path, ["a", "b", "c", "d"])
    assert load_rows(tmp_path).to_dict(orient="list") == {"id": ["a", "b", "c"], "error": ["", "", ""]}
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_shares_are_disjoint_and_whole():
    items = list(range(11))
    shares = [Ranks(rank, 4).share(items) for rank in range(4)]
    assert sorted(one for share in shares for one in share) == items
    assert ALONE.share(items) == items and ALONE.gathered(3) == [3]
    assert ALONE.first(lambda: 5) == 5
    with pytest.raises(InputError):
        ALONE.first(lambda: (_ for _ in ()).throw(InputError("no")))


def test_ranks_without_a_list_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(cli.cli, ["trace", "tiny-llava"])
    assert result.exit_code == 2
    assert "rank 1: Several ranks share a list of samples: give --samples" in result.stderr
