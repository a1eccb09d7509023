"""FLOPs of the full-size presets against closed forms, and what counting takes; ceilings over three runs.

    python tests/benchmarks/work.py [--tokens 32] [--presets llava-1.5-7b …]

Every preset is counted in a process of its own, on fake weights, on this CPU: time and peak of that process, from the
import on. Closed forms are those of CLIP and Llama, from the preset's sizes: 2 FLOPs a multiply-add, attention whole.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

PRESETS = ("llava-1.5-7b", "video-llava-7b", "eventgpt-7b")
OPTIONS = {
    **dict.fromkeys(("dtype", "weights"), "auto"),
    **dict.fromkeys(("prompt", "event_window", "sensor", "attention")),
    "trust_remote_code": False,
    "part": (),
}
ALLOWED_S, ALLOWED_MISS, ALLOWED_SPREAD = 60.0, 0.01, 0.05


def llama(config: dict[str, Any], tokens: int, context: int) -> int:
    """Return the FLOPs of a Llama's layers over `tokens`, the last of which sees `context`: 2·n·weights + attention."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    linear = 2 * width**2 + 2 * width * width * shared // heads + 3 * width * inner
    return int(config["num_hidden_layers"] * (2 * tokens * linear + 4 * tokens * context * width))


def clip(config: dict[str, Any], images: int) -> int:
    """Return the FLOPs of a CLIP tower: patches, then layers over the patches and the class token."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    patches = (config["image_size"] // patch) ** 2
    tokens = patches + 1
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return int(images * (2 * patches * width * 3 * patch**2 + config["num_hidden_layers"] * layer))


def forms(preset: dict[str, Any], prompt: int, images: int) -> dict[str, int]:
    """Return the closed forms of a preset: vision, prefill and the first decode step."""
    config = preset["config"]
    text, vision = config.get("text_config", config), config.get("vision_config") or config["visual_tower"]
    return {
        "vision": clip(vision, images),
        "prefill": llama(text, prompt, prompt),
        "decode step": llama(text, 1, prompt + 1),
    }


def counted(name: str, tokens: int) -> dict[str, Any]:
    """Count a preset in this process and return the figures."""
    begin = time.perf_counter()
    from profkit import jobs

    work, dtype = jobs.count(name, (), {**OPTIONS, "max_new_tokens": tokens}, lambda what: None)
    decoder = work.decoder_steps()["flops"]
    found = {"vision": work.stages()["flops"]["vision"], "prefill": decoder[0], "decode step": decoder[1]}
    return {
        "flops": {key: int(value) for key, value in found.items()},
        "prompt": work.about["prompt_tokens"],
        "dtype": dtype,
        "counted": work.about["steps_counted"],
        "seconds": time.perf_counter() - begin,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(name: str, tokens: int) -> dict[str, Any]:
    """Return counted() of a fresh process."""
    command = [sys.executable, __file__, "--count", name, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(name: str, tokens: int) -> list[str]:
    """Return the lines of the table for one preset."""
    text = (resources.files("profkit") / "data" / "presets" / f"{name}.json").read_text(encoding="utf-8")
    found, images = in_a_process(name, tokens), {"video-llava-7b": 8, "eventgpt-7b": 5}.get(name, 1)
    ok = "ok" if found["seconds"] <= ALLOWED_S else "MISSED"
    lines = [
        f"{name}: {found['prompt']} prompt tokens, {tokens} new, {found['counted']} steps counted, "
        f"{found['seconds']:.1f} s (at most {ALLOWED_S:g}: {ok}), peak {found['peak_mb']:.0f} MB, {found['dtype']}"
    ]
    for what, form in forms(json.loads(text), found["prompt"], images).items():
        flops = found["flops"][what]
        miss = flops / form - 1
        ok = "ok" if abs(miss) <= ALLOWED_MISS else "MISSED"
        lines.append(f"    {what:12} {flops:>18,} closed form {form:>18,} {miss:+8.3%}   {ok}")
    return lines


def ceilings_lines(runs: int = 3) -> list[str]:
    """Return each ceiling of this machine over several runs, and how far they lie apart."""
    import torch

    from profkit import roofline_text, stress

    every = [stress.measured(torch.device("cpu")) for _ in range(runs)]
    lines = [f"ceilings of {every[0].device_name}, {every[0].threads} threads, over {runs} runs"]
    for rows in zip(*(one.rows() for one in every), strict=True):
        what, unit = rows[0][0], rows[0][1]
        medians = [row[2].median for row in rows]
        apart = max(medians) / min(medians) - 1
        inside = max(row[2].spread for row in rows)
        ok = "ok" if apart <= ALLOWED_SPREAD else "noisy machine" if inside > ALLOWED_SPREAD else "MISSED"
        amounts = "  ".join(f"{roofline_text.amount(value, unit):>12}" for value in medians)
        lines.append(f"    {what:24} {amounts}   apart {apart:6.1%}, rounds of a run {inside:6.1%}   {ok}")
    return lines


def main() -> None:
    """Print the table and write it to results/work.txt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--count", help="count one preset in this process and print JSON")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(counted(options.count, options.tokens)))
        return
    lines = [line for name in options.presets for line in rows_of(name, options.tokens)] + ceilings_lines()
    text = "\n".join(lines) + "\n"
    print(text, end="")
    (Path(__file__).parent / "results" / "work.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
