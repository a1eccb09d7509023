"""The vocabulary of stages: what generate() spends its time on, in the order it is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One of the four stages of the classic split: load, preprocess, vision, language model."""

    number: int
    name: str
    title: str


LOAD = Group(1, "load", "Load")
PREPROCESS = Group(2, "preprocess", "Preprocess")
ENCODE = Group(3, "encode", "Vision encoding")
LLM = Group(4, "llm", "LLM")

GROUPS = (LOAD, PREPROCESS, ENCODE, LLM)


@dataclass(frozen=True)
class Stage:
    """A kind of work. Every instant of a run belongs to exactly one stage."""

    name: str
    group: Group
    meaning: str
    colour: str


STAGES = (
    Stage("load", LOAD, "reading and decoding the input files", "#8c8c8c"),
    Stage("preprocess", PREPROCESS, "the processor: resize, normalise, tokenise", "#b39b6b"),
    Stage("transfer", PREPROCESS, "moving the inputs from host to device", "#9c755f"),
    Stage("vision", ENCODE, "the vision tower", "#4e79a7"),
    Stage("audio", ENCODE, "the audio tower", "#76b7b2"),
    Stage("projector", ENCODE, "the connector between tower and language model", "#a0cbe8"),
    Stage("merge", ENCODE, "feature packing, pooling and splicing outside modules", "#86bcb6"),
    Stage("setup", LLM, "generate()'s own preparation and the inputs of each step", "#d4a6c8"),
    Stage("embed", LLM, "the token embedding", "#f1ce63"),
    Stage("prefill", LLM, "the decoder stack over the prompt", "#e15759"),
    Stage("decode", LLM, "the decoder stack, one pass for each further step", "#f28e2b"),
    Stage("head", LLM, "the language-model head", "#ffbe7d"),
    Stage("select", LLM, "logits processing, sampling and stopping", "#59a14f"),
    Stage("other", LLM, "the rest: what no scope explains", "#bab0ac"),
)

NAMES = tuple(stage.name for stage in STAGES)
INDEX = {name: number for number, name in enumerate(NAMES)}
BY_NAME = {stage.name: stage for stage in STAGES}

MEDIA = ("vision", "audio", "projector")
"""Stages whose output is spliced into the prompt: what follows them, before the decoder, is `merge`."""
