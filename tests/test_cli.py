"""The command line as a user meets it: the table, JSON, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import pytest
from builders import small_llava
from click.testing import CliRunner
from PIL import Image

import profkit
from profkit.cli import cli
from profkit.errors import InputError
from profkit.options import parse_steps

pytestmark = pytest.mark.smoke

QUICK = ["--max-new-tokens", "4", "--warmup", "0", "--repeat", "1"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def own_model():
    """What `test_cli:own_model` gives: (model, generate_kwargs)."""
    return small_llava()


def test_the_embedded_default_prints_the_table_and_says_where_it_is(tmp_path):
    status, out, _ = invoke("trace", *QUICK)
    assert status == 0, out
    for words in (
        "1 Load",
        "2 Preprocess",
        "3 Vision encoding",
        "4 LLM",
        "TTFT",
        "TPOT",
        "tokens/s",
        "overhead",
        "dilation",
    ):
        assert words in out
    assert "sums (scopes, stages, steps)" in out and "tokens" in out
    run = next((tmp_path / "traces").iterdir())
    assert run.name.startswith("tiny-llava-")
    assert f"Wrote traces/{run.name}" in out
    table = profkit.load(run).stages()
    assert f"{table['host_ms'].sum():.2f}" in out


def test_json_is_json_alone(tmp_path):
    status, out, _ = invoke("trace", *QUICK, "--json", "--no-profile", "--out", tmp_path / "run")
    assert status == 0
    found = json.loads(out)
    assert sum(row["host_ms"] for row in found["stages"]) == pytest.approx(found["total_ms"])
    assert found["checks"]["same_tokens"] is True
    assert found["dilation"] == []
    assert found["stages"][0]["device_ms"] is None


def test_tensorboard_is_written_if_asked_for(tmp_path, monkeypatch):
    status, out, _ = invoke("trace", *QUICK, "--no-profile", "--tensorboard", "--json")
    assert status == 0
    (made,) = (Path(json.loads(out)["path"]) / "tensorboard").iterdir()
    assert made.name.startswith("events.out.tfevents.")
    monkeypatch.setattr("profkit.scalars.is_installed", lambda: False)
    status, _, err = invoke("trace", *QUICK, "--no-profile", "--tensorboard")
    assert status == 2 and "pip install 'profkit[tensorboard]'" in err


def test_attention_and_cache_are_chosen(tmp_path):
    status, out, _ = invoke(
        "trace", *QUICK, "--no-profile", "--attention", "eager", "--cache", "static", "--out", "run"
    )
    assert status == 0, out
    assert profkit.load("run").manifest["attention"] == "eager"
    status, _, err = invoke("trace", *QUICK, "--attention", "flash_attention_2")
    assert status == 2 and "cannot use --attention flash_attention_2" in err


def test_corrected_times_are_shown_beside_the_others(tmp_path):
    status, out, _ = invoke("trace", *QUICK, "--no-profile", "--corrected")
    assert status == 0
    assert "corrected ms" in out and "less what marks cost" in out
    assert "corrected ms" not in invoke("trace", *QUICK, "--no-profile")[1]
    for more in ((), ("--corrected",)):
        told = json.loads(invoke("trace", *QUICK, "--no-profile", "--json", *more)[1])["stages"]
        assert all(("corrected_ms" in row) == bool(more) for row in told)
    assert all(row["corrected_ms"] <= row["host_ms"] for row in told)


def test_images_and_prompts_of_the_users_own(tmp_path):
    Image.new("RGBA", (50, 80), "red").save(tmp_path / "red.png")
    status, out, _ = invoke("trace", "--model", "tiny-llava", "red.png", "--prompt", "Which colour?", *QUICK, "--json")
    assert status == 0
    manifest = json.loads((tmp_path / json.loads(out)["path"] / "run.json").read_text())
    assert set(manifest["inputs"]) == {"file 1: red.png", "prompt"}


def test_a_checkpoint_directory(tmp_path):
    from builders import tiny_llava

    loaded = tiny_llava()
    loaded.model.save_pretrained(tmp_path / "checkpoint")
    loaded.processor.save_pretrained(tmp_path / "checkpoint")
    status, out, err = invoke("trace", tmp_path / "checkpoint", *QUICK, "--no-profile")
    assert status == 0, err
    assert "checkpoint" in out


def test_a_function_of_the_users_own():
    status, out, err = invoke("trace", "test_cli:own_model", *QUICK, "--granularity", "module")
    assert status == 0, err
    assert "own_model" in out
    assert "1 Load" not in out
    status, _, err = invoke("trace", "test_cli:own_model", "photo.jpg", *QUICK)
    assert status == 2
    assert "leave INPUTS and --prompt out" in err


def plain_module():
    """Not a pair."""
    return small_llava()[0]


def no_generate():
    """A model that cannot generate."""
    return small_llava()[0].model.vision_tower, {}


def broken():
    """A function with a mistake of its own."""
    return 1 / 0


def out_of_memory():
    """A model whose head asks for more than there is."""
    import torch

    model, kwargs = small_llava()
    model.lm_head.forward = lambda x: torch.empty(1 << 50)
    return model, kwargs


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["tiny-lava"], 2, "There is no preset 'tiny-lava' (nearest: tiny-llava"),
        (["missing/checkpoint"], 2, "Cannot load the checkpoint missing/checkpoint"),
        (["tiny-llava", "missing.jpg"], 2, "There is no file missing.jpg"),
        (["tiny-llava", "notes.txt"], 2, "notes.txt is not an image that Pillow can read"),
        (["tiny-llava", "cut.jpg"], 2, "Cannot read the image cut.jpg"),
        (["tiny-llava", "folder"], 2, "Cannot read the image folder"),
        (["folder"], 2, "folder has no config.json"),
        (["notes.txt"], 2, "notes.txt is a file: give a preset"),
        (["no_module_of_this_name:make"], 2, "Cannot import no_module_of_this_name:make"),
        (["test_cli:nothing"], 2, "Cannot import test_cli:nothing"),
        (["test_cli:plain_module"], 2, "must return (model, generate_kwargs) or (model, processor)"),
        (["test_cli:no_generate"], 2, "has no generate()"),
        (["test_cli:out_of_memory"], 1, "ran out of memory on cpu"),
        (["llava-1.5-7b"], 2, "pass --weights random"),
        (["tiny-llava", "--weights", "real"], 2, "has no real weights"),
        (["--prompt", "<image> and <image>"], 2, "The prompt has 2 <image> for 1 image(s)"),
        (["--prompt", "word " * 2000], 2, "room for 4096: shorten the prompt"),
        (["--device", "cuda"], 2, "--device cuda: torch"),
        (["--device", "toaster"], 2, "Unknown device 'toaster'"),
        (["--profile-steps", "4-2"], 2, "is not a list of steps such as 0-4,10"),
        (["--profile-steps", "50"], 2, "; choose from those"),
        (["test_cli:broken"], 2, "test_cli:broken itself failed: ZeroDivisionError"),
        (["--out", "folder"], 2, "folder already exists"),
        (["--out", "notes.txt/run"], 2, "Cannot write notes.txt/run"),
        (["--profile-steps", "0-999999999"], 2, "reaches beyond step 1000000"),
        (["--out", "x" * 300], 2, "is too long for a directory"),
        (["--repeat", "0"], 2, "Invalid value for '--repeat'"),
        (["--granularity", "atom"], 2, "'atom' is not one of"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, status, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:400])
    whole.unlink()
    before = sorted(tmp_path.rglob("*"))
    found, out, err = invoke("trace", *QUICK, *arguments)
    assert found == status, err
    assert words in err.replace("\n", " ")
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def fickle():
    """A model whose tokens differ from call to call."""
    model, kwargs = small_llava()
    plain, count = model.generate, iter(range(100))

    def generate(**kwargs):
        tokens = plain(**kwargs)
        tokens[0, -1] = next(count)
        return tokens

    model.generate = generate
    return model, kwargs


def test_a_failed_check_is_said_and_with_strict_is_exit_status_1(tmp_path):
    status, out, _ = invoke("trace", "test_cli:fickle", *QUICK, "--no-profile")
    assert status == 0 and "FAILED tokens: 1 passes (at most 0 passes)" in out
    status, _, err = invoke("trace", "test_cli:fickle", *QUICK, "--no-profile", "--strict")
    assert status == 1
    assert "these checks failed: " in err and "tokens (1 passes (at most 0 passes))" in err


def test_verify_shows_every_check_of_a_model_and_of_its_run(tmp_path):
    run = tmp_path / "run"
    options = ("--max-new-tokens", "2", "--repeat", "3", "--json")
    status, out, _ = invoke("verify", "tiny-llava", *options, "--out", str(run))
    assert status in (0, 1)  # a busy machine fails the checks of steadiness
    told = json.loads(out)
    by_name = {one["check"]: one for one in told["verdicts"]}
    sure = [name for name in by_name if name.startswith(("sums", "same", "tokens", "capture", "encoded"))]
    # What tensors take of a CPU's memory is not counted.
    assert len(sure) >= 20 and [name for name in sure if not by_name[name]["ok"]] == ["same memory"]
    assert {"decoupled truth: encoding", "delay: vision", "delay: select, elsewhere"} <= set(by_name)
    assert all(by_name[f"delay: {name}"]["ok"] for name in ("vision", "projector", "decoder layer", "head"))
    status, out, _ = invoke("verify", str(run))
    assert "sums: scopes" in out and "0 ns (at most 0 ns)" in out
    kept = [one["check"] for one in profkit.load(run).manifest["checks"]["verdicts"]]
    assert kept == list(by_name)


def test_debug_shows_the_traceback():
    assert "Traceback" in invoke("trace", "tiny-lava", "--debug")[2]


def test_another_profiler_is_said():
    import torch

    with torch.profiler.profile():
        status, _, err = invoke("trace", *QUICK)
    assert status == 2
    assert "Another torch.profiler is recording" in err


def endless():
    """A model that says by a file when its passes have begun."""
    model, kwargs = small_llava()
    model.register_forward_pre_hook(lambda module, args: Path("begun").touch())
    return model, {**kwargs, "max_new_tokens": 10**6, "min_new_tokens": 10**6}


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "profkit", "trace", "test_cli:endless", "--warmup", "0", "--out", "runs/run"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=paths)
    try:
        for _ in range(600):
            if (tmp_path / "begun").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        # Python drops an interrupt that falls into a destructor; one presses Ctrl-C again then.
        for _ in range(12):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        _, err = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Interrupted: nothing was written." in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_steps():
    assert parse_steps("0-4,10") == frozenset([0, 1, 2, 3, 4, 10])
    assert parse_steps(" 7 ") == frozenset([7])
    for wrong in ("", "a", "1-", "-1", "3-2", "1,,2"):
        with pytest.raises(InputError):
            parse_steps(wrong)


def test_every_command_and_option_has_help():
    for name, command in cli.commands.items():
        assert command.help, name
        assert "Example:" in command.help
        for option in command.params:
            if isinstance(option, click.Option) and not isinstance(option.type, click.Choice):
                assert option.help or option.name in ("max_new_tokens", "seed"), option.name


def test_inspect_shows_parts_and_what_the_model_can_do():
    status, out, err = invoke("inspect")
    assert status == 0, err
    for words in ("model.vision_tower", "structure, probe", "0 + 1 + 1", "tokens equal", "keeps a KV cache"):
        assert words in out


def test_inspect_as_json_with_a_part_named():
    named = "model.multi_modal_projector.linear_1"
    _, out, _ = invoke("inspect", "--json", "--no-capabilities", "--part", f"projector={named}")
    found = json.loads(out)
    assert found["roles"]["projectors"] == [named]
    assert found["capabilities"] == []
    part = next(one for one in found["parts"] if one["path"] == named)
    assert (part["found_by"], part["class_name"]) == ("user", "Linear")
    assert part["before"] + part["prefill"] == 1


def test_inspect_a_checkpoint_without_a_processor():
    """The parts can be seen with made-up inputs; what cannot be done is to trace it, and that is said."""
    small_llava()[0].save_pretrained("checkpoint")
    _, out, _ = invoke("inspect", "checkpoint", "--json")
    assert json.loads(out)["notes"] == ["Watched with made-up inputs: noise as image of 4 tokens."]
    status, _, err = invoke("trace", "checkpoint")
    assert status == 2
    assert "comes without a processor or tokenizer" in err


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("tiny-llava", ["resize and normalise", "tokenise"]),
        ("tiny-video-llava", ["resize and normalise", "tokenise"]),
        ("tiny-eventgpt", ["rasterise", "resize and normalise", "tokenise"]),
    ],
)
def test_all_four_stages_of_each_system(tmp_path, model, parts):
    out = tmp_path / "run"
    options = ("--max-new-tokens", "3", "--repeat", "1", "--warmup", "0", "--no-profile", "--out", str(out))
    result = CliRunner().invoke(cli, ["trace", model, *options], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    run = profkit.load(out)
    table = run.breakdown()
    assert set(table["classic_stage"]) == {1, 2, 3, 4}
    assert table["host_ns"].sum() == run.representative.total_ns[run.representative.depth == 0].sum()
    modules = run.modules().set_index("path")
    for name in parts:
        assert name in result.output
        assert modules.loc[f"preprocess().{name}", "stage"] == "preprocess"
    inside = modules.loc[[f"preprocess().{name}" for name in parts], "total_ms"].sum()
    assert inside <= table.loc["preprocess", "host_ms"]


def test_inputs_of_the_wrong_kind(tmp_path):
    from profkit import samples

    image, video = (str(samples.default_file(media)) for media in ("images", "videos"))
    wrong = [("tiny-llava", [video], "is not an image"), ("tiny-eventgpt", [image], "is not an event stream")]
    for model, files, said in [*wrong, ("tiny-video-llava", [video, video], "takes one video, got 2")]:
        result = CliRunner().invoke(cli, ["trace", model, *files, "--out", str(tmp_path / "run")])
        assert result.exit_code == 2
        assert said in result.stderr
