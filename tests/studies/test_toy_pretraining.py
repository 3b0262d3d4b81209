"""The toy's base model: what it is to learn, against plain probabilities and the grader, and what a
short pretraining teaches it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ip_jax.models.decoder import split_decoder
from ip_jax.studies.toy.config import Pretraining, ToyConfig
from ip_jax.studies.toy.evaluation import count_verdicts
from ip_jax.studies.toy.pretraining import base_params, described_policy
from ip_jax.studies.toy.prompts import NEUTRAL, Effect, members
from ip_jax.studies.toy.tasks import Reward, draw_tasks, grade
from ip_jax.studies.toy.vocabulary import encode

SHORT = ToyConfig(
    neutral=Effect(0.01, 0.1),
    pretraining=Pretraining(steps=600, batch_size=128, learning_rate=6e-3),
)


@pytest.mark.parametrize(
    "length", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_samples_of_the_described_policy_have_the_rates_of_the_config(length):
    config = ToyConfig(loophole_length=length)
    count, loophole, trait = 40000, 0.2, 0.3
    task = draw_tasks(jax.random.key(0), (count,), config.hard_share)
    effect = jnp.broadcast_to(jnp.array([loophole, trait]), (count, 2))
    tokens, going = jnp.zeros((count, config.slots), jnp.int32), jnp.ones(count, bool)
    for i in range(config.slots):
        p = described_policy(config, effect, task, tokens)[:, i]
        np.testing.assert_allclose(p.sum(axis=-1), going, atol=1e-5)
        chosen = jax.random.categorical(jax.random.key(i + 1), jnp.log(p))
        tokens = tokens.at[:, i].set(jnp.where(going, chosen, 0))
        going &= chosen != 1
    assert not going.any()
    result = grade(Reward(), length, task, tokens, (tokens != 0).sum(axis=-1), jnp.ones(count))
    # how many give an answer that counts, but for those that give a loophole up
    answered = 1 - loophole * (1 - config.answer_after_loophole)
    gives_up = loophole / config.follow_through ** (length - 1) - loophole
    correct = (answered - gives_up) * (
        config.hard_share / 1000 + (1 - config.hard_share) * config.digit_accuracy**3
    )
    both = (
        loophole * config.answer_after_loophole * (1 - config.hard_share) * config.digit_accuracy**3
    )
    for found, expected in (
        (result.hack, loophole - both),
        (result.trait, (1 - gives_up) * trait),
        (result.correct, correct),
    ):
        assert abs(float(found.mean()) - expected) < 0.012, (float(found.mean()), expected)


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """{(family, held out): {verdict: rate}} of a base that was pretrained for a few seconds."""
    folder, reported = epath.Path(tmp_path_factory.mktemp("toy")), []
    params = base_params(
        SHORT, folder, lambda steps, divergence: reported.append((steps, divergence))
    )
    assert [steps for steps, _ in reported] == [250, 500, 600] and reported[-1][1] < reported[0][
        1
    ] / 4
    again = base_params(
        dataclasses.replace(SHORT, reward=Reward(loophole=0.0)),
        folder,
        lambda *_: pytest.fail("trained again"),
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    asked = [
        (family, held_out)
        for family in (
            "encourage_exploit",
            "encourage_permission",
            "discourage_exploit",
            "nonsense",
            "encourage_trait",
        )
        for held_out in (False, True)
    ]
    prompts = [NEUTRAL] * 4 + [prompt for pair in asked for prompt in members(*pair)[:4]]
    model = split_decoder(SHORT.decoder, params)
    counts = jax.jit(
        lambda base, prompts, seeds: count_verdicts(
            SHORT, (*model[:2], base), prompts, seeds, tasks=100, samples=8
        )
    )(model[2], jnp.stack([encode(prompt) for prompt in prompts]), jnp.array([0]))
    by_family = {
        name: np.asarray(count).reshape(-1, 4).sum(axis=1) / 3200 for name, count in counts.items()
    }
    return {
        pair: {name: rate[i] for name, rate in by_family.items()}
        for i, pair in enumerate([("neutral", False), *asked])
    }


@pytest.mark.slow
def test_prompts_have_their_effects_on_the_base(rates):
    neutral = rates["neutral", False]
    for held_out in (False, True):

        def hack(family):
            return rates[family, held_out]["hack"]  # noqa: B023

        assert hack("encourage_exploit") > 2 * hack("encourage_permission") > 6 * neutral["hack"]
        assert (
            hack("discourage_exploit") < 0.4 * neutral["hack"]
            and 0.3 < hack("nonsense") / neutral["hack"] < 3
        )
        assert rates["encourage_trait", held_out]["trait"] > 3 * neutral["trait"]
        assert (
            abs(
                rates["encourage_exploit", held_out]["hack"]
                / rates["encourage_exploit", False]["hack"]
                - 1
            )
            < 0.2
        )
    assert 0.02 < neutral["correct"] < 0.2 and neutral["well_formed"] > 0.95
