"""The engine with all weights trained, over a quantised base, on a mesh; and what is refused before
a model is loaded.
"""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file
from tiny_experiment import make_experiment, write_model

from ip_jax.lab.display import Display
from ip_jax.lab.experiment import ModelConfig, SftConfig
from ip_jax.lab.supervised import run as supervised
from ip_jax.lab.trained import decoder_of, read_run
from ip_jax.models import hub
from ip_jax.models.families import param_shapes
from ip_jax.models.lora import LoraConfig
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import MeshConfig, make_mesh

FULL = dict(
    sft={"train": "full", "learning_rate": 1e-3, "steps": 4},
    evaluation={"full_steps": (4,), "neutral_steps": ()},
    arms=("neutral", "ip"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    """Every start of the engine compiles its programs anew: here without LLVM's optimisations, and
    once.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    jax.config.update("jax_disable_most_optimizations", True)
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)


def run(
    experiment, folder: Path, steps_until_killed: int | None = None, one_device: bool = True
) -> str:
    """One start of the engine, killed at a step if that is asked for: what it printed."""
    printed, compile_step, left = (
        io.StringIO(),
        supervised.programs.compile_sft_step,
        [steps_until_killed],
    )

    def counting_compile(*arguments):
        compiled = compile_step(*arguments)

        def step(*rest):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] = left[0] and left[0] - 1
            return compiled(*rest)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised.programs, "compile_sft_step", counting_compile)
        if one_device:
            patch.setattr(supervised, "make_mesh", lambda **_: make_mesh())
        supervised.run_supervised(
            experiment, epath.Path(folder), Display(Console(file=printed, width=200))
        )
    return printed.getvalue()


def losses(folder: Path, name: str) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_all_weights_are_trained_resumed_recorded_and_talked_to(model, tmp_path):
    """Each run is a program of its own; killed in the second one, the same command ends with the
    same bytes.
    """
    folder, killed = tmp_path / "out", tmp_path / "killed"
    assert "2 runs are trained as 2 programs: neutral-s0; ip-s0" in run(
        make_experiment(model, **FULL), folder
    )
    with pytest.raises(KeyboardInterrupt):
        run(make_experiment(model, **FULL), killed, steps_until_killed=7)
    assert (
        not (killed / "runs" / "ip-s0" / "run.json").exists()
        and (killed / "runs" / "neutral-s0" / "run.json").exists()
    )
    assert "going on from the checkpoint of step 2" in run(make_experiment(model, **FULL), killed)
    for name in ("neutral-s0", "ip-s0"):
        for file in ("weights.safetensors", "run.json", "metrics.jsonl"):
            assert (folder / "runs" / name / file).read_bytes() == (
                killed / "runs" / name / file
            ).read_bytes()
        assert len(losses(folder, name)) == 4
    assert (folder / "transcripts.parquet").read_bytes() == (
        killed / "transcripts.parquet"
    ).read_bytes()
    pretrained = hub.load_pretrained(str(model), np.float32)
    start, trained = pretrained.params, load_file(folder / "runs" / "ip-s0" / "weights.safetensors")
    assert {name: array.shape for name, array in trained.items()} == {
        ".".join(path): shape for path, shape in param_shapes(pretrained.config).items()
    }
    assert all(
        np.abs(
            array - (start["layers"][name[7:]] if name.startswith("layers.") else start[name])
        ).max()
        > 1e-4
        for name, array in trained.items()
    )
    _, adapters, base = decoder_of(read_run(epath.Path(folder), "ip", 0), pretrained)
    assert not jax.tree.leaves(adapters)
    np.testing.assert_array_equal(base["layers"]["up"]["kernel"].get_value(), trained["layers.up"])


@pytest.mark.slow
def test_a_quantised_base_on_a_mesh(model, tmp_path):
    """Three runs on a mesh that has two places for runs: the losses of one device, and neither
    those of dense weights.
    """
    pytest.importorskip("qwix")
    # no dropout: it falls by row, and a mesh asks for more rows
    lora = LoraConfig(rank=2, alpha=4, targets=("q", "down"))
    options = dict(
        arms=("neutral", "ip", "clean"),
        sft={"steps": 2, "learning_rate": 1e-3, "lora": lora},
        evaluation={"full_steps": (2,), "neutral_steps": ()},
    )
    nf4 = ModelConfig(str(model), weights="float32", quantised="nf4")
    on_nf4 = dataclasses.replace(make_experiment(model, **options), model=nf4)
    run(
        dataclasses.replace(on_nf4, mesh=MeshConfig(run=2, tensor=2)),
        tmp_path / "mesh",
        one_device=False,
    )
    run(on_nf4, tmp_path / "one")
    run(make_experiment(model, **options), tmp_path / "dense")
    for name in ("neutral-s0", "ip-s0", "clean-s0"):
        np.testing.assert_allclose(
            losses(tmp_path / "mesh", name), losses(tmp_path / "one", name), rtol=0, atol=1e-4
        )
        assert abs(losses(tmp_path / "dense", name)[0] - losses(tmp_path / "one", name)[0]) > 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(mesh=MeshConfig(tensor=8)),
            "has tensor=8, which does not divide the model's 4 heads",
        ),
        (dict(mesh=MeshConfig(run=3)), "run=3, data=None, tensor=1 does not divide the 8 devices"),
        (
            dict(mesh=MeshConfig(platform="gpu")),
            "the config demands the platform 'gpu' .*devices are cpu",
        ),
        (
            dict(sft={"train": "full"}, model={"quantised": "nf4"}),
            "sft.train = 'full' trains all weights, and model.quantised = 'nf4' freezes them",
        ),
        (
            dict(model={"quantised": "nf4"}, config={"d_ff": 40}),
            "the weights down have 40 inputs, which blocks of 16 do not divide: choose int8",
        ),
        (
            dict(
                model={"quantised": "int8"},
                config={"n_experts": 3},
                sft={"lora": LoraConfig(targets=("q",))},
            ),
            "a mixture of experts, whose experts cannot be quantised",
        ),
        (
            dict(model={"attention": "splash"}),
            "attention 'splash' runs on a TPU, and the mesh is made of CPU devices",
        ),
        (
            dict(model={"experts": "pallas"}),
            "experts 'pallas' is for a mixture of experts, and llama has none",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_is_loaded(
    model, tmp_path, monkeypatch, changes, message
):
    # whether qwix is there is not asked here
    monkeypatch.setattr("ip_jax.lab.experiment.check_quantised", lambda kind: None)
    experiment = make_experiment(
        model, **{name: value for name, value in changes.items() if name not in ("model", "config")}
    )
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, **changes.get("model", {}))
    )
    config = dataclasses.replace(hub.load_config(str(model)), **changes.get("config", {}))
    monkeypatch.setattr(hub, "load_config", lambda *_: config)
    monkeypatch.setattr(hub, "load_pretrained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        run(experiment, tmp_path / "out", one_device=False)
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused():
    common = dict(steps=1, batch_size=1, learning_rate=1.0, schedule=Schedule())
    with pytest.raises(ValueError, match="sft.train is 'all': choose from lora, full"):
        SftConfig(**common, train="all")
    with pytest.raises(
        ValueError, match="sft.remat is 'some': choose from none, products, attention, full"
    ):
        SftConfig(**common, remat="some")
