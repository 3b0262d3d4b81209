"""The base model of an experiment and its tokenizer, as its config asks for them."""

import dataclasses
import functools

import jax.numpy as jnp
from jax.sharding import Mesh

from ip_jax.lab.experiment import ModelConfig
from ip_jax.models import hub
from ip_jax.models.quantised import quantise
from ip_jax.prompts.chat import end_ids, with_thinking
from ip_jax.training.sharding import base_shardings, param_shardings


def load_tokenizer(model: ModelConfig):
    """The tokenizer that every prompt and conversation of an experiment is rendered with. Raises as
    `hub.load_tokenizer` and `with_thinking`.
    """
    return with_thinking(hub.load_tokenizer(model.name, model.revision), model.thinking)


def stop_ids(model: ModelConfig, tokenizer) -> tuple[int, ...]:
    """Every token at which a completion ends, in evaluations, rollouts and chats alike."""
    return end_ids(tokenizer, hub.end_ids(model.name, model.revision))


def load_base(model: ModelConfig, mesh: Mesh) -> hub.Pretrained:
    """Reads the weights straight to their places on the mesh, then quantises them there if that is
    asked for; the tokenizer as `load_tokenizer`.

    Raises as `hub.load_pretrained` and `with_thinking`.
    """
    pretrained = hub.load_pretrained(
        model.name,
        jnp.dtype(model.weights),
        model.revision,
        functools.partial(param_shardings, mesh),
    )
    pretrained = dataclasses.replace(
        pretrained, tokenizer=with_thinking(pretrained.tokenizer, model.thinking)
    )
    if model.quantised is None:
        return pretrained
    return dataclasses.replace(
        pretrained,
        params=quantise(
            pretrained.params, model.quantised, functools.partial(base_shardings, mesh)
        ),
    )
