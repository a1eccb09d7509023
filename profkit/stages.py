"""The vocabulary of stages: what generate() spends its time on, in the order it is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One of the four stages of the classic split: load, preprocess, vision, language model."""

    number: int
    title: str


LOAD = Group(1, "Load")
PREPROCESS = Group(2, "Preprocess")
ENCODE = Group(3, "Vision encoding")
LLM = Group(4, "LLM")

GROUPS = (LOAD, PREPROCESS, ENCODE, LLM)


@dataclass(frozen=True)
class Stage:
    """A kind of work. Every instant of a run belongs to exactly one stage."""

    name: str
    group: Group
    meaning: str
    colour: str
    """As it is drawn, on light and on dark."""


STAGES = (
    Stage("load", LOAD, "reading and decoding the input files", "#8a8f98"),
    Stage("preprocess", PREPROCESS, "the processor: resize, normalise, tokenise", "#b08d57"),
    Stage("transfer", PREPROCESS, "moving the inputs from host to device", "#cdb58c"),
    Stage("vision", ENCODE, "the vision tower", "#2f7ed8"),
    Stage("audio", ENCODE, "the audio tower", "#17a2b8"),
    Stage("projector", ENCODE, "the connector between tower and language model", "#74b3f7"),
    Stage("merge", ENCODE, "feature packing, pooling and splicing outside modules", "#9b8cf0"),
    Stage("setup", LLM, "generate()'s own preparation and the inputs of each step", "#c06c84"),
    Stage("embed", LLM, "the token embedding", "#e3a79a"),
    Stage("prefill", LLM, "the decoder stack over the prompt", "#e8590c"),
    Stage("decode", LLM, "the decoder stack, one pass for each further step", "#f3a024"),
    Stage("head", LLM, "the language-model head", "#d6336c"),
    Stage("select", LLM, "logits processing, sampling and stopping", "#7cb342"),
    Stage("other", LLM, "the rest: what no scope explains", "#6c757d"),
)

NAMES = tuple(stage.name for stage in STAGES)
INDEX = {name: number for number, name in enumerate(NAMES)}
BY_NAME = {stage.name: stage for stage in STAGES}

MEDIA = ("vision", "audio", "projector")
"""Stages whose output is spliced into the prompt: what follows them, before the decoder, is `merge`."""
