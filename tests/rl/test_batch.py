"""Rows of an update: how they are cut, padded and placed changes no gradient; chunks, selections
and rejected samples equal what they stand for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_models as rl
import tiny_models as tiny
from rl_steps import (
    CONSTANT,
    ONE_ROW,
    assert_same,
    batch_of,
    graded,
    gradients_of,
    options_of,
    step_gradients,
)

from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.batch import Layout
from ip_jax.rl.estimators import ESTIMATORS, Auxiliary, Estimator, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.selection import Selection
from ip_jax.rl.step import compile_rl_step
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, batch_sharding, make_mesh, state_shardings
from ip_jax.training.update import apply_gradients

RUNS, GROUPS, OF_GROUP, SLOTS = 2, 4, 4, 3
GENERATION = ([1, 2, 3], [2, 2], [3], [0, 1, 3, 1])
TRAINING = ([3, 0, 1], [1, 2, 2, 0], [3, 3], [0, 1])
FOUR_ROWS = Layout(tokens_per_micro_batch=RUNS * 4 * (4 + OF_GROUP * SLOTS))  # of four prompt slots
RICH = Algorithm(ESTIMATORS["late_token"], Kl("tt", "loss", "k3", 0.2), entropy_bonus=0.05)
IN_TURN = Algorithm(
    ESTIMATORS["train_old"],
    aggregation=Aggregation("seq_mean_token_mean"),
    epochs=2,
    minibatches=2,
    max_grad_norm=0.5,
)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    # LLVM's; XLA's own passes are untouched
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_rollout(runs: int = RUNS, slots: int = SLOTS, prompt_slots: int = 4):
    """Completions of all lengths, in slots that may be more than they need."""
    samples = rl.random_samples(RUNS, GROUPS, OF_GROUP, SLOTS)

    def wider(x):
        return jnp.pad(x, [(0, 0)] * 3 + [(0, slots - SLOTS)])

    samples = samples.replace(tokens=wider(samples.tokens), log_probs=wider(samples.log_probs))
    rewards = np.random.default_rng(1).normal(size=samples.length.shape)
    of_groups = (
        rl.prompts(*prompts, runs=RUNS, slots=prompt_slots) for prompts in (GENERATION, TRAINING)
    )
    return graded(samples, *of_groups, rewards, temperature=jnp.array([0.7, 1.3], jnp.float32))


def of_runs(tree, runs: slice):
    return jax.tree.map(lambda x: x[runs], tree)


@functools.cache
def in_one_row_each():
    return gradients_of(rl.policy(RUNS)[1], random_rollout(), RICH)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(dict(layout=Layout(tokens_per_micro_batch=100)), marks=pytest.mark.slow),
        dict(layout=Layout(tokens_per_micro_batch=30, samples_per_row=2)),
        pytest.param(dict(layout=Layout(samples_per_row=1)), marks=pytest.mark.slow),
        pytest.param(
            dict(layout=Layout(tokens_per_micro_batch=130, multiple=3)), marks=pytest.mark.slow
        ),
        pytest.param(dict(slots=5, prompt_slots=7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_layout_of_rows_changes_no_gradient(case):
    rollout = random_rollout(
        **{name: case[name] for name in ("slots", "prompt_slots") if name in case}
    )
    assert_same(
        gradients_of(rl.policy(RUNS)[1], rollout, RICH, case.get("layout", ONE_ROW)),
        in_one_row_each(),
        1e-5,
    )


def test_runs_together_equal_runs_alone():
    for run in range(RUNS):
        alone = slice(run, run + 1)
        assert_same(
            gradients_of(
                of_runs(rl.policy(RUNS)[1], alone), of_runs(random_rollout(), alone), RICH
            ),
            in_one_row_each()[alone],
            1e-5,
        )


@pytest.mark.parametrize(
    ("rows", "layout", "minibatches", "micro_batches"),
    [
        (6, Layout(tokens_per_micro_batch=10**6, multiple=4), 1, 1),
        (10, Layout(tokens_per_micro_batch=40), 2, 6),
        (10, Layout(tokens_per_micro_batch=40, multiple=2), 2, 6),
    ],
)
def test_micro_batches_divide_among_devices_and_belong_to_one_minibatch(
    rows, layout, minibatches, micro_batches
):
    samples = rl.random_samples(1, rows, 2, 4)
    rollout = graded(
        samples,
        *(rl.prompts(*[[1, 2]] * rows, slots=8),) * 2,
        np.arange(2 * rows).reshape(1, rows, 2),
    )
    algorithm = Algorithm(
        ESTIMATORS["importance_token"],
        minibatches=minibatches,
        aggregation=Aggregation("token_mean"),
    )
    cut = batch_of(rl.policy()[1], rollout, algorithm, layout).policy
    assert cut.length.shape[0] == micro_batches and cut.length.shape[2] % layout.multiple == 0
    of_minibatch = np.asarray(cut.prompt_length > 0).reshape(minibatches, -1).sum(1)
    np.testing.assert_array_equal(of_minibatch, rows // minibatches)
    assert (np.asarray(cut.temperature) == 1).all()


def test_rows_that_minibatches_do_not_divide_are_refused():
    rollout = graded(rl.random_samples(1, 3, 2, 4), *(rl.prompts([1], [2], [3]),) * 2, 0.0)
    with pytest.raises(
        ValueError, match="3 rows .3 groups, 2 samples a row. do not divide into 2 minibatches"
    ):
        batch_of(rl.policy()[1], rollout, Algorithm(ESTIMATORS["importance_token"], minibatches=2))


@pytest.mark.slow
def test_a_mesh_gives_the_step_of_one_device():
    """Two runs, groups and the model's matrices cut over eight devices; a micro-batch has a row
    that pads it to the mesh.
    """
    layout = Layout(tokens_per_micro_batch=10**6, multiple=2)
    rollout, algorithm = random_rollout(), dataclasses.replace(RICH, max_grad_norm=1.0)
    # three groups, for two devices
    rollout = jax.tree.map(lambda x: x[:, :3] if x.ndim > 1 else x, rollout)
    graphdef, trained, base = rl.policy(RUNS)
    batch = batch_of(trained, rollout, algorithm, layout)
    expected = jax.device_get(
        compile_rl_step(graphdef, options_of(algorithm))(rl.state_of(trained), base, batch)
    )
    mesh = make_mesh(run=2, data=2, tensor=2)
    state = rl.state_of(trained)
    places = state_shardings(mesh, state), base_shardings(mesh, base), batch_sharding(mesh)
    step = compile_rl_step(graphdef, options_of(algorithm), *places)
    found = jax.device_get(
        step(
            *(
                jax.device_put(x, place)
                for x, place in zip((state, base, batch), places, strict=True)
            )
        )
    )
    for tree, wanted in ((found[0].adam.mu, expected[0].adam.mu), (found[1], expected[1])):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), tree, wanted
        )
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(expected[0].adam.mu))


def test_token_means_of_chunks_are_the_mean_of_a_loop_over_chunks():
    """Five completions at a time, in order, across groups, the last one alone: each chunk's token
    mean in a batch of its own.
    """
    chunked = Algorithm(baseline="none", aggregation=Aggregation("token_mean_per_chunk", chunk=5))
    alone = dataclasses.replace(chunked, aggregation=Aggregation("token_mean"))
    trained, rollout = rl.policy(RUNS)[1], random_rollout()
    places = np.arange(GROUPS * OF_GROUP).reshape(GROUPS, OF_GROUP) // 5
    of_chunks = [
        gradients_of(
            trained,
            rollout.replace(valid=jnp.broadcast_to(places == chunk, (RUNS, GROUPS, OF_GROUP))),
            alone,
        )
        for chunk in range(4)
    ]
    found = gradients_of(trained, rollout, chunked)
    assert_same(found, np.mean(of_chunks, axis=0), 1e-5)
    # the artefact that chunks are
    assert np.abs(found - gradients_of(trained, rollout, alone)).max() > 0.05 * np.abs(found).max()


@pytest.mark.parametrize(
    "selection", [Selection("best_of_n"), Selection("filtered", minimum=0.3)], ids=lambda s: s.kind
)
def test_a_selection_is_a_supervised_step_on_the_chosen_examples(selection):
    """The training engine's own step on the same examples, packed: Adam's first moment is a tenth
    of the gradient.
    """
    trained, rollout = (
        rl.policy(RUNS)[1],
        random_rollout().replace(temperature=jnp.ones(RUNS, jnp.float32)),
    )
    rewards, samples = np.asarray(rollout.rewards), rollout.samples
    examples = []
    for run in range(RUNS):
        if selection.kind == "best_of_n":
            chosen = [(q, int(rewards[run, q].argmax())) for q in range(GROUPS)]
        else:
            chosen = [(int(q), int(g)) for q, g in np.argwhere(rewards[run] > 0.3)]
        said = [
            np.asarray(samples.tokens[run, q, g, : samples.length[run, q, g]]).tolist()
            for q, g in chosen
        ]
        examples.append(
            [
                [(TRAINING[q] + ids, len(TRAINING[q]))]
                for (q, _), ids in zip(chosen, said, strict=True)
            ]
        )
    longest = max(map(len, examples))
    examples = [run + [[]] * (longest - len(run)) for run in examples]
    graphdef, _, base = rl.policy(RUNS)
    state, metrics = compile_sft_step(graphdef, SftOptions(CONSTANT))(
        rl.state_of(trained), base, (tiny.pack(examples, length=8, responses=4),)
    )
    algorithm = Algorithm(selection=selection)
    found, sums = step_gradients(trained, batch_of(trained, rollout, algorithm), algorithm)
    np.testing.assert_array_equal(sums["tokens"], metrics["response_tokens"])
    assert_same(found, 10 * rl.flat(state.adam.mu), 1e-4)


@pytest.mark.slow
def test_epochs_and_minibatches_are_single_updates_in_turn():
    """Twice over two halves, each the update of a rollout of its own with the old log-probabilities
    of the beginning.
    """
    graphdef, trained, base = rl.policy(RUNS)
    rollout = random_rollout()
    whole = batch_of(trained, rollout, IN_TURN)
    final, metrics = compile_rl_step(graphdef, options_of(IN_TURN))(
        rl.state_of(trained, 0.02), base, whole
    )
    halves = [
        jax.tree.map(lambda x, half=half: x[:, half] if x.ndim > 1 else x, rollout)
        for half in (slice(0, 2), slice(2, 4))
    ]
    single = dataclasses.replace(IN_TURN, minibatches=1)
    batches = [batch_of(trained, half, single) for half in halves]
    state, ratios = rl.state_of(trained, 0.02), []
    for batch in batches * 2:
        vector, sums = step_gradients(state.trained, batch, single)
        state, _ = apply_gradients(
            state,
            unflat(vector, trained),
            sums["loss"],
            CONSTANT,
            IN_TURN.max_grad_norm,
            IN_TURN.betas,
        )
        ratios.append(sums["ratio"] / sums["tokens"])
    np.testing.assert_allclose(ratios[0], 1, atol=1e-4)
    assert np.abs(ratios[1] - 1).max() > 1e-3 < np.abs(ratios[3] - 1).max()
    np.testing.assert_allclose(metrics["ratio"], ratios[3], rtol=1e-4)
    assert_same(
        rl.flat(final.trained) - rl.flat(trained), rl.flat(state.trained) - rl.flat(trained), 1e-3
    )
    assert int(final.step) == 1 and (np.asarray(final.adam.count) == 4).all()


def unflat(vectors: np.ndarray, like):
    """The inverse of `rl.flat`."""
    leaves, start = [], 0
    for x in jax.tree.leaves(like):
        size = x.size // len(x)
        leaves.append(jnp.asarray(vectors[:, start : start + size].reshape(x.shape), jnp.float32))
        start += size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def test_an_auxiliary_loss_copies_only_what_earned_a_reward():
    """By default the best of a group whose reward is above 0; else what its selection says."""
    rewards = jnp.asarray(
        [
            [0.0, 1.0, 2.0, 0.5],
            [0.0, 0.0, 0.0, 0.0],
            [-1.0, -2.0, -1.0, -3.0],
            [0.0, 0.0, 0.0, 0.25],
        ]
    )
    best, paid = (
        np.zeros((2, GROUPS, OF_GROUP), bool),
        np.broadcast_to(np.asarray(rewards > 0), (2, GROUPS, OF_GROUP)),
    )
    best[:, 0, 2] = best[:, 3, 3] = True
    rollout = random_rollout().replace(rewards=jnp.broadcast_to(rewards, best.shape))
    for auxiliary, wanted in (
        (Auxiliary(), best),
        (Auxiliary(selection=Selection("filtered", minimum=0.0)), paid),
    ):
        algorithm = Algorithm(
            Estimator("copied", auxiliary=auxiliary), aggregation=Aggregation("token_mean")
        )
        # [1, R, Q, G, C]
        weight = np.asarray(
            batch_of(rl.policy(RUNS)[1], rollout, algorithm).auxiliary.signal.weight
        )
        np.testing.assert_array_equal(weight[0].any(-1), wanted)
        np.testing.assert_allclose(weight[0].sum(axis=(1, 2, 3)), 1, rtol=1e-6)


def test_rows_that_are_sent_back_keep_their_noise_and_have_a_temperature():
    """Where the micro-batches under either prompt have unlike many rows, the ones that fill them up
    are empty, not at temperature 0.
    """
    algorithm = Algorithm(
        ESTIMATORS["ratio_noise"],
        gate=Gate("oracle", accepted_labels=(1,), rejected="train_at_gen"),
    )
    rollout = random_rollout().replace(generation=rl.prompts(*GENERATION, runs=RUNS, slots=12))
    rollout = rollout.replace(
        uniforms=jnp.asarray(
            np.random.default_rng(2).uniform(size=rollout.rewards.shape), jnp.float32
        )
    )
    rollout = rollout.replace(
        labels=jnp.asarray(
            np.random.default_rng(3).integers(0, 2, rollout.rewards.shape), jnp.int32
        )
    )
    rows = batch_of(rl.policy(RUNS)[1], rollout, algorithm, FOUR_ROWS).policy
    assert [int((lengths > 0).sum()) for lengths in rows.prompt_length] == [
        8,
        4,
        4,
    ] and rows.prompt_length.shape[2] == 4
    assert (np.asarray(rows.temperature) > 0.5).all()
    noise = np.exp(np.asarray(rows.signal.old_log_probs))[np.asarray(rows.signal.weight) > 0]
    assert 0.7 <= noise.min() < 0.8 and 1.2 < noise.max() <= 1.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["plain", "noise", "a prompt a completion", "unlike micro-batches"]
)
def test_rejected_samples_are_trained_where_they_were_sampled(case):
    """The sum of two updates, each of its own samples under its own prompts; whatever the rows of
    either are.
    """
    rollout, per_completion = random_rollout(), case == "a prompt a completion"
    estimator = (
        Estimator("unclipped_noise", old="noise", noise=0.3)
        if case == "noise"
        else ESTIMATORS["plain"]
    )
    together = ONE_ROW
    if case == "unlike micro-batches":  # of four rows, and of two
        together = FOUR_ROWS
        rollout = rollout.replace(generation=rl.prompts(*GENERATION, runs=RUNS, slots=12))
    rollout = rollout.replace(
        uniforms=jnp.asarray(
            np.random.default_rng(2).uniform(size=rollout.rewards.shape), jnp.float32
        )
    )
    labels = jnp.asarray(np.random.default_rng(3).integers(0, 2, rollout.rewards.shape), jnp.int32)
    if per_completion:
        rollout = rollout.replace(
            training=rl.prompts(
                *[prompt for prompt in TRAINING for _ in range(OF_GROUP)], runs=RUNS, slots=5
            )
        )
    gate = Gate("oracle", accepted_labels=(1,), rejected="train_at_gen")
    back, dropped = (
        Algorithm(estimator, gate=dataclasses.replace(gate, rejected=rejected))
        for rejected in ("train_at_gen", "drop")
    )
    trained, layout = (
        rl.policy(RUNS)[1],
        Layout(tokens_per_micro_batch=10**6, samples_per_row=1 if per_completion else None),
    )
    found = gradients_of(trained, rollout.replace(labels=labels), back, together)
    accepted = gradients_of(trained, rollout.replace(labels=labels), dropped, layout)
    rejected = gradients_of(
        trained, rollout.replace(labels=1 - labels, training=rollout.generation), dropped, layout
    )
    assert_same(found, accepted + rejected, 1e-5)
    assert np.abs(accepted).max() > 1e-3 < np.abs(rejected).max()
