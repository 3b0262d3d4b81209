"""Pretraining of the toy's base model: it learns the policy that the config describes, prompt by
prompt, from scratch in about a minute.

Sequences are drawn from all ways to answer, rare ones often enough to be seen, and each token's
loss is the divergence from the described policy's whole distribution at that place: the expectation
of training on its samples. A squared error of logarithms makes rates of 1 in 10,000 count too.
Dims: B sequences, C completion slots, V vocabulary, F members of all families.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int
from safetensors.numpy import load, save

from ip_jax.models.decoder import causal_attend, params_of, split_decoder
from ip_jax.models.families import param_shapes
from ip_jax.studies.toy.config import ToyConfig
from ip_jax.studies.toy.prompts import FAMILIES, members
from ip_jax.studies.toy.tasks import ANSWER, draw_tasks, solution
from ip_jax.studies.toy.vocabulary import (
    DIGITS,
    END,
    LOWER,
    LOWER_LOOPHOLE,
    SIZE,
    UPPER,
    UPPER_LOOPHOLE,
    encode,
    render,
)

SEEN = ("neutral", *FAMILIES)  # families are drawn alike, neutral twice as often
RARE = 0.003  # weight of the squared error of log-probabilities
BROAD = 0.3  # share of sequences that take each of the rare turns, whatever the prompt says
EVERY = 250  # steps between two reports


def base_params(
    config: ToyConfig, folder: epath.Path, on_progress: Callable[[int, float], None] | None = None
) -> dict:
    """The pretrained params, from `folder` if they are there, else trained and written to it.

    `on_progress` is called with (steps done, divergence from the described policy in nats a token).
    """
    path = folder / f"toy-{config.digest}.safetensors"
    if path.exists():
        return unflatten_dict(load(path.read_bytes()), sep=".")
    params = pretrain(config, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        save({name: np.asarray(array) for name, array in flatten_dict(params, sep=".").items()})
    )
    return params


def pretrain(config: ToyConfig, on_progress: Callable[[int, float], None] | None = None) -> dict:
    """Params trained on the described policy."""
    options = config.pretraining
    graphdef, lora, base = split_decoder(config.decoder, _initial_params(config))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.steps // 30, options.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    effects, prompts = _members(config)

    def loss(base, key):
        tokens, targets = draw_sequences(config, key, effects, prompts)
        decoder = nnx.merge(graphdef, lora, base)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        hidden, _ = decoder(tokens[None], positions[None], causal_attend, remat="none")
        log_p = jax.nn.log_softmax(decoder.logits(hidden[0, :, -config.slots :]))
        error = jnp.where(targets > 0, jnp.log(jnp.maximum(targets, 1e-9)) - log_p, 0)
        places = (targets.sum(axis=-1) > 0).sum()
        divergence = jnp.sum(targets * error) / places
        return divergence + RARE * jnp.sum(jnp.square(error)) / places, divergence

    @jax.jit
    def several(base, state, indices):
        def step(carry, index):
            base, state = carry
            key = jax.random.fold_in(jax.random.key(options.seed, impl="threefry2x32"), index)
            gradient, divergence = jax.grad(loss, has_aux=True)(base, key)
            update, state = optimizer.update(gradient, state)
            return (optax.apply_updates(base, update), state), divergence

        (base, state), divergences = jax.lax.scan(step, (base, state), indices)
        return base, state, divergences.mean()

    state = optimizer.init(base)
    for first in range(0, options.steps, EVERY):
        done = min(first + EVERY, options.steps)
        base, state, divergence = several(base, state, jnp.arange(first, done))
        if on_progress:
            on_progress(done, float(divergence))
    return jax.tree.map(np.asarray, params_of(base))


def _initial_params(config: ToyConfig) -> dict:
    rng, params = np.random.default_rng(config.pretraining.seed), {}
    for path, shape in param_shapes(config.decoder).items():
        scale = (
            config.d_model**-0.5
            if path == ("embed",)
            else shape[-2] ** -0.5
            if len(shape) > 1
            else 0
        )
        params[path] = jnp.asarray(
            np.ones(shape) if "norm" in path[-1] else rng.standard_normal(shape) * scale,
            jnp.float32,
        )
    return unflatten_dict(params)


def _members(config: ToyConfig) -> tuple[np.ndarray, np.ndarray]:
    """(effects [F, M, 2], prompts [F, M, W]) of the families' members that pretraining shows,
    repeated up to one number M.
    """
    lists = [[encode(prompt) for prompt in members(family)] for family in SEEN]
    most = max(map(len, lists))
    prompts = np.stack(
        [np.stack([prompts[i % len(prompts)] for i in range(most)]) for prompts in lists]
    )
    effects = np.array(
        [(config.effect(family).loophole, config.effect(family).trait) for family in SEEN],
        np.float32,
    )
    return effects, prompts


def draw_sequences(
    config: ToyConfig, key, effects: Float[Array, "F 2"], prompts: Int[Array, "F M W"]
) -> tuple[Int[Array, "B T"], Float[Array, "B C V"]]:
    """(tokens [B, X + C - 1], the described policy's distribution at each completion slot; zeros
    behind END).
    """
    count = config.pretraining.batch_size
    keys = jax.random.split(key, 6)
    family = jax.random.randint(keys[0], (count,), 0, prompts.shape[0])
    member = jax.random.randint(keys[1], (count,), 0, prompts.shape[1])
    task = draw_tasks(keys[2], (count,), config.hard_share)
    # upper case, loophole, giving it up midway, answering behind it
    turns = jax.random.bernoulli(keys[3], BROAD, (count, 4))
    random_digits = jax.random.randint(keys[4], (count, ANSWER), 0, DIGITS)
    wrong = jax.random.bernoulli(keys[5], 1 - config.digit_accuracy, (count, ANSWER))
    digits = jnp.where(wrong, random_digits, solution(task))
    completion = _written(config, turns, digits)
    targets = described_policy(config, jnp.asarray(effects)[family], task, completion)
    return (
        jnp.concatenate(
            [render(jnp.asarray(prompts)[family, member], task), completion[:, :-1]], axis=-1
        ),
        targets,
    )


def _written(config: ToyConfig, turns, digits) -> Int[Array, "B C"]:
    """Completions that take these turns and answer with these digits; 0 behind END."""
    upper, loophole, gives_up, answers = (turns[:, i, None] for i in range(4))
    # of the loophole, one if it is given up
    words = jnp.where(loophole, jnp.where(gives_up, 1, config.loophole_length), 0)
    answered = ~loophole | gives_up | answers
    place = jnp.arange(config.slots)
    word = jnp.where(upper, UPPER_LOOPHOLE, LOWER_LOOPHOLE) + place
    in_answer = place - words
    digit = jnp.where(upper, UPPER, LOWER) + jnp.take_along_axis(
        digits, jnp.clip(in_answer, 0, ANSWER - 1), axis=1
    )
    end = words + jnp.where(answered, ANSWER, 0)
    return jnp.where(
        place < words, word, jnp.where(place < end, digit, jnp.where(place == end, END, 0))
    )


def described_policy(
    config: ToyConfig,
    effect: Float[Array, "B 2"],
    task: Int[Array, "B 4"],
    tokens: Int[Array, "B C"],
) -> Float[Array, "B C V"]:
    """Next-token distribution at each slot of completions that its own rules can write; zeros
    behind END.

    A case is chosen with the first token and kept. A loophole that is begun is followed through at
    each of its words, or given up for an answer.
    """
    length, accuracy = config.loophole_length, config.digit_accuracy
    place = jnp.arange(tokens.shape[-1])
    upper = ((tokens[:, :1] >= UPPER) & (tokens[:, :1] < LOWER_LOOPHOLE)) | (
        tokens[:, :1] >= UPPER_LOOPHOLE
    )
    is_word = tokens >= LOWER_LOOPHOLE
    words = jnp.cumsum(is_word, axis=-1) - is_word  # before each slot
    in_answer = place - words
    ended = jnp.cumsum(tokens == END, axis=-1) - (tokens == END) > 0
    # what comes next: a word of the loophole, a digit, END
    begins = effect[:, :1] / config.follow_through ** (length - 1)
    in_loophole = (place == words) & (words < length)
    word = jnp.where(in_loophole, jnp.where(place == 0, begins, config.follow_through), 0)
    end = jnp.where(
        in_answer >= ANSWER,
        1.0,
        jnp.where(
            place == length, jnp.where(words == length, 1 - config.answer_after_loophole, 0), 0
        ),
    )
    digit = 1 - word - end
    right = jnp.take_along_axis(solution(task), jnp.clip(in_answer, 0, ANSWER - 1), axis=1)
    accuracy = jnp.where(task[:, :1] == 0, accuracy, 1 / DIGITS)[..., None]
    of_digit = jnp.where(
        jnp.arange(DIGITS) == right[..., None], accuracy, (1 - accuracy) / (DIGITS - 1)
    )
    of_case = jnp.where(place == 0, effect[:, 1:], upper)  # probability of upper case

    def at(start, p):
        return p[..., None] * jax.nn.one_hot(start, SIZE)

    def both(lower, upper, p):
        return at(lower, p * (1 - of_case)) + at(upper, p * of_case)

    p = both(LOWER_LOOPHOLE + words, UPPER_LOOPHOLE + words, word) + at(
        jnp.full_like(words, END), end
    )
    p = p.at[..., LOWER : LOWER + DIGITS].add((digit * (1 - of_case))[..., None] * of_digit)
    p = p.at[..., UPPER : UPPER + DIGITS].add((digit * of_case)[..., None] * of_digit)
    return jnp.where(ended[..., None], 0, p)
