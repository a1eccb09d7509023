"""Every architecture of the zoo, where it is at hand: parts as its truth says, sums exact, tokens equal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import profkit
from profkit.probes import sequences

ZOO = Path(__file__).parent.parent.parent / "shared" / "zoo"
TRUTH = json.loads((ZOO / "truth.json").read_text()) if (ZOO / "truth.json").exists() else {}
ROLES = ("vision_towers", "audio_towers", "projectors", "decoder_layers", "embed", "lm_head")

pytestmark = pytest.mark.skipif(not TRUTH, reason="the zoo is not here")


def build(name):
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return zoo.build(name)


def in_order(value):
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_an_architecture(name):
    model, kwargs = build(name)
    found = profkit.inspect(model, **kwargs)
    roles = found.to_dict()
    assert {role: in_order(roles[role]) for role in ROLES} == {role: in_order(TRUTH[name][role]) for role in ROLES}
    for path, phase in TRUTH[name]["tower_phase"].items():
        tower = next(part for part in found.parts if part.path == path)
        entered_ahead = bool(tower.calls.before) or bool(tower.through)
        assert entered_ahead == (phase == "before_first_forward")

    torch.manual_seed(0)
    plain = sequences(model.generate(**kwargs))
    torch.manual_seed(0)
    with profkit.profile(model, anatomy=found) as prof:
        measured = sequences(model.generate(**kwargs))
    assert torch.equal(plain, measured)
    assert prof.manifest["faults"] == []
    assert prof.manifest["checks"]["encoded"] == {"repeats": [], "not_compared": 0}
    prof.representative.check()
    stages = prof.stages()
    assert stages["host_ns"].sum() == prof.passes[0].generate_ns
    assert stages["host_ms"].get("vision", 0) + stages["host_ms"].get("audio", 0) > 0
