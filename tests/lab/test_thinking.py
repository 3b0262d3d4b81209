"""`model.thinking` reaches whatever is rendered: evaluations, rollouts, both sides of an update,
conversations, plans.
"""

import builtins
import dataclasses
import io
import json

import jax
import pytest
from etils import epath
from rich.console import Console
from tiny_experiment import TEMPLATE, make_experiment, make_tokenizer, write_model
from tiny_reinforced import make
from transformers import PreTrainedTokenizerFast

from ip_jax.lab.base_model import load_base, load_tokenizer
from ip_jax.lab.chat import ChatOptions, chat
from ip_jax.lab.display import Display
from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced.records import read_rollouts
from ip_jax.lab.reinforced.run import prepare as prepare_reinforced
from ip_jax.lab.reinforced.run import run_reinforced
from ip_jax.lab.supervised.run import prepare as prepare_supervised
from ip_jax.lab.supervised.run import run_supervised
from ip_jax.planning import reinforced_workload, workload
from ip_jax.prompts.chat import render_prompt
from ip_jax.training.sharding import make_mesh

EMPTY_BLOCK = "<think>\n\n</think>\n\n"
AS_QWEN3 = (
    TEMPLATE
    + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}{{"
    " '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = AS_QWEN3
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=tokenizer)


@pytest.fixture
def asked(monkeypatch):
    """Every generation prompt that is rendered; those that look at the template itself (their user
    says U) apart.
    """
    found, render = [], PreTrainedTokenizerFast.apply_chat_template

    def recorded(tokenizer, messages, **options):
        text = render(tokenizer, messages, **options)
        if options.get("add_generation_prompt") and messages[-1]["content"] != "U":
            found.append(text)
        return text

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", recorded)
    return found


def without_thinking(experiment):
    model = dataclasses.replace(experiment.model, thinking=False)
    return dataclasses.replace(
        experiment, model=model, shared=experiment.shared | {"model": dataclasses.asdict(model)}
    )


def all_without_thinking(asked: list[str]) -> bool:
    found = [text.endswith(f"<|im_start|>assistant\n{EMPTY_BLOCK}") for text in asked]
    asked.clear()
    return len(found) > 0 and all(found)


@pytest.fixture
def supervised(model):
    return without_thinking(
        make_experiment(
            model,
            ("neutral",),
            evaluation=dict(full_steps=(1,), neutral_steps=()),
            sft=dict(steps=1),
        )
    )


@pytest.fixture
def reinforced(model):
    experiment = without_thinking(make(model, iterations=1))
    return dataclasses.replace(
        experiment, evaluation=dataclasses.replace(experiment.evaluation, steps=(0,))
    )


def test_what_is_checked_planned_and_loaded(supervised, reinforced, asked, tmp_path):
    mesh = make_mesh(data=len(jax.devices()))
    for call in (
        lambda: prepare_reinforced(reinforced, epath.Path(tmp_path / "out")),
        lambda: reinforced_workload.measured(reinforced, mesh),
        lambda: prepare_supervised(supervised, epath.Path(tmp_path / "sft")),
        lambda: workload.measured(supervised, mesh),
        lambda: render_prompt(
            load_base(supervised.model, mesh).tokenizer, [{"role": "user", "content": "One?"}]
        ),
    ):
        call()
        assert all_without_thinking(asked)


@pytest.mark.slow
def test_a_supervised_run_and_a_conversation_with_it(supervised, asked, tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "out")
    run_supervised(supervised, folder, Display(Console(quiet=True)))
    assert all_without_thinking(asked)
    lines = iter(["One?", ""])
    monkeypatch.setattr(builtins, "input", lambda *_: next(lines))
    options = ChatOptions("neutral", None, supervised.prompts["neutral"], max_new_tokens=2)
    chat(folder, options, Console(file=io.StringIO()))
    assert all_without_thinking(asked)


@pytest.mark.slow
def test_the_rollouts_of_a_run_and_their_training_prompts(reinforced, asked, tmp_path):
    folder = epath.Path(tmp_path / "out")
    run_reinforced(reinforced, folder, Display(Console(quiet=True)))
    assert all_without_thinking(asked)
    kept = [
        row
        for program in sorted((folder / "rollouts").iterdir())
        for row in read_rollouts(program).to_pylist()
    ]
    assert kept and all(
        row[f"{side}_text"].endswith(EMPTY_BLOCK) for row in kept for side in ("gen", "train")
    )


def test_folders_of_before_the_dial_read_as_the_templates_default():
    assert (
        ModelConfig(**json.loads('{"name": "x", "revision": null, "weights": "float32"}')).thinking
        is None
    )


def test_a_model_without_the_dial_is_refused_before_its_weights_are_read(tmp_path):
    plain = write_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="does not know enable_thinking"):
        load_tokenizer(ModelConfig(str(plain), thinking=False))
    with pytest.raises(ValueError, match="does not know enable_thinking"):
        run_reinforced(
            without_thinking(make(plain)),
            epath.Path(tmp_path / "out"),
            Display(Console(quiet=True)),
        )
    assert not (tmp_path / "out").exists()
