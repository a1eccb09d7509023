"""What the command line runs: a model by its name, its inputs, and the job that is done with both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profkit.command import quiet_libraries
from profkit.errors import InputError
from profkit.options import new_directory, parse_parts, parse_sensor, parse_size, parse_steps, parse_window

if TYPE_CHECKING:
    from rich.progress import Progress

    from profkit.anatomy import Anatomy
    from profkit.models import Loaded
    from profkit.ranks import Ranks
    from profkit.run import Run
    from profkit.sample_lists import Item
    from profkit.sample_runs import SampleRun
    from profkit.samples import Reading, Sample
    from profkit.work import Work

Options = dict[str, Any]
"""The options of a command as click gives them; see command.model_options."""
Report = Callable[[str], object]


def measure(name: str, inputs: Sequence[str], out: Path | None, options: Options, progress: Report) -> Run:
    """Trace a model and save the run."""
    steps, budget_bytes = parse_steps(options["profile_steps"]), parse_size(options["trace_budget"])
    check_length(options)
    if options["profile"] and min(steps) >= options["max_new_tokens"]:
        raise InputError(
            f"--profile-steps {options['profile_steps']}: {options['max_new_tokens']} new tokens take the steps 0 to "
            f"{options['max_new_tokens'] - 1}; choose from those, or raise --max-new-tokens."
        )
    target = _target(name, out, options, progress)
    from profkit import scalars

    if options["tensorboard"]:
        scalars.require()
    loaded = _load(name, options, progress)
    sample = _sample(loaded, inputs, options)
    chosen = {key: options[key] for key in ("profile", "warmup", "repeat", "granularity", "seed", "work", "energy")}
    result = _traced(
        name, loaded, sample, options, progress, profile_steps=steps, trace_budget_bytes=budget_bytes, **chosen
    )
    result.save(target, options["force"])
    if options["tensorboard"]:
        scalars.write_scalars(result, target / "tensorboard")
    return result


def check_length(options: Options) -> None:
    """Raise InputError if the least output is longer than the most."""
    least, most = options.get("min_new_tokens"), options["max_new_tokens"]
    if least is not None and least > most:
        raise InputError(f"--min-new-tokens {least} is more than --max-new-tokens {most}.")


def verify(name: str, inputs: Sequence[str], out: Path | None, options: Options, progress: Report) -> Run:
    """Trace a model, make the experiments, and return the run, saved with every verdict."""
    target = _target(name, out, options, progress)
    from profkit import passes, verification

    loaded = _load(name, options, progress)
    sample = _sample(loaded, inputs, options)
    given = passes.prepared(sample) if sample else loaded.generate_kwargs or {}
    result = _traced(
        name, loaded, sample, options, progress, work=False, **{key: options[key] for key in ("repeat", "seed")}
    )
    kwargs = {**given, **_generate_options(loaded, options)}
    verification.verify(loaded.model, kwargs, result, options["repeat"], progress)
    result.save(target, options["force"])
    return result


def _target(name: str, out: Path | None, options: Options, progress: Report) -> Path:
    """Return where the run goes, which is asked before anything is loaded."""
    quiet_libraries()
    progress("importing torch and transformers")
    from profkit import directories

    target = out or new_directory(name)
    directories.check_target(target, options["force"])
    return target


def _traced(name: str, loaded: Loaded, sample: Sample | None, options: Options, progress: Report, **plan: Any) -> Run:
    from profkit import tracing

    about: dict[str, Any] = {"model": name, "weights": "random" if loaded.random_weights else "as loaded"}
    about["model_load_ms"] = loaded.load_ms
    if sample:
        about |= {"inputs": sample.hashes(), "media_items": sample.media_items}
    return tracing.trace(
        loaded.model,
        loaded.generate_kwargs,
        sample=sample,
        options=_generate_options(loaded, options),
        manifest=about,
        parts=parse_parts(options["part"]),
        progress=progress,
        **plan,
    )


def measure_samples(
    name: str, items: Sequence[Item], target: Path, options: Options, here: Ranks, bar: Progress
) -> SampleRun:
    """Load the model and measure this rank's share of the samples, showing how far it is."""
    from profkit import sampling, structure

    task = bar.add_task(f"loading {name}", total=len(here.share(items)), failed=0)
    loaded = _load(name, options, lambda what: None)
    if loaded.processor is None:
        raise InputError(f"{name} comes without a processor, which --samples needs.")
    parts = parse_parts(options["part"])
    structure.find(loaded.model, parts)  # so that a wrong --part is no sample's error
    shown = f"{name}, rank 0 of {here.world}" if here.world > 1 else name
    plan = sampling.Plan(
        options["max_new_tokens"],
        options["prompt"],
        _generate_options(loaded, options),
        **{key: options[key] for key in ("warmup", "granularity", "seed", "fail_fast")},
        resume=options["resume"] or here.restarted,
        parts=parts,
        reading=_reading(options),
        progress=lambda done, total, failed: bar.update(
            task, description=shown, completed=done, total=total, failed=failed
        ),
    )
    about = {"model": name, "weights": "random" if loaded.random_weights else "as loaded"}
    manifest = sampling.describe(loaded.model, plan, {**about, "samples": str(options["listed"])})
    return sampling.measure(loaded.model, loaded.processor, items, target, plan, manifest, here)


def inspect(
    name: str, inputs: Sequence[str], options: Options, progress: Report
) -> tuple[Anatomy, Any, list[dict[str, Any]]]:
    """Load the model and return its anatomy, the table of its parts and its capabilities."""
    quiet_libraries()
    progress("importing torch and transformers")
    from profkit import capabilities, inspection, passes

    loaded = _load(name, options, progress)
    kwargs = dict(loaded.generate_kwargs or {})
    if inputs or hasattr(loaded.processor, "image_processor") or hasattr(loaded.processor, "media"):
        sample = _sample(loaded, inputs, {**options, "max_new_tokens": 4})
        kwargs = passes.prepared(sample) if sample else {}
    progress("watching a short generate()")
    found = inspection.inspect(loaded.model, parts=parse_parts(options["part"]), **kwargs)
    abilities = []
    if options["capabilities"] and kwargs:
        progress("trying what the model can do")
        abilities = [asdict(one) for one in capabilities.measure(loaded.model, found, kwargs)]
    return found, inspection.part_table(loaded.model, found), abilities


def count(name: str, inputs: Sequence[str], options: Options, progress: Report) -> tuple[Work, str]:
    """Count a model's work without running it, nor reading its weights; return it, and the model's dtype."""
    import torch

    from profkit import fakes, models, passes, prompts, structure, workload

    progress(f"making {name} without weights")
    dtype, remote = models.DTYPES.get(options["dtype"]), options["trust_remote_code"]
    # A function of the user's own makes its model itself.
    made = options["weights"] != "real" and ":" not in name
    device, weights = (torch.device("meta"), "random") if made else (torch.device("cpu"), options["weights"])
    loaded = models.load_model(name, device, dtype, weights, remote)
    if options["attention"]:
        models.choose_attention(loaded.model, options["attention"])
    if made:
        loaded.model = fakes.without_weights(loaded.model)
    sample = _sample(loaded, inputs, options)
    given = passes.prepared(sample) if sample else loaded.generate_kwargs or {}
    kwargs = {**given, **_generate_options(loaded, options)}
    progress("counting the work")
    anatomy = structure.find(loaded.model, parse_parts(options["part"]))
    tokens = options["max_new_tokens"] if loaded.generate_kwargs is None else None
    found = workload.count(loaded.model, kwargs, anatomy, new_tokens=tokens)
    config, read = getattr(loaded.model, "config", None), found.about["prompt_tokens"]
    media_tokens = prompts.media_tokens_by_ids(config, kwargs.get("input_ids", kwargs.get("inputs")), read)
    found = replace(found, about={**found.about, "media_tokens": media_tokens})
    return found, str(next(loaded.model.parameters()).dtype).removeprefix("torch.")


def _load(name: str, options: Options, progress: Report) -> Loaded:
    from profkit import models

    device = models.choose_device(options["device"])
    dtype = models.DTYPES.get(options["dtype"])
    progress(f"loading {name}")
    loaded = models.load_model(name, device, dtype, options["weights"], options["trust_remote_code"])
    if options["attention"]:
        models.choose_attention(loaded.model, options["attention"])
    return loaded


def _sample(loaded: Loaded, inputs: Sequence[str], options: Options) -> Sample | None:
    from profkit import samples

    if loaded.generate_kwargs is not None:
        if inputs or options["prompt"] is not None:
            raise InputError(f"{loaded.name} brings its own generate_kwargs: leave INPUTS and --prompt out.")
        return None
    if loaded.processor is None:
        raise InputError(
            f"{loaded.name} comes without a processor or tokenizer, so no inputs can be made for it: save its "
            "processor beside it, or give package.module:function, which returns (model, generate_kwargs). "
            f"(transformers said: {loaded.why_no_processor})"
        )
    files = [Path(one) for one in inputs]
    return samples.sample_for(
        loaded.processor,
        loaded.model,
        files,
        options["prompt"],
        options["max_new_tokens"],
        reading=_reading(options),
    )


def _reading(options: Options) -> Reading:
    from profkit.samples import Reading

    return Reading(parse_window(options["event_window"]), parse_sensor(options["sensor"]))


def _generate_options(loaded: Loaded, options: Options) -> dict[str, Any]:
    """Return what is added to generate()'s arguments; those of the user's own function stay as they are."""
    if loaded.generate_kwargs is not None:
        return {}
    chosen: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"]}
    if loaded.random_weights:
        # Random weights may emit the end token at any time: all passes shall do the same work.
        chosen |= {"min_new_tokens": options["max_new_tokens"], "do_sample": False}
    if options.get("cache"):
        chosen["cache_implementation"] = options["cache"]
    if options.get("min_new_tokens") is not None:
        chosen["min_new_tokens"] = options["min_new_tokens"]
    return chosen
