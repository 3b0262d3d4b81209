"""The base model of an experiment, as its config asks for it, on a mesh."""
import dataclasses
import functools

import jax.numpy as jnp
from jax.sharding import Mesh

from ip_jax.models import hub
from ip_jax.models.quantised import quantise
from ip_jax.settings.experiment import ModelConfig
from ip_jax.training.sharding import base_shardings, param_shardings


def load_base(model: ModelConfig, mesh: Mesh) -> hub.Pretrained:
    """Reads the weights straight to their places on the mesh, then quantises them there if that is asked for.

    Raises as `hub.load_pretrained` and `quantise`.
    """
    pretrained = hub.load_pretrained(model.name, jnp.dtype(model.weights), model.revision, functools.partial(param_shardings, mesh))
    if model.quantised is None:
        return pretrained
    return dataclasses.replace(pretrained, params=quantise(pretrained.params, model.quantised, functools.partial(base_shardings, mesh)))
