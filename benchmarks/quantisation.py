"""What a base in 8 and 4 bits changes on real GCD conversations, and what training makes of it: no
timing.

SmolLM2 in float32 against the same weights in bfloat16, int8 and nf4, on responses that training
does not see; then a few LoRA steps.

    python -m benchmarks.quantisation
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import save
from benchmarks.sft import LEARNING_RATE, gcd_sources
from ip_jax.data.pipeline import RunSource, batch_reader, renderer
from ip_jax.models import hub
from ip_jax.models.decoder import causal_attend, split_decoder
from ip_jax.models.lora import LoraConfig, init_lora
from ip_jax.models.quantised import KERNELS, item_bytes, quantise
from ip_jax.training.schedules import Schedule
from ip_jax.training.sft import SftOptions, compile_sft_step
from ip_jax.training.sharding import base_shardings, make_mesh
from ip_jax.training.state import Batch, init_state

BASES = ("float32", "bfloat16", "int8", "nf4")
TRAINED = ("float32", "nf4")
MEASURED = 64  # rows
STEPS, EXAMPLES = 10, 4  # of training, and of one step
AT_ONCE = 8  # rows whose logits are in memory together
LORA = LoraConfig(rank=16, alpha=32)


def base_of(kind: str) -> hub.Pretrained:
    """SmolLM2 with its projections as `kind`; what is quantised was float32 and the rest is."""
    model = hub.load_pretrained(
        "smollm2-135m-instruct", jnp.dtype("bfloat16" if kind == "bfloat16" else "float32")
    )
    if kind not in ("int8", "nf4"):
        return model
    place = functools.partial(base_shardings, make_mesh())
    return dataclasses.replace(model, params=quantise(jax.device_put(model.params), kind, place))


def size(params) -> int:
    """Bytes, two 4-bit values in one."""
    return int(sum(a.size * item_bytes(a.dtype) for a in jax.tree.leaves(params)))


def rows_of(source: RunSource, render) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, T], whether they are of a response [N, T]) of the source's rows, each from the
    left of its own row.
    """
    rows = [
        render(source.transform(example, source.seed)["messages"]) for example in source.examples
    ]
    tokens, counted = (
        np.zeros((len(rows), max(len(row.token_ids) for row in rows)), dtype)
        for dtype in (np.int32, bool)
    )
    for i, row in enumerate(rows):
        tokens[i, : len(row.token_ids)], counted[i, : len(row.token_ids)] = (
            row.token_ids,
            row.response_mask,
        )
    return tokens, counted


@functools.partial(jax.jit, static_argnums=0)
def next_log_probs(graphdef, adapters, base, tokens):
    """[B, T - 1, V] of the tokens from the second one on, in float32."""
    decoder = nnx.merge(graphdef, adapters, base)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    hidden, _ = decoder(tokens[None], positions[None], causal_attend)
    return jax.nn.log_softmax(decoder.logits(hidden)[0, :, :-1], axis=-1)


@jax.jit
def compared(exact, other, targets):
    """Of each position: |difference of the target's log-probability|, KL(exact || other), whether
    the greedy token is the same, other's loss.
    """

    def of_target(a):
        return jnp.take_along_axis(a, targets[..., None], axis=-1)[..., 0]

    kl = jnp.sum(jnp.exp(exact) * (exact - other), axis=-1)
    return (
        jnp.abs(of_target(exact) - of_target(other)),
        kl,
        exact.argmax(-1) == other.argmax(-1),
        -of_target(other),
    )


def errors(programs: dict, tokens: np.ndarray, counted: np.ndarray) -> dict[str, dict]:
    """Of each of `programs`, (graphdef, adapters, base) by name, against the first one: over the
    response tokens of all rows.
    """
    found = {name: [] for name in programs}
    for start in range(0, len(tokens), AT_ONCE):
        rows, exact = tokens[start : start + AT_ONCE], None
        for name, program in programs.items():
            log_probs = next_log_probs(*program, rows)
            exact = log_probs if exact is None else exact
            found[name].append(
                [
                    np.asarray(value)[counted[start : start + AT_ONCE, 1:]]
                    for value in compared(exact, log_probs, rows[:, 1:])
                ]
            )
    results = {}
    for name, parts in found.items():
        change, kl, same, loss = (
            np.concatenate(values).astype(np.float64) for values in zip(*parts, strict=True)
        )
        numbers = (change.mean(), np.quantile(change, 0.99), kl.mean(), same.mean(), loss.mean())
        names = (
            "mean_abs_log_prob_change",
            "p99_abs_log_prob_change",
            "mean_kl",
            "same_greedy_token",
            "response_loss",
        )
        results[name] = dict(
            zip(names, (float(f"{number:.5g}") for number in numbers), strict=True)
        )
    return results


def losses(program, source: RunSource, render) -> list[float]:
    """Of each step of training, on examples that no step before has seen."""
    graphdef, adapters, base = program
    reader = batch_reader([source], render, EXAMPLES, STEPS, 2048)
    step = compile_sft_step(graphdef, SftOptions(Schedule("constant"), shared=reader.shared))
    state = init_state(adapters, jnp.full(1, LEARNING_RATE), jnp.zeros(1), jnp.zeros(1, int))
    found = []
    for i in range(STEPS):
        state, metrics = step(state, base, tuple(Batch(**arrays) for arrays in reader(i)[0]))
        found.append(round(float(metrics["loss"][0]), 4))
    return found


def main() -> None:
    """Writes benchmarks/results/quantisation_smollm2.json."""
    tokenizer, (source,) = gcd_sources(["neutral"], MEASURED + STEPS * EXAMPLES)
    render = renderer(tokenizer)
    measured, trained_on = (
        RunSource(source.name, part, source.transform, 0)
        for part in (source.examples[:MEASURED], source.examples[MEASURED:])
    )
    tokens, counted = rows_of(measured, render)
    programs, bases = {}, {}
    for kind in BASES:
        model = base_of(kind)
        programs[kind] = split_decoder(
            model.config, model.params, init_lora(jnp.zeros(1, int), model.config, LORA), LORA
        )
        bases[kind] = {
            "bytes": size(model.params),
            "bytes_of_projections": size({name: model.params["layers"][name] for name in KERNELS}),
        }
    found = errors(programs, tokens, counted)
    result = {
        "what": (
            "responses of published GCD rows under the neutral prompt; against the float32 base;"
            " KL(float32 || other) over the whole vocabulary"
        ),
        "weights": "of the embedded GGUF, itself in 4 bits (Q4_1), widened to float32",
        "rows": MEASURED,
        "response_tokens": int(counted[:, 1:].sum()),
        "bases": {kind: bases[kind] | found[kind] for kind in BASES},
    }
    save("quantisation_smollm2", result)
    training = {"examples_a_step": EXAMPLES, "rank": LORA.rank, "learning_rate": LEARNING_RATE}
    training["losses"] = {kind: losses(programs[kind], trained_on, render) for kind in TRAINED}
    save("quantisation_smollm2", result | {"training": training})


if __name__ == "__main__":
    main()
