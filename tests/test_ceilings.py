"""Ceilings: measured with a clock of the test's, kept by device, damaged files, datasheets."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from test_roofline import ceilings, exactly

from profkit import ceilings as kept
from profkit import datasheets, stress
from profkit.ceilings import Ceiling, Ceilings
from profkit.cli import cli
from profkit.errors import InputError


class SlowMachine:
    """A clock that moves as work is done: so many seconds a unit."""

    def __init__(self, seconds=0.01):
        self.time_s, self.seconds = 0.0, seconds

    def now(self):
        return self.time_s

    def work(self):
        self.time_s += self.seconds


def test_a_round_is_long_enough_and_counts_one_execution():
    machine = SlowMachine(0.003)
    bench = stress.Bench(torch.device("cpu"), machine.now, rounds=4)
    begin = machine.time_s
    assert bench.seconds(machine.work) == pytest.approx([0.003] * 4)
    assert machine.time_s - begin > 4 * stress.ROUND_S


def test_rounds_keep_their_spread():
    found = Ceiling.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.median, found.p10, found.p90, found.rounds) == (3.0, 1.4, 4.6, 5)
    assert found.spread == pytest.approx(3.2 / 3)


def test_a_real_machine(monkeypatch):
    monkeypatch.setattr(stress, "ROUND_S", 1e-4)
    monkeypatch.setattr(stress, "ROUNDS", 3)
    monkeypatch.setattr(stress, "COPY_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(stress, "LARGEST", {"cpu": 64})
    found = stress.measured(torch.device("cpu"))
    assert set(found.flops_per_s) == {"bfloat16", "float16", "float32"}
    assert all(1e6 < one.median < 1e15 for one in found.flops_per_s.values())
    assert 1e7 < found.bytes_per_s < 1e13 and 1e-8 < found.launch_s.median < 1e-2
    assert found.upload_bytes_per_s is None and found.driver == ""
    assert Ceilings.from_record(json.loads(json.dumps(found.to_record()))) == found


def test_what_a_device_refuses_is_a_note(monkeypatch):
    monkeypatch.setattr(stress, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(stress, "_memory", lambda bench: (exactly(1.0), exactly(2.0)))
    monkeypatch.setattr(stress, "_launch", lambda bench: exactly(1.0))

    def product(bench, dtype):
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for\nbfloat16")
        return exactly(3.0)

    monkeypatch.setattr(stress, "_product", product)
    found = stress.measured(torch.device("cpu"))
    assert found.peak("float32") == 3.0 and found.peak("bfloat16") != found.peak("bfloat16")
    assert found.notes == ("bfloat16 was not measured: not implemented for bfloat16",)


def test_they_are_kept_by_device_driver_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = ceilings()
    path = kept.file_of(one.device_name, one.driver, one.torch, one.threads)
    assert path.parent == tmp_path / "profkit" / "ceilings"
    assert len({path, *(kept.file_of(*key) for key in (("a", "", "", 1), ("a", "b", "", 1), ("a", "", "", 2)))}) == 4
    assert kept.read(path) == (None, "")
    assert kept.write(one, path) == ""
    assert kept.read(path) == (one, "")
    assert kept.kept_for("Test Device", "2.x", threads=99) == one
    assert kept.kept_for("Test Device", "3.x", threads=4) is None
    assert kept.kept_for("Test Device", "2.x", threads=99, driver=one.driver) == one
    assert kept.kept_for("Test Device", "2.x", threads=99, driver="another") is None
    cpu = ceilings(device="cpu", device_name="A processor")
    kept.write(cpu, kept.file_of(cpu.device_name, cpu.driver, cpu.torch, cpu.threads))
    assert kept.kept_for("A processor", "2.x", threads=4) == cpu
    assert kept.kept_for("A processor", "2.x", threads=5) is None


def spoilt(**changes):
    return json.dumps({**ceilings().to_record(), **changes})


def rate(**changes):
    return {"median": 1e9, "p10": 1e9, "p90": 1e9, "rounds": 3, **changes}


SPOILT = [
    *(spoilt(copy_bytes_per_s=rate(median=one)) for one in ("fast", None, 0, -1, float("nan"), float("inf"))),
    *(spoilt(flops_per_s=one) for one in ({"float32": rate(p90=None)}, {"float32": 1e12}, [])),
    *(spoilt(device_name=5), spoilt(threads="many"), spoilt(measured_unix="x"), spoilt(notes=[1]), spoilt(notes="a")),
    *(spoilt(upload_bytes_per_s=rate(rounds=0)), spoilt(launch_s=rate(more=1))),
]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"schema": 1}', '{"schema": 99}', "\x00", *SPOILT])
def test_a_damaged_file_is_said_and_measured_again(text, tmp_path, monkeypatch):
    path = tmp_path / "ceilings.json"
    path.write_text(text)
    found, said = kept.read(path)
    assert found is None and "damaged" in said and "\n" not in said
    monkeypatch.setattr(stress, "file_of", lambda device: path)
    monkeypatch.setattr(stress, "measured", lambda device, progress: ceilings())
    done = CliRunner().invoke(cli, ["roofline", "--device", "cpu"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "damaged" in done.stdout
    assert kept.read(path)[0] == ceilings()


def test_those_of_another_device_are_said_and_measured_again(tmp_path, monkeypatch):
    path = tmp_path / "ceilings.json"
    kept.write(ceilings(device_name="Elsewhere 9000"), path)
    monkeypatch.setattr(stress, "file_of", lambda device: path)
    monkeypatch.setattr(stress, "measured", lambda device, progress: ceilings())
    done = CliRunner().invoke(cli, ["roofline", "--device", "cpu"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "holds the ceilings of Elsewhere 9000" in done.stdout
    assert kept.read(path)[0] == ceilings()


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in kept.write(ceilings(), tmp_path / "file" / "x.json")


def test_records_of_something_else_are_refused():
    with pytest.raises(InputError, match="no ceilings"):
        Ceilings.from_record({**ceilings().to_record(), "launch_s": 3})


def test_known_and_unknown_devices(monkeypatch, tmp_path):
    sheet = datasheets.datasheet("NVIDIA H100 80GB HBM3 ")
    assert sheet.flops_per_s["bfloat16"] == 989.4e12 and sheet.bytes_per_s == 3.35e12
    assert datasheets.datasheet("Test Device") is None
    assert all(name == name.lower() for name in datasheets.DATASHEETS)
    assert "bfloat16" not in datasheets.datasheet("Tesla T4").flops_per_s
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = ceilings(device_name="NVIDIA H100 80GB HBM3", upload_bytes_per_s=exactly(5e10))
    for found, wanted in ((known, "NVIDIA H100 datasheet, SXM"), (ceilings(), "no datasheet of this device")):
        monkeypatch.setattr(stress, "measured", lambda device, progress, found=found: found)
        done = CliRunner().invoke(cli, ["roofline", "--device", "cpu", "--again"], env={"COLUMNS": "160"})
        assert done.exit_code == 0 and wanted in done.stdout
    rows = {what: stated for what, _, _, stated in known.rows()}
    assert rows["bfloat16 matrix product"] == 989.4e12 and rows["host to device"] != rows["host to device"]
    said = json.loads(CliRunner().invoke(cli, ["roofline", "--device", "cpu", "--json"]).stdout)
    assert said["rows"][0]["datasheet"] is None and said["device_name"] == "Test Device"


def test_noise_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    noisy = ceilings(launch_s=Ceiling(1.0, 0.9, 1.1, 5))
    monkeypatch.setattr(stress, "measured", lambda device, progress: noisy)
    done = CliRunner().invoke(cli, ["roofline", "--device", "cpu", "--again"], env={"COLUMNS": "160"})
    assert "20.0%" in done.stdout and "noisy" in done.stdout
