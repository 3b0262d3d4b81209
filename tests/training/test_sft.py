"""The supervised step: against torch, PEFT and AdamW; what must not change a result; runs that
share a program; the compiled step.
"""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from scipy.special import log_softmax

from ip_jax.data.packing import PackedShape, pack_step, shared_prefix
from ip_jax.models.decoder import split_decoder
from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.models.lora import LoraConfig
from ip_jax.prompts.chat import Rendered
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step, dropout_keys
from ip_jax.training.state import Batch, init_state

LORA = LoraConfig(rank=4, alpha=4)
CONSTANT = SftOptions(Schedule("constant", total=100))
# every projection has its own shape, so that each product of the compiled step can be told
DISTINCT = DecoderConfig(
    "llama", 101, 40, 56, 2, 4, 2, 12, uniform_attention(12, 1000.0), 1e-5, 256, True
)
LENGTHS = (13, 9, 15, 6)
CLIP = 1.1
REMAT = SftOptions(Schedule("constant", total=100), remat="full")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """A step takes seconds to compile: without LLVM's optimisations half as long. XLA's own passes
    are untouched.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def step_and_base(
    config: DecoderConfig = tiny.CONFIG, options: SftOptions = CONSTANT, dtype=np.float32
):
    """(compiled step, base): one program for all tests that use the same options and shapes."""
    graphdef, _, base = split_decoder(
        config, tiny.random_params(config, dtype), tiny.random_lora(config, LORA, 1), LORA
    )
    return compile_sft_step(graphdef, options), base


def fresh_state(adapters, learning_rate, weight_decay=0.01, seeds=None, config=tiny.CONFIG):
    runs = len(adapters["q"]["a"])
    _, lora, _ = split_decoder(config, tiny.random_params(config), adapters, LORA)
    rates, decays = (
        np.broadcast_to(np.float32(value), runs) for value in (learning_rate, weight_decay)
    )
    return jax.device_put(
        init_state(lora, rates, decays, np.arange(runs) if seeds is None else np.asarray(seeds))
    )


def one_row_each(examples) -> Batch:
    return tiny.pack([[[example] for example in run] for run in examples], length=16, responses=16)


def train(batches, adapters, learning_rate, step=None, **state):
    """On a Batch, or several of other shapes, for each step: (final adapters {target: {"a", "b"}},
    [metrics of each step]) as numpy arrays.
    """
    step, base = step or step_and_base()
    state, seen = fresh_state(adapters, learning_rate, **state), []
    for batch in batches:
        state, metrics = step(state, base, batch if isinstance(batch, tuple) else (batch,))
        seen.append(jax.device_get(metrics))
    return adapters_of(state), seen


def adapters_of(state) -> dict:
    layers = jax.device_get(state.trained["layers"])
    return {
        t: {
            "a": np.asarray(layers[t]["lora_a"].get_value()),
            "b": np.asarray(layers[t]["lora_b"].get_value()),
        }
        for t in LORA.targets
    }


def assert_close(trees, expected, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), trees, expected)


def torch_training(model, adapter, examples_of_steps, rate, decay, options: SftOptions):
    """One run in torch: PEFT's LoRA, the mean over response tokens of separate unpadded passes,
    AdamW, HF's scheduler.
    """
    import torch
    import transformers

    wrapped = tiny.peft_model(model, LORA, adapter)
    trained = [parameter for *_, parameter in tiny.peft_parameters(wrapped)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, options.schedule.warmup, options.schedule.total
    )
    seen = []
    for examples in examples_of_steps:
        total, count = 0.0, 0
        for ids, n_prompt in examples:
            logits = wrapped(torch.tensor([ids])).logits[0, n_prompt - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[n_prompt:]), reduction="sum"
            )
            count += len(ids) - n_prompt
        (total / count).backward()
        clip = torch.inf if options.max_grad_norm is None else options.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        seen.append((total.item() / count, norm.item(), optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        (target, layer, which): parameter.detach().numpy().T
        for target, layer, which, parameter in tiny.peft_parameters(wrapped)
    }, seen


def test_steps_equal_torch_adamw_on_peft():
    """Two runs with their own rate, decay, adapter and data; warmup from rate 0; clipping; packed
    rows in two micro-batches.
    """
    pytest.importorskip("peft")
    options = SftOptions(Schedule("linear", warmup=1, total=4), max_grad_norm=CLIP)
    config, params = tiny.from_hf(tiny.hf_model("llama"))
    adapters = tiny.random_lora(config, LORA, runs=2)
    rates, decays = (5e-4, 2e-4), (0.1, 0.0)
    examples = [tiny.random_examples(2, LENGTHS, config.vocab_size, seed) for seed in range(4)]
    batches = [
        tiny.pack([[run[:2], run[2:]] for run in step], length=24, responses=24, micro_batches=2)
        for step in examples
    ]
    graphdef, lora, base = split_decoder(config, params, adapters, LORA)
    step, state, ours = (
        compile_sft_step(graphdef, options),
        jax.device_put(init_state(lora, rates, decays, [0, 1])),
        [],
    )
    for batch in batches:
        state, metrics = step(state, base, (batch,))
        ours.append(jax.device_get(metrics))
    trained = adapters_of(state)
    for run in range(2):
        adapter = jax.tree.map(lambda a, run=run: a[run], adapters)
        expected, seen = torch_training(
            tiny.hf_model("llama"),
            adapter,
            [step[run] for step in examples],
            rates[run],
            decays[run],
            options,
        )
        mine = np.array(
            [
                [metrics[name][run] for name in ("loss", "grad_norm", "learning_rate")]
                for metrics in ours
            ]
        )
        np.testing.assert_allclose(mine, seen, rtol=1e-4)
        for (target, layer, which), matrix in expected.items():
            np.testing.assert_allclose(
                trained[target][which][run, layer],
                matrix,
                rtol=0,
                atol=1e-5,
                err_msg=f"{target}.{which} {layer}",
            )
            # and the steps moved it
            assert np.abs(matrix - adapter[target][which][layer]).max() > rates[run]
    norms = np.array([metrics["grad_norm"] for metrics in ours])
    assert norms.min() < CLIP < norms.max()  # some steps are clipped
    assert state.alive.all() and step._cache_size() == 1


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_loss_counts_response_tokens_only(softcap):
    """By hand from the logits: every response token, the first and the last one included, and no
    other; Gemma 2's soft cap too.
    """
    config = dataclasses.replace(tiny.CONFIG, logit_softcap=softcap)
    adapters = tiny.random_lora(config, LORA, runs=3)
    examples = tiny.random_examples(3, LENGTHS)
    _, (metrics,) = train(
        [one_row_each(examples)], adapters, 0.0, step_and_base(config), config=config
    )
    for run in range(3):
        log_probs = []
        for ids, n_prompt in examples[run]:
            _, logits = tiny.hidden_states(
                config,
                tiny.random_params(config),
                np.pad(ids, (0, 16 - len(ids)))[None, None],
                tiny.of_run(adapters, run),
                LORA,
            )
            table = log_softmax(logits[0, 0], axis=-1)
            log_probs += [
                table[position - 1, ids[position]] for position in range(n_prompt, len(ids))
            ]
        assert metrics["response_tokens"][run] == len(log_probs)
        assert metrics["loss"][run] == pytest.approx(-np.mean(log_probs), abs=1e-5)


def test_the_last_token_is_a_target_and_the_prompt_is_not():
    """Changed in weight: a token of the prompt as a target changes nothing, the last response token
    changes the loss.
    """
    adapters = tiny.random_lora(tiny.CONFIG, LORA, runs=3)
    batch = one_row_each(tiny.random_examples(3, LENGTHS))
    _, (plain,) = train([batch], adapters, 0.0)
    unused = np.where(batch.response_weight == 0, 77, batch.response_target)
    _, (same,) = train([batch.replace(response_target=unused)], adapters, 0.0)
    np.testing.assert_array_equal(plain["loss"], same["loss"])
    last = np.asarray(batch.response_weight).sum(-1).astype(int) - 1  # [M, R, B]
    for name, place in (("first", np.zeros_like(last)), ("last", last)):
        targets = np.array(batch.response_target)
        np.put_along_axis(
            targets,
            place[..., None],
            (np.take_along_axis(targets, place[..., None], -1) + 1) % 101,
            -1,
        )
        _, (changed,) = train([batch.replace(response_target=targets)], adapters, 0.0)
        assert (np.abs(changed["loss"] - plain["loss"]) > 1e-3).all(), name


ROWS = PackedShape(
    length=28, segments=2, segment_length=16, responses=28, micro_batches=4, micro_rows=2
)


@pytest.mark.parametrize(
    "shapes",
    [(ROWS,), (dataclasses.replace(ROWS, length=21, micro_rows=3, micro_batches=2), ROWS)],
    ids=["one shape", "two shapes"],
)
def test_packing_padding_and_micro_batches_change_nothing(shapes):
    """Two steps on the same examples: a row each, and packed by the library into wider rows, in
    micro-batches that runs share, some of them empty.
    """
    adapters = tiny.random_lora(tiny.CONFIG, LORA, runs=3)
    examples = [tiny.random_examples(3, LENGTHS, seed=seed) for seed in range(2)]
    packed = [packed_batch(step, shapes) for step in examples]
    long, short, empty = (
        [*range(13), *range(9), *[0] * 6],
        [*range(15), *range(6), *[0] * 7],
        [0] * 28,
    )
    first = packed[0][-1]
    np.testing.assert_array_equal(
        first.positions[:, 0, 0],
        [long, long, short, empty] if len(shapes) == 1 else [long, long, empty, empty],
    )
    np.testing.assert_array_equal(first.segment_ids[0, 0, 0], [1] * 13 + [2] * 9 + [0] * 6)
    np.testing.assert_array_equal(first.runs[:2, 0], [[0, 1], [2, 0]])
    trained, seen = train([one_row_each(step) for step in examples], adapters, 3e-4)
    trained_too, seen_too = train(packed, adapters, 3e-4)
    assert_close(seen_too, seen)
    assert_close(trained_too, trained)


def test_a_prefix_that_all_examples_share_is_computed_once_and_changes_nothing():
    """Two steps on examples that begin alike, each row holding the beginning once: fewer tokens,
    the same losses and weights.
    """
    adapters = tiny.random_lora(tiny.CONFIG, LORA, runs=3)
    steps = [
        [
            [([*range(1, 6), *ids], n_prompt + 5) for ids, n_prompt in run]
            for run in tiny.random_examples(3, LENGTHS, seed=seed)
        ]
        for seed in range(2)
    ]
    rendered = [
        [
            [Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= n) for ids, n in run]
            for run in examples
        ]
        for examples in steps
    ]
    assert shared_prefix(rendered[0][0]) == 5
    layout = dict(
        length=40, segments=3, segment_length=24, responses=40, micro_batches=2, micro_rows=3
    )
    results = []
    for shared in (0, 5):
        arrays = [
            pack_step(examples, [PackedShape(**layout, shared=shared)])[0][0]
            for examples in rendered
        ]
        # two rows of two examples
        assert [np.count_nonzero(a["segment_ids"]) for a in arrays] == [
            3 * (sum(LENGTHS) + 4 * 5 - 2 * shared)
        ] * 2
        step = step_and_base(options=dataclasses.replace(CONSTANT, shared=shared))
        results.append(train([Batch(**a) for a in arrays], adapters, 3e-4, step))
    (trained, seen), (trained_too, seen_too) = results
    assert_close(seen_too, seen)
    assert_close(trained_too, trained)


def packed_batch(examples, shapes) -> tuple[Batch, ...]:
    rendered = [
        [
            Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= n_prompt)
            for ids, n_prompt in run
        ]
        for run in examples
    ]
    return tuple(Batch(**arrays) for arrays in pack_step(rendered, shapes)[0])


def test_runs_together_equal_runs_alone():
    """Three runs with their own data, adapters and learning rates in one program, and each in a
    program of its own.
    """
    adapters, rates = tiny.random_lora(tiny.CONFIG, LORA, runs=3), np.array([3e-4, 9e-4, 3e-5])
    examples = [tiny.random_examples(3, LENGTHS, seed=seed) for seed in range(3)]
    together, seen = train([one_row_each(step) for step in examples], adapters, rates)
    for run in range(3):
        alone, seen_alone = train(
            [one_row_each(step[run : run + 1]) for step in examples],
            tiny.of_run(adapters, run),
            rates[run],
        )
        assert_close(tiny.of_run(together, run), alone)
        assert_close([tiny.of_run(metrics, run) for metrics in seen], seen_alone)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(axis=(1, 2, 3)), together, adapters)
    assert all(
        (0 < move).all() and 2 < move[1] / move[0] < 4 and 0.05 < move[2] / move[0] < 0.2
        for move in jax.tree.leaves(moved)
    )


def test_rate_and_decay_belong_to_the_run():
    """Rate 0 changes nothing at all. From the same start Adam's first step is rate *
    sign(gradient): decay adds rate * decay * weight.
    """
    adapters = jax.tree.map(
        lambda a: np.repeat(a, 3, axis=0), tiny.random_lora(tiny.CONFIG, LORA, runs=1)
    )
    batch = one_row_each(tiny.random_examples(1, LENGTHS) * 3)
    trained, _ = train([batch], adapters, [0.0, 1e-3, 1e-3], weight_decay=[0.5, 0.0, 0.5])
    for new, old in zip(jax.tree.leaves(trained), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        assert np.quantile(np.abs(np.abs(new[1] - old[1]) - 1e-3), 0.9) < 1e-6
        np.testing.assert_allclose(new[2] - new[1], -1e-3 * 0.5 * old[2], atol=1e-7)


@pytest.mark.parametrize("cause", ["rate", "adapter", "gradient", "one batch"])
def test_a_run_that_diverges_is_frozen_and_the_others_go_on(cause):
    """Bit for bit: the other runs do as if their neighbour were well, and the frozen one stays at
    its last finite weights.
    """
    adapters, rates = (
        tiny.random_lora(tiny.CONFIG, LORA, runs=3),
        np.array([1e-3, 1e-3, 2e-3], np.float32),
    )
    batches = [one_row_each(tiny.random_examples(3, LENGTHS, seed=seed)) for seed in range(4)]
    well, seen_well = train(batches, adapters, rates)
    ill_adapters, ill_rates = jax.tree.map(np.copy, adapters), rates.copy()
    ill_batches = list(batches)
    if cause == "rate":
        ill_rates[1] = 1e30  # the second loss is not finite
    elif cause == "one batch":  # what comes after it would be finite again
        ill_batches[1] = batches[1].replace(
            response_weight=batches[1].response_weight.at[:, 0, len(LENGTHS), 0].set(np.nan)
        )
    elif cause == "adapter":
        ill_adapters["v"]["a"][1, 0, 3, 2] = np.nan
    else:
        # B = 0 hides it from the loss, but the squares of B's gradient overflow
        ill_adapters["down"]["a"][1] *= 1e20
        ill_adapters["down"]["b"][1] = 0
    ill, seen = train(ill_batches, ill_adapters, ill_rates)
    for run in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, tiny.of_run(ill, run), tiny.of_run(well, run))
        jax.tree.map(
            np.testing.assert_array_equal,
            *([tiny.of_run(m, run) for m in metrics] for metrics in (seen, seen_well)),
        )
    first_bad = 1 if cause in ("rate", "one batch") else 0
    assert [list(metrics["alive"]) for metrics in seen] == [
        [True, step < first_bad, True] for step in range(4)
    ]
    if cause == "gradient":
        assert np.isfinite(seen[0]["loss"][1]) and not np.isfinite(seen[0]["grad_norm"][1])
    until_then, _ = train(batches[:first_bad], ill_adapters, ill_rates)
    jax.tree.map(np.testing.assert_array_equal, tiny.of_run(ill, 1), tiny.of_run(until_then, 1))


def test_dropout_differs_by_run_and_step_and_is_repeatable():
    adapters = jax.tree.map(
        lambda a: np.repeat(a, 3, axis=0), tiny.random_lora(tiny.CONFIG, LORA, runs=1)
    )
    batch = one_row_each(tiny.random_examples(1, LENGTHS) * 3)
    dropout = step_and_base(options=SftOptions(Schedule("constant", total=100), dropout=0.3))
    # rate 0: only the dropout differs
    _, seen = train([batch, batch], adapters, 0.0, step=dropout, seeds=[4, 9, 4])
    losses = np.array([metrics["loss"] for metrics in seen])  # [step, R]
    np.testing.assert_array_equal(losses[:, 0], losses[:, 2])
    _, (plain,) = train([batch], adapters, 0.0)
    assert len(np.unique([*losses[:, 0], *losses[:, 1], plain["loss"][0]])) == 5
    _, again = train([batch, batch], adapters, 0.0, step=dropout, seeds=[4, 7, 9])
    np.testing.assert_array_equal(again[1]["loss"][0], losses[1, 0])
    assert again[0]["loss"][2] == pytest.approx(losses[0, 1], abs=1e-6)


def test_dropout_of_a_row_follows_its_run_and_number():
    """Neither its place among the rows nor its neighbours: run 0 alone, and behind a run with more
    rows, which fill the first micro-batch.
    """
    adapters = jax.tree.map(
        lambda a: np.repeat(a, 2, axis=0), tiny.random_lora(tiny.CONFIG, LORA, runs=1)
    )
    ours, theirs = tiny.random_examples(2, LENGTHS)
    rendered = [
        [Rendered(np.array(ids, np.int32), np.arange(len(ids)) >= n) for ids, n in run]
        for run in (ours, [(ids[:4] * 4, 1) for ids, _ in theirs])
    ]
    shape = dataclasses.replace(ROWS, length=16, segments=2, responses=32, micro_batches=4)
    step = step_and_base(options=SftOptions(Schedule("constant", total=100), dropout=0.3))
    losses = []
    for runs in ([rendered[0]], rendered, rendered[::-1]):
        batches = tuple(Batch(**arrays) for arrays in pack_step(runs, [shape])[0])
        _, (metrics,) = train(
            [batches],
            jax.tree.map(lambda a, runs=runs: a[: len(runs)], adapters),
            0.0,
            step=step,
            seeds=[4, 4][: len(runs)],
        )
        losses.append(metrics["loss"])
    np.testing.assert_allclose([losses[1][0], losses[2][1]], losses[0][0], rtol=1e-6)


def test_each_row_of_a_run_and_each_step_has_a_dropout_of_its_own():
    """By the run's seed, the step and the row's number, and nothing else."""
    seeds, owner, numbers = (
        np.array([4, 9, 4]),
        np.array([[0, 0, 1, 2, 2, 1]]),
        np.array([[0, 1, 0, 1, 0, 1]]),
    )
    batch = one_row_each(tiny.random_examples(3, (9, 8)))
    state = fresh_state(tiny.random_lora(tiny.CONFIG, LORA, 3), 0.0, seeds=seeds)
    rows = jax.tree.map(lambda a: a[0], batch.replace(runs=owner[None], row_numbers=numbers[None]))
    keys = np.concatenate(
        [
            jax.random.key_data(dropout_keys(state.replace(step=jnp.int32(step)), rows))
            for step in (0, 1)
        ]
    )
    expected = [
        (seeds[run], step, number)
        for step in (0, 1)
        for run, number in zip(owner[0], numbers[0], strict=True)
    ]
    for (key, names), (other, others) in itertools.combinations(
        zip(keys.tolist(), expected, strict=True), 2
    ):
        assert (key == other) == (names == others)


def test_bfloat16_weights_stay_near_float32():
    """Stated tolerance: 1 % of the loss, 5 % of the gradient's norm."""
    adapters, batch = (
        tiny.random_lora(tiny.CONFIG, LORA, runs=3),
        one_row_each(tiny.random_examples(3, LENGTHS)),
    )
    _, (exact,) = train([batch], adapters, 1e-3)
    _, (narrow,) = train([batch], adapters, 1e-3, step=step_and_base(dtype=jnp.bfloat16))
    np.testing.assert_allclose(narrow["loss"], exact["loss"], rtol=1e-2)
    np.testing.assert_allclose(narrow["grad_norm"], exact["grad_norm"], rtol=5e-2)
    assert (narrow["loss"] != exact["loss"]).all()


def test_rematerialisation_changes_nothing():
    adapters, batch = (
        tiny.random_lora(tiny.CONFIG, LORA, runs=3),
        one_row_each(tiny.random_examples(3, LENGTHS)),
    )
    assert_close(
        train([batch], adapters, 1e-3, step=step_and_base(options=REMAT)),
        train([batch], adapters, 1e-3),
    )


def test_one_compile_for_all_steps_and_sweeps():
    """Steps, learning rates, decays, seeds and a run that diverged are data."""
    step, base = step_and_base(options=REMAT)
    for rates in ([1e-3, 1e-4, 0.0], [0.0, 1e30, 1.0]):
        state = fresh_state(
            tiny.random_lora(tiny.CONFIG, LORA, runs=3),
            rates,
            weight_decay=rates[0],
            seeds=[5, 6, 7],
        )
        for seed in range(3):
            state, _ = step(
                state, base, (one_row_each(tiny.random_examples(3, LENGTHS, seed=seed)),)
            )
    assert step._cache_size() == 1
    assert int(state.step) == 3 and state.alive.tolist() == [True, False, True]


def test_the_same_inputs_give_the_same_bits():
    adapters, batches = (
        tiny.random_lora(tiny.CONFIG, LORA, runs=3),
        [one_row_each(tiny.random_examples(3, LENGTHS, seed=s)) for s in range(3)],
    )
    first, second = (train(batches, adapters, 1e-3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_compiled_step_has_one_product_per_weight_and_direction():
    """3 runs of 2 rows of 16 tokens: 96 rows in every product with a base weight, forward and
    backward, and no other such product.
    """
    step, base = step_and_base(DISTINCT)
    batch = tiny.pack(
        [[[example] for example in run] for run in tiny.random_examples(3, (14, 9))],
        length=16,
        responses=12,
    )
    lowered = step.lower(
        fresh_state(tiny.random_lora(DISTINCT, LORA, 3), 1e-3, config=DISTINCT), base, (batch,)
    )
    compiled = lowered.compile().as_text()
    dims = {
        name: tuple(map(int, shape.split(",")))
        for name, shape in re.findall(r"%?([\w.-]+) = \w+\[([\d,]+)\]", compiled)
    }
    dots = re.findall(
        r"%?([\w.-]+) = f32\[[\d,]+\]\S* dot\(%?([\w.-]+), %?([\w.-]+)\),"
        r" (.*?)rhs_contracting_dims=\{(\d)\}",
        compiled,
    )
    assert len(dots) > 40  # the text is what this test takes it for

    # Besides those with base weights there are products with LoRA's matrices (an operand or the
    # result has the rank's 4) and sums written as products with ones (of width 1).
    def other(result, *operands):
        return 4 in result or 1 in result or any(4 in dims[operand] for operand in operands)

    unbatched = collections.Counter(
        (",".join(map(str, dims[result])), "forward" if dim == "0" else "backward")
        for result, left, right, rest, dim in dots
        if "batch" not in rest and not other(dims[result], left, right)
    )
    # the heads of q and of k, turned in both directions by a matrix [12, 12]
    rope = {("384,12", "forward"): 2, ("192,12", "forward"): 2}
    # 3 * 2 * 12 response positions: logits and their gradient
    vocabulary = {("72,101", "backward"): 1, ("72,40", "forward"): 1}
    assert (
        unbatched
        == {
            # q; k, v; o, down; gate, up
            ("96,48", "forward"): 1,
            ("96,24", "forward"): 2,
            ("96,40", "forward"): 2,
            ("96,56", "forward"): 2,
            # q, k, v, gate, up; o; down
            ("96,40", "backward"): 5,
            ("96,48", "backward"): 1,
            ("96,56", "backward"): 1,
        }
        | rope
        | vocabulary
    )
    kernels = {"40x48", "40x24", "48x40", "40x56", "56x40"}
    operands = re.findall(
        r"dot_general .*(batching_dims)?.* : \(tensor<(\S+?)xf32>, tensor<(\S+?)xf32>\)",
        lowered.as_text(),
    )
    per_run = [
        shapes
        for _, *shapes in operands
        if any(shape.endswith(f"x{kernel}") for shape in shapes for kernel in kernels)
    ]
    assert operands and not per_run, per_run  # a base weight is never repeated for each run
    # nor are there logits of all positions
    assert not re.search(r"f32\[1,6,16,101\]|f32\[96,101\]|f32\[6,16,101\]", compiled)
