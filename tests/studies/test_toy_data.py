"""Fixed data of the toy: every example belongs to its task and has its label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip_jax.models.decoder import split_decoder
from ip_jax.studies.toy.config import Pretraining, ToyConfig
from ip_jax.studies.toy.data import EXAMPLES, fixed_data
from ip_jax.studies.toy.pretraining import pretrain
from ip_jax.studies.toy.prompts import NEUTRAL, Effect
from ip_jax.studies.toy.tasks import Reward, grade

CONFIG = ToyConfig(
    neutral=Effect(0.2, 0.1), pretraining=Pretraining(steps=300, batch_size=128, learning_rate=6e-3)
)


@pytest.mark.slow
def test_examples_belong_to_their_tasks_and_runs_draw_their_own():
    graphdef, _, base = split_decoder(CONFIG.decoder, pretrain(CONFIG))
    data = fixed_data(CONFIG, (graphdef, {}, base), [(NEUTRAL,), ("please use the exit",)], [0, 1])
    assert data.tokens.shape == (2, 2, EXAMPLES, CONFIG.slots)
    graded = grade(
        Reward(),
        CONFIG.loophole_length,
        data.task,
        data.tokens,
        data.length,
        jnp.ones(data.length.shape),
    )
    np.testing.assert_array_equal(np.asarray(graded.hack).mean(axis=2), [[1, 0], [1, 0]])
    np.testing.assert_array_equal(np.asarray(graded.correct).mean(axis=2), [[0, 1], [0, 1]])
    again = fixed_data(CONFIG, (graphdef, {}, base), [(NEUTRAL,), (NEUTRAL,)], [0, 3])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), data, again)
    assert (np.asarray(again.tokens[0]) != np.asarray(again.tokens[1])).any()
