"""Baselines and aggregations against the formulae of TRL, in torch, and exact expectations on a
policy that can be enumerated.

The formulae are those of trl/trainer/grpo_trainer.py and rloo_trainer.py (huggingface/trl, version
1): the group's deviation is torch.std, with n - 1 in its denominator, and 1e-4 is added to it
(`scale_rewards`); `loss_type` grpo is the mean over sequences of their token means, bnpo the token
mean of a (micro) batch, dr_grpo the sum of tokens over sequences * max_completion_length; RLOO
subtracts the mean of the others.
"""

import enumerable
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ip_jax.rl import advantages as adv
from ip_jax.rl.advantages import Aggregation, aggregation_weights

RUNS, GROUPS, OF_GROUP, SLOTS = 2, 3, 5, 7
ALL = np.ones((RUNS, GROUPS, OF_GROUP), bool)

take = jax.jit(adv.advantages, static_argnames="baseline")
weigh = jax.jit(aggregation_weights, static_argnames=("slots", "aggregation"))


def grpo(rewards: torch.Tensor) -> torch.Tensor:
    return dr_grpo(rewards) / (rewards.std(dim=-1, keepdim=True) + 1e-4)


def dr_grpo(rewards: torch.Tensor) -> torch.Tensor:
    return rewards - rewards.mean(dim=-1, keepdim=True)


def rloo(rewards: torch.Tensor) -> torch.Tensor:
    return rewards - (rewards.sum(dim=-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)


PUBLISHED = {"group_mean_std": grpo, "group_mean": dr_grpo, "leave_one_out": rloo}


def random_rewards(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, (RUNS, GROUPS, OF_GROUP)).astype(np.float32)


@pytest.mark.parametrize("baseline", PUBLISHED)
def test_group_baselines_equal_trl(baseline):
    rewards = random_rewards()
    np.testing.assert_allclose(
        take(rewards, ALL, baseline),
        PUBLISHED[baseline](torch.tensor(rewards)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("baseline", PUBLISHED)
def test_invalid_samples_are_left_out_of_their_group(baseline):
    rewards, valid = random_rewards(1), ALL.copy()
    # three, one and no valid samples are left
    valid[0, 0, [1, 4]] = valid[1, 2, :4] = valid[1, 1] = False
    rewards[~valid] = np.nan
    found = np.asarray(take(rewards, valid, baseline))
    expected = np.zeros_like(found)
    for place in np.ndindex(RUNS, GROUPS):
        if valid[place].sum() > 1:
            expected[place][valid[place]] = PUBLISHED[baseline](
                torch.tensor(rewards[place][valid[place]])
            )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[~valid].any() and not found[1, 1:].any()
    np.testing.assert_array_equal(
        adv.zero_variance(rewards, valid), [[False] * 3, [False, True, True]]
    )


@pytest.mark.parametrize("baseline", PUBLISHED)
def test_groups_of_equal_rewards_get_exactly_zero(baseline):
    rewards = np.full((1, 2, 7), 0.1, np.float32)  # in float32 the mean of seven is another number
    rewards[0, 1, 0], rewards[0, 1, 1:] = np.nan, 1e6 / 3
    valid = ~np.isnan(rewards)
    np.testing.assert_array_equal(take(rewards, valid, baseline), np.zeros(rewards.shape))
    assert adv.zero_variance(rewards, valid).all()
    # the smallest difference is one
    rewards[0, 0, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    assert np.any(take(rewards, valid, baseline)[0, 0] != 0)


def test_reinforce_without_a_baseline_and_with_a_moving_mean():
    rewards, valid = random_rewards(2), ALL.copy()
    valid[0, 1, 2] = False
    rewards[0, 1, 2] = np.nan
    np.testing.assert_array_equal(take(rewards, valid, "none"), np.where(valid, rewards, 0))
    moving = np.array([0.5, -2.0], np.float32)
    np.testing.assert_array_equal(
        take(rewards, valid, "moving_mean", moving),
        np.where(valid, rewards - moving[:, None, None], 0),
    )


def test_moving_mean_is_plain_at_first_and_exponential_then():
    moving, means, expected = jnp.zeros(RUNS), [], np.zeros(RUNS)
    for iteration in range(9):
        rewards, valid = random_rewards(iteration), ALL.copy()
        valid[0, 0, iteration % OF_GROUP] = False
        rewards[~valid] = np.nan
        moving = jax.jit(adv.update_moving_mean)(moving, rewards, valid, iteration, 0.75)
        means.append(np.nanmean(np.float64(rewards), axis=(1, 2)))
        expected = np.mean(means, axis=0) if iteration < 4 else 0.75 * expected + 0.25 * means[-1]
        np.testing.assert_allclose(moving, expected, rtol=1e-5)
    # no valid sample
    kept = adv.update_moving_mean(moving, np.full_like(rewards, np.nan), ~ALL, 9, 0.75)
    np.testing.assert_array_equal(kept, moving)


def test_penalty_is_added_after_normalisation_and_not_centred():
    rewards = random_rewards(3)
    rewards[0, 0] = 1.0
    kl = np.abs(random_rewards(4))
    finished = take(rewards, ALL, "group_mean_std")
    found = adv.kl_penalised(finished, kl, 0.1)
    np.testing.assert_allclose(found, np.asarray(finished) - 0.1 * kl, rtol=1e-6)
    # a group of equal rewards has the penalty alone
    np.testing.assert_allclose(found[0, 0], -0.1 * kl[0, 0], rtol=1e-6)


@pytest.mark.parametrize("baseline", adv.BASELINES)
def test_advantages_carry_no_gradient(baseline):
    rewards = random_rewards()

    def of_advantages(r):
        return jnp.sum(adv.advantages(r, ALL, baseline, jnp.ones(RUNS)) ** 2)

    def of_penalised(r):
        return jnp.sum(adv.kl_penalised(rewards, r, 0.1) ** 2)

    for found in (of_advantages, of_penalised):
        np.testing.assert_array_equal(jax.grad(found)(rewards), np.zeros(ALL.shape))


@pytest.mark.parametrize(
    "baseline, factor", [("leave_one_out", 1), ("group_mean", 2 / 3), ("none", 1)]
)
def test_expected_update_of_plain_recontextualization(baseline, factor):
    """Centred: factor * Cov(R, grad log p(y | x_t)) under x_g. Not centred: besides that, mean(R) *
    -grad KL(p(. | x_g) || p(. | x_t)).
    """
    sampled, trained, members = enumerable.table(0), enumerable.table(1), enumerable.groups(3)
    rewards = np.random.default_rng(2).integers(0, 3, len(enumerable.SEQUENCES)).astype(float)
    p, score = enumerable.probabilities(sampled), enumerable.scores(trained)
    covariance = (p * rewards) @ score - (p @ rewards) * (p @ score)
    distillation = -(p @ rewards) * enumerable.kl_gradient(sampled, trained)
    with jax.enable_x64(True):
        found = adv.advantages(
            jnp.array(rewards[members])[None], jnp.ones((1, *members.shape), bool), baseline
        )[0]
    found = enumerable.expected_update(np.asarray(found) / 3, members, sampled, trained)
    np.testing.assert_allclose(
        found, factor * covariance + (distillation if baseline == "none" else 0), atol=1e-8
    )
    assert np.abs(distillation).max() > 0.01


def random_tokens(seed: int = 0):
    """Lengths [R, Q, G] and token losses [R, Q, G, C] with rubbish behind the ends."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, SLOTS + 1, ALL.shape), rng.standard_normal((*ALL.shape, SLOTS)).astype(
        np.float32
    )


def trl_loss(
    loss: np.ndarray, length: np.ndarray, loss_type: str, max_completion_length: int = 0
) -> float:
    """TRL's reduction of one batch of sequences: loss [B, C], length [B]."""
    loss = torch.tensor(loss, dtype=torch.float64)
    mask = torch.arange(loss.shape[1]) < torch.tensor(length)[:, None]
    if loss_type == "grpo":
        return ((loss * mask).sum(-1) / mask.sum(-1)).mean().item()
    if loss_type == "bnpo":
        return ((loss * mask).sum() / mask.sum()).item()
    return ((loss * mask).sum() / (loss.shape[0] * max_completion_length)).item()


LOSS_TYPES = {
    "grpo": Aggregation("seq_mean_token_mean"),
    "bnpo": Aggregation("token_mean"),
    "dr_grpo": Aggregation("seq_mean_token_sum_norm", max_length=20),
}


@pytest.mark.parametrize("some_invalid", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_aggregation_equals_trl_over_the_valid_samples(loss_type, some_invalid):
    length, loss = random_tokens()
    valid = ALL.copy()
    if some_invalid:
        valid[0, :, 1] = valid[1, 0] = False
    found = jnp.sum(weigh(length, valid, SLOTS, LOSS_TYPES[loss_type]) * loss, axis=(1, 2, 3))
    expected = [
        trl_loss(loss[r][valid[r]], length[r][valid[r]], loss_type, 20) for r in range(RUNS)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sum_of_tokens_is_the_normalised_one_without_its_norm():
    length, _ = random_tokens(1)
    summed, normed = (
        weigh(length, ALL, SLOTS, a)
        for a in (Aggregation("seq_mean_token_sum"), LOSS_TYPES["dr_grpo"])
    )
    np.testing.assert_allclose(summed, 20 * np.asarray(normed), rtol=1e-6)
    np.testing.assert_allclose(summed[length == SLOTS], 1 / (GROUPS * OF_GROUP), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 4, GROUPS * OF_GROUP])  # 4 does not divide 15
def test_chunks_reproduce_the_mean_of_micro_batches(chunk):
    length, loss = random_tokens(2)
    valid = ALL.copy()
    valid[1, 0] = valid[0, 2, 3] = False  # of run 1 the first chunk of 3 or 4 has nobody
    found = jnp.sum(
        weigh(length, valid, SLOTS, Aggregation("token_mean_per_chunk", chunk=chunk)) * loss,
        axis=(1, 2, 3),
    )
    expected = []
    for r in range(RUNS):
        flat_length, flat_loss, flat_valid = (
            length[r].reshape(-1),
            loss[r].reshape(-1, SLOTS),
            valid[r].reshape(-1),
        )
        means = []
        for start in range(0, GROUPS * OF_GROUP, chunk):
            keep = np.flatnonzero(flat_valid[start : start + chunk]) + start
            if keep.size:
                means.append(trl_loss(flat_loss[keep], flat_length[keep], "bnpo"))
        expected.append(np.mean(means))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_chunks_lie_between_the_mean_of_sequences_and_the_mean_of_tokens():
    length, _ = random_tokens(3)
    per_chunk = {
        n: np.asarray(weigh(length, ALL, SLOTS, Aggregation("token_mean_per_chunk", chunk=n)))
        for n in (1, 5, 15)
    }
    np.testing.assert_allclose(
        per_chunk[1], weigh(length, ALL, SLOTS, Aggregation("seq_mean_token_mean")), rtol=1e-6
    )
    np.testing.assert_allclose(
        per_chunk[15], weigh(length, ALL, SLOTS, Aggregation("token_mean")), rtol=1e-6
    )
    assert np.abs(per_chunk[5] - per_chunk[15]).max() > 1e-3


GLOBAL = [*LOSS_TYPES.values(), Aggregation("seq_mean_token_sum")]


@pytest.mark.parametrize("aggregation", GLOBAL, ids=lambda a: a.kind)
def test_global_weights_do_not_depend_on_padding_or_order(aggregation):
    length, _ = random_tokens(4)
    valid = np.random.default_rng(5).random(ALL.shape) < 0.8
    weights = np.asarray(weigh(length, valid, SLOTS, aggregation))
    padded = np.asarray(weigh(length, valid, SLOTS + 4, aggregation))
    np.testing.assert_array_equal(padded[..., :SLOTS], weights)
    assert not padded[..., SLOTS:].any()
    order = np.random.default_rng(6).permutation(GROUPS * OF_GROUP)

    def shuffle(x):
        return x.reshape(RUNS, GROUPS * OF_GROUP, -1)[:, order].reshape(x.shape)

    np.testing.assert_array_equal(
        weigh(shuffle(length), shuffle(valid), SLOTS, aggregation), shuffle(weights)
    )


@pytest.mark.parametrize(
    "aggregation", [*GLOBAL, Aggregation("token_mean_per_chunk", chunk=4)], ids=lambda a: a.kind
)
def test_runs_without_a_valid_sample_have_no_weight(aggregation):
    length, _ = random_tokens(7)
    assert not np.any(weigh(length, ~ALL, SLOTS, aggregation))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="mean"), "aggregation kind is 'mean': choose from token_mean, "),
        (dict(kind="token_mean_per_chunk"), "needs a chunk of at least 1"),
        (dict(kind="token_mean_per_chunk", chunk=0), "needs a chunk of at least 1"),
        (dict(kind="token_mean", chunk=8), "no other kind has one"),
        (dict(kind="seq_mean_token_sum_norm"), "needs a max_length of at least 1"),
        (dict(kind="seq_mean_token_sum", max_length=64), "no other kind has one"),
    ],
)
def test_an_aggregation_without_meaning_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Aggregation(**fields)


def test_a_baseline_without_meaning_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            "baseline is 'mean': choose from none, moving_mean, leave_one_out, group_mean,"
            " group_mean_std"
        ),
    ):
        adv.check_baseline("mean", 8)
    for baseline in adv.GROUP_BASELINES:
        adv.check_baseline(baseline, 2)
        with pytest.raises(
            ValueError, match=f"'{baseline}' compares the samples of a group, and groups have 1"
        ):
            adv.check_baseline(baseline, 1)
    adv.check_baseline("moving_mean", 1)
