"""What a model's config leaves to the processor, and what is recorded of it."""

import dataclasses
import json

import pytest
from etils import epath

from configs.gcd_approval import STUDY
from ip_jax.lab import experiment
from ip_jax.lab.experiment import ModelConfig, decided
from ip_jax.lab.reinforced import run as reinforced
from ip_jax.lab.run import experiment_of
from ip_jax.lab.supervised import run as supervised
from ip_jax.lab.trained import read_run
from ip_jax.models.placement import cpu_multiplies_bfloat16
from ip_jax.planning.command import subject_of

CPUINFO = "processor\t: 0\nmodel name\t: some CPU\nflags\t\t: fpu avx2 fma{}\nbogomips\t: 4890.86\n"


@pytest.mark.parametrize(
    "listed, expected",
    [
        (" avx512f avx512_bf16 avx512_fp16", True),
        (" amx_tile amx_bf16", True),
        (" avx512f avx512_vnni", False),
    ],
)
def test_a_processor_is_asked_for_its_instructions(tmp_path, listed, expected):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(listed))
    assert cpu_multiplies_bfloat16(str(tmp_path / "cpuinfo")) is expected


def test_of_other_processors_nothing_is_known(tmp_path):
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert not cpu_multiplies_bfloat16(str(tmp_path / "arm")) and not cpu_multiplies_bfloat16(
        str(tmp_path / "nothing")
    )


@pytest.mark.parametrize("able", [True, False])
def test_weights_are_narrow_where_that_is_faster_and_as_asked_where_they_are_named(
    monkeypatch, able
):
    monkeypatch.setattr(experiment, "cpu_multiplies_bfloat16", lambda: able)
    there = {
        platform: decided(ModelConfig(), platform).weights for platform in ("cpu", "gpu", "tpu")
    }
    assert there == {"cpu": "bfloat16" if able else "float32", "gpu": "bfloat16", "tpu": "bfloat16"}
    assert decided(ModelConfig()).weights == there["cpu"], "of this process, whose devices are CPUs"
    assert all(
        decided(ModelConfig(weights=named), "cpu").weights == named
        for named in ("bfloat16", "float32")
    )


@pytest.mark.parametrize("field, value", [("weights", "float8"), ("activations", "auto")])
def test_unknown_dtypes_are_refused_with_those_that_are_known(field, value):
    with pytest.raises(ValueError, match=rf"model.{field} is '{value}': choose from .*bfloat16"):
        ModelConfig(**{field: value})


def test_a_run_records_what_was_decided_here_and_a_plan_plans_for_its_devices(monkeypatch):
    monkeypatch.setattr(experiment, "cpu_multiplies_bfloat16", lambda: False)
    config = STUDY.preset("demo")
    made = experiment_of(STUDY, config)
    assert (
        made.model.weights == made.shared["model"]["weights"] == "float32"
        and config.model.weights == "auto"
    )
    planned = []
    subject_of(config, None, "tpu", lambda config: planned.append(config) or made)
    assert planned[0].model.weights == "bfloat16"


@pytest.mark.parametrize(
    "runner, run",
    [(supervised, supervised.run_supervised), (reinforced, reinforced.run_reinforced)],
)
def test_a_runner_decides_before_anything_is_prepared(monkeypatch, tmp_path, runner, run):
    class Seen(Exception):
        pass

    def prepare(asked, folder):
        raise Seen(asked.model.weights)

    @dataclasses.dataclass(frozen=True)
    class Asked:
        model: ModelConfig

    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(experiment, "cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(Seen, match="float32"):
        run(Asked(ModelConfig()), tmp_path, None)


def test_a_record_that_names_no_dtypes_is_read_as_this_processor_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "cpu_multiplies_bfloat16", lambda: False)
    record = {
        "experiment": "x",
        "seeds": [0],
        "arms": {"untrained": {"label": "untrained"}},
        "config": {"model": {"name": "some-model"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_run(epath.Path(tmp_path), "untrained", None).model.weights == "float32"
