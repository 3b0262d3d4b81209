"""A plan of every preset, by formula; and candidates of `--search` as a compiler finds them."""

import dataclasses
import importlib

import jax
import pytest
from rich.console import Console
from test_command import planned

from configs.sft_shapes import PRESETS
from ip_jax.planning import chips, command, search
from ip_jax.planning.programs import TooLarge

SMALL = "--model", "smollm2-135m-instruct"  # in place of models whose tokenizers are on the hub
GENERATED = "--data.eval-sets", "generated"


def presets(config: str) -> list[str]:
    return sorted(importlib.import_module(f"configs.{config}").PRESETS)


PLANS = [
    *(
        pytest.param("sft_shapes", name, (), id=f"sft_shapes {name}")
        for name in presets("sft_shapes")
    ),
    *(pytest.param("rl_shapes", name, (), id=f"rl_shapes {name}") for name in presets("rl_shapes")),
    *(
        pytest.param(
            "gcd_sycophancy",
            name,
            (*SMALL, *GENERATED, "--sft.max-length", "512"),
            id=f"gcd_sycophancy {name}",
            marks=pytest.mark.slow,
        )
        for name in presets("gcd_sycophancy")
    ),
    *(
        pytest.param(
            "gcd_approval",
            name,
            (*SMALL, "--model.thinking", "None", "--algorithm", "grpo"),
            id=f"gcd_approval {name}",
            marks=pytest.mark.slow,
        )
        for name in presets("gcd_approval")
    ),
]


@pytest.mark.parametrize("config, preset, options", PLANS)
def test_every_preset_has_a_plan_that_fits_eight_h200(config, preset, options, capsys, tmp_path):
    said, record = planned(
        capsys, tmp_path, config, "--preset", preset, "--topology", "h200:8", *options
    )
    assert record["fits"] and "fits" in said and "chip-hours" in said
    learns = "update" if config in ("rl_shapes", "gcd_approval") else "step"
    for part in (learns, "prefill", "decoding a token"):
        assert any(part in phase["name"] for phase in record["phases"])
    assert all(
        phase["times"] > 0 and max(phase["seconds"].values()) > 0 and phase["cost"]["flops"] > 0
        for phase in record["phases"]
    )
    assert (
        all(kinds["weights"] > 0 for kinds in record["memory"].values())
        and sum(record["hours"].values()) > 0
    )


def tiny_shapes():
    shapes, change = PRESETS["qwen2-7b"], dataclasses.replace
    small = dict(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    return change(
        shapes,
        hf=change(shapes.hf, **small),
        batches=change(shapes.batches, rows=4, length=64, responses=32),
        questions=change(shapes.questions, prompts=5, length=16),
        evaluation=change(shapes.evaluation, max_new_tokens=8, slots=8),
    )


@pytest.mark.slow
def test_a_compiler_has_the_last_word_on_a_candidate(monkeypatch):
    """Its bytes and FLOPs stand in place of the formulas', and what it refuses comes last."""
    found, real = [], command.compile_step

    def compile_step(workload):
        found.append(real(workload) if found else TooLarge(2e11, 8e10))
        return found[-1]

    monkeypatch.setattr(command, "compile_step", compile_step)
    monkeypatch.setattr(search, "MOST", 3)
    topology = dataclasses.replace(chips.read_topology("h100:8"), devices=jax.devices())
    candidates = command.search(
        command.subject_of(tiny_shapes(), None, "cpu", None), topology, Console(quiet=True)
    )
    assert len(candidates) == len(found) == 3 and all(
        candidate.is_compiled for candidate in candidates
    )
    assert candidates[-1].memory["training"] == 2e11
    by_compiler = {(compiled.memory.peak, compiled.cost.flops) for compiled in found[1:]}
    assert {(c.memory["training"], c.cost.flops) for c in candidates[:-1]} == by_compiler
