"""The models profkit can make or load: presets, checkpoints, and functions of the user's own."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from profkit import eventgpt, processors
from profkit.errors import InputError, ProfkitError

WEIGHTS_SEED = 0
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
)
PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "LlavaForConditionalGeneration": processors.llava,
    "VideoLlavaForConditionalGeneration": processors.video_llava,
    "EventGPT": processors.eventgpt,
}
"""For presets with random weights, by architecture."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready to run, with its processor, or with complete generate() arguments instead."""

    name: str
    model: nn.Module
    processor: Any = None
    generate_kwargs: Mapping[str, Any] | None = None
    random_weights: bool = False
    load_ms: float = 0.0
    why_no_processor: str = ""


def preset_names() -> list[str]:
    """Return the names of the presets."""
    folder = resources.files("profkit") / "data" / "presets"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_model(
    spec: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Return the model that MODEL names: a preset, `package.module:function`, a directory or a hub id.

    `weights` is for presets: "random" makes them, "real" wants those of the checkpoint on this machine,
    "auto" takes real ones where a preset has any. Raises InputError with the cure.
    """
    begin = time.perf_counter()
    if spec in preset_names():
        loaded = _preset(spec, device, dtype, weights)
    elif ":" in spec:
        loaded = _from_function(spec, device, dtype)
    elif Path(spec).exists() or "/" in spec:
        loaded = _checkpoint(spec, device, dtype, trust_remote_code)
    else:
        near = difflib.get_close_matches(spec, preset_names(), n=3, cutoff=0.3) or preset_names()
        raise InputError(
            f"There is no preset {spec!r} (nearest: {', '.join(near)}), and no directory of that name; "
            "a model of your own is given as package.module:function."
        )
    loaded.load_ms = (time.perf_counter() - begin) * 1000
    return loaded


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the accelerator if there is one. Raises InputError."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"Unknown device {name!r}: try cpu, cuda, cuda:1, xpu or mps.") from error
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.type:
        there = "no accelerator" if found is None else f"only {found.type}"
        raise InputError(f"--device {name}: torch {torch.__version__} sees {there} on this machine; try --device cpu.")
    if (device.index or 0) >= torch.accelerator.device_count():
        raise InputError(f"--device {name}: there are {torch.accelerator.device_count()} {device.type} device(s) here.")
    return device


def choose_attention(model: nn.Module, kernel: str) -> None:
    """Let a model use another attention kernel. Raises InputError if it cannot."""
    try:
        model.set_attn_implementation(kernel)  # type: ignore[operator]
    except AttributeError as error:
        raise InputError(
            f"{type(model).__name__} has no attention kernels to choose: leave --attention out."
        ) from error
    except (ImportError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{type(model).__name__} cannot use --attention {kernel}: {said}") from error


def _preset(name: str, device: torch.device, dtype: torch.dtype | None, weights: str) -> Loaded:
    path = resources.files("profkit") / "data" / "presets" / f"{name}.json"
    preset = json.loads(path.read_text(encoding="utf-8"))
    dtype = dtype or DTYPES[preset["dtype"]]
    if preset["hub_id"] and weights != "random":
        try:
            loaded = _from_pretrained(preset["hub_id"], device, dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The weights of {name} ({preset['hub_id']}) are not on this machine: download them there, give a "
                "directory that holds them as MODEL, or pass --weights random for random ones."
            ) from error
        loaded.name = name
        return loaded
    if weights == "real":
        raise InputError(f"Preset {name} has no real weights; leave --weights out.")
    model_class = getattr(transformers, preset["architecture"], None) or getattr(eventgpt, preset["architecture"])
    config = model_class.config_class(**preset["config"])
    processor = PROCESSORS[preset["architecture"]](config)
    return Loaded(name, random_model(model_class, config, device, dtype), processor, random_weights=True)


def random_model(model_class: Any, config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model with random weights of a fixed seed, made on the device in the wanted dtype."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(WEIGHTS_SEED)
        model = model_class._from_config(config, dtype=dtype)
    return model.eval()


def _checkpoint(spec: str, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool) -> Loaded:
    folder = Path(spec)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{spec} has no config.json: give the directory of a checkpoint that save_pretrained() wrote.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{spec} is a file: give a preset, the directory of a checkpoint, or package.module:function.")
    try:
        if folder.is_dir() and _model_type(folder) == eventgpt.EventGPTConfig.model_type:
            return _eventgpt(folder, device, dtype)
        return _from_pretrained(spec, device, dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(f"Cannot load the checkpoint {spec}: {first}") from error


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _eventgpt(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    """Load a released checkpoint of EventGPT, which transformers does not know."""
    model = eventgpt.from_checkpoint(folder, dtype).to(device)
    tokenizer, why_not = _tokenizer(folder)
    if tokenizer is None:
        return Loaded(folder.name, model, why_no_processor=why_not)
    return Loaded(folder.name, model, processors.eventgpt(model.config, tokenizer))


def _from_pretrained(spec: str, device: torch.device, dtype: torch.dtype | None, **options: Any) -> Loaded:
    config = transformers.AutoConfig.from_pretrained(spec, **options)
    auto_class = _auto_class(config)
    if device.type == "meta":
        # Shapes alone: the weights are not read.
        chosen = {} if dtype is None else {"dtype": dtype}
        with device:
            model = auto_class.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")), **chosen)
    else:
        model = auto_class.from_pretrained(spec, dtype=dtype or "auto", **options)
    processor, why_not = _processor(spec, options)
    return Loaded(Path(spec).name, model.to(device).eval(), processor, why_no_processor=why_not)


def _processor(spec: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a checkpoint's processor, or its tokenizer if it has no other; if neither loads, None and why."""
    # Where files are missing, transformers raises whatever its next line happens to raise.
    with suppress(Exception):
        return transformers.AutoProcessor.from_pretrained(spec, **options), ""
    return _tokenizer(spec, **options)


def _tokenizer(spec: str | Path, **options: Any) -> tuple[Any, str]:
    """Return a checkpoint's tokenizer; if it does not load, None and why."""
    try:
        return transformers.AutoTokenizer.from_pretrained(spec, **options), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _auto_class(config: Any) -> Any:
    """Return the class that loads a configuration's generative model: the first of AUTO_CLASSES that knows it."""
    known = [found for name in AUTO_CLASSES if (found := getattr(transformers, name, None)) is not None]
    remote = getattr(config, "auto_map", None) or {}
    for auto_class in known:
        if type(config) in auto_class._model_mapping or auto_class.__name__ in remote:
            return auto_class
    raise InputError(f"{type(config).__name__} is no configuration of a model that transformers can generate with.")


def _from_function(spec: str, device: torch.device, dtype: torch.dtype | None) -> Loaded:
    module_name, _, function_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"Cannot import {spec}: {error}; it must be package.module:function.") from error
    try:
        result = function()
    except ProfkitError:
        raise
    except Exception as error:
        raise InputError(f"{spec} itself failed: {type(error).__name__}: {error}") from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise InputError(f"{spec} must return (model, generate_kwargs) or (model, processor), got {_kind(result)}.")
    model, second = result
    if dtype is not None or device != torch.device("cpu"):
        model = model.to(device=device, dtype=dtype)
    if isinstance(second, Mapping):
        return Loaded(function_name, model, generate_kwargs=_on_device(second, device))
    if not callable(second) and not hasattr(second, "media"):
        raise InputError(f"{spec} returned {_kind(second)} beside the model: want generate_kwargs or a processor.")
    return Loaded(function_name, model, second)


def _on_device(kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}


def _kind(value: Any) -> str:
    inner = ", ".join(type(one).__name__ for one in value) if isinstance(value, tuple) else ""
    return f"({inner})" if inner else type(value).__name__
