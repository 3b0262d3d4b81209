"""What an experiment is made of: arms, model, training and evaluation, as frozen, printable
dataclasses.
"""

import dataclasses
import difflib
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ip_jax.models.lora import LoraConfig
from ip_jax.models.placement import cpu_multiplies_bfloat16
from ip_jax.models.quantised import check_quantised
from ip_jax.models.remat import REMAT
from ip_jax.prompts.book import PromptBook
from ip_jax.prompts.controls import STANDARD
from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import PromptError, Rows
from ip_jax.training.schedules import Schedule
from ip_jax.training.sharding import MeshConfig

NEUTRAL = "neutral"  # the prompt to which nothing is added, and the arm that is trained under it
UNTRAINED = "untrained"  # the arm of the base model
TRAIN = ("lora", "full")
TRAIN_ON = ("last", "all")
DTYPES = ("float32", "bfloat16")
INOCULATIONS = ("inoculation", "own")  # kinds of prompts that controls are made from


@dataclasses.dataclass(frozen=True)
class Condition:
    """What every arm has: a name for files and the command line, and a label for tables and
    figures.
    """

    name: str
    label: str


@dataclasses.dataclass(frozen=True)
class Arm(Condition):
    """A condition of supervised training. `train_prompt` names a prompt of the study, or is None
    for the model as it comes.

    `data`: the kind of training rows, by default the study's first one. `rows`: which of them get
    the prompt, by default all; the others are trained under the neutral one.
    `also_evaluated_under` names further prompts, besides neutral and the arm's own. `start_from`:
    a PEFT folder (local, or a hub repository) whose adapter the training starts with, instead of a
    fresh one.
    """

    train_prompt: str | None = NEUTRAL
    data: str | None = None
    rows: Rows | None = None
    also_evaluated_under: tuple[str, ...] = ()
    start_from: str | None = None

    def __post_init__(self):
        if self.start_from and not self.train_prompt:
            raise ValueError(
                f"the arm {self.name} is not trained (it has no train_prompt), so it cannot start"
                f" from {self.start_from}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """`name`: a local folder, a .gguf file, an embedded name or a hub repository. Weights in
    `weights`, activations in `activations`; weights that are "auto" are decided by `decided`.

    `quantised`: the projections of the frozen base in 4 ("nf4") or 8 ("int8") bits, or None.
    `attention`: training's kernel (auto, xla, splash, cudnn, pallas; see docs/kernels.md).
    `experts`: the products of a mixture of experts (auto, pallas; see docs/mixtral.md). `thinking`:
    what the chat template gets as `enable_thinking` wherever something is rendered, or None for its
    own default (Qwen3's: the model thinks); an exported model has the template as it came.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    weights: str = "auto"
    activations: str = "float32"
    quantised: str | None = None
    attention: str = "auto"
    experts: str = "auto"
    thinking: bool | None = None

    def __post_init__(self):
        for field, known in (("weights", ("auto", *DTYPES)), ("activations", DTYPES)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.{field} is {getattr(self, field)!r}: choose from {', '.join(known)}"
                )
        if self.quantised is not None:
            check_quantised(self.quantised)


def decided(model: ModelConfig, platform: str | None = None) -> ModelConfig:
    """`model` with weights that are "auto" decided: bfloat16, but float32 on a CPU that is not
    known to multiply bfloat16. There an update in bfloat16 takes 1.3 to 1.4 times as long, because
    every product widens its inputs first. `platform`: jax's name of it, by default this process's.
    """
    if model.weights != "auto":
        return model
    widens = (platform or jax.default_backend()) == "cpu" and not cpu_multiplies_bfloat16()
    return dataclasses.replace(model, weights="float32" if widens else "bfloat16")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """One arm's training; all arms share it. `steps` of `batch_size` examples; `max_length` in
    tokens, chat template included.

    `train`: "lora" (adapters over a frozen base) or "full" (all weights, each run a program of its
    own; `lora` is then unused).
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: Schedule = Schedule("constant")
    train: str = "lora"
    lora: LoraConfig = LoraConfig()
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    max_length: int = 512
    drop_long: bool = False
    train_on: str = "last"
    """Which assistant turns of a conversation count: its last one, or all."""
    encode_apart: bool = False
    """Whether responses are encoded apart from their prompts: a response that begins with white
    space may otherwise share its first token with the prompt, which then reads as sampling never
    reads it (`ip-jax check` counts such rows).
    """
    close_with_eos: bool = False
    """Whether an answer is closed with the end of turn and `eos_token`, as OpenWeights trains."""
    tokens_per_micro_batch: int = 2048
    remat: str = "products"
    """What the backward pass keeps: none (everything), products, attention, full (nothing but each
    layer's input).
    """
    router_aux_loss_coef: float = 0.0
    """Of the load balancing loss that a mixture of experts adds to the loss; the config.json of
    Mixtral-8x7B says 0.02.
    """
    checkpoint_every: int = 5
    memory_gb: float = 8.0
    """What one device may hold: runs that do not fit together are cut into groups."""

    def __post_init__(self):
        for field, known in (("train", TRAIN), ("train_on", TRAIN_ON), ("remat", tuple(REMAT))):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"sft.{field} is {getattr(self, field)!r}: choose from {', '.join(known)}"
                )
        for field in (
            "steps",
            "batch_size",
            "max_length",
            "tokens_per_micro_batch",
            "checkpoint_every",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"sft.{field} is {getattr(self, field)}: it must be at least 1")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"sft.learning_rate is {self.learning_rate}: it must be a number of at least 0"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`full_steps`: under all of an arm's prompts, by default before the first step and after the
    last; `neutral_steps`: under the neutral prompt only, without the rows that are marked
    `full_steps_only`. Temperature 0 is greedy.

    `max_new_tokens`: a row's own `max_new_tokens` goes before it.
    """

    full_steps: tuple[int, ...] = ()
    neutral_steps: tuple[int, ...] = ()
    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    slots: int = 48
    """Completions of one run that are decoded side by side."""

    def __post_init__(self):
        for field in ("slots", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"evaluation.{field} is {getattr(self, field)}: it must be at least 1"
                )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"evaluation has temperature {self.temperature} and top_p {self.top_p}: the first"
                " must be at least 0, the second above 0 and at most 1"
            )


@dataclasses.dataclass(frozen=True)
class SupervisedPreset:
    """Supervised training of a study at one size. `arms`: names of the study's arms, of prompts,
    or name=text; all arms of the study where none is named. `controls`: made from every inoculation
    prompt and added as arms ("standard" stands for several). `data`: the study's own options.
    `judge`: whose verdicts the figure shows, by default the study's first; the table has all.
    """

    sft: SftConfig
    evaluation: EvalConfig = EvalConfig()
    preset: str = ""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: Any = None
    arms: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    judge: str | None = None


def check_runs(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError for no arm or seed, one that is named twice, and a seed below 0."""
    for field, values in (("arms", arms), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{field} is {values}: it must name at least one, and none twice")
    if min(seeds) < 0:
        raise ValueError(f"seeds is {seeds}: each must be at least 0")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The arms of a run, and every prompt that they are trained or evaluated under, by name."""

    arms: tuple[Arm, ...]
    prompts: Mapping[str, Prompt]


def choose_arms(
    names: Iterable[str], known: Mapping[str, Arm], book: PromptBook, controls: Iterable[str] = ()
) -> Chosen:
    """The arms of a list of names: those of `known`, ARM.CONTROL for a control of one of them, or
    prompts by any name that the `book` finds; then one arm for each of the `controls` of each arm
    that trains under an inoculation prompt.

    Raises ValueError for a name that is none of these, with the nearest ones, for an arm given
    twice, and for an own name that is taken.
    """
    chosen = [_choose_arm(name, known, book) for name in names]
    chosen += [
        control
        for arm, prompt in chosen
        if prompt is not None and prompt.kind in INOCULATIONS
        for control in _controls(arm, prompt, tuple(controls), book)
    ]
    arms = tuple(arm for arm, _ in chosen)
    twice = sorted({arm.name for arm in arms if sum(a.name == arm.name for a in arms) > 1})
    if twice:
        raise ValueError(f"the arm {twice[0]!r} is listed twice: each arm needs a name of its own")
    others = [book.find(name) for arm in arms for name in (NEUTRAL, *arm.also_evaluated_under)]
    prompts = [*others, *(prompt for _, prompt in chosen if prompt is not None)]
    return Chosen(arms, {prompt.name: prompt for prompt in prompts})


def _choose_arm(name: str, known: Mapping[str, Arm], book: PromptBook) -> tuple[Arm, Prompt | None]:
    """An arm and the prompt that it trains under."""
    if name in known:
        arm = known[name]
        return arm, None if arm.train_prompt is None else book.find(arm.train_prompt)
    own_name, equals, _ = name.partition("=")
    if equals and own_name in known:
        raise ValueError(f"the arm {name!r} needs another name: {own_name} is taken by an arm")
    base, dot, control = name.rpartition(".")
    if dot and not equals and base in known and known[base].train_prompt:
        return _control(known[base], book.find(known[base].train_prompt), control, book)
    if equals or book.knows(name):
        prompt = book.find(name)
        return Arm(prompt.name.replace("/", "_"), prompt.name, train_prompt=prompt.name), prompt
    near = difflib.get_close_matches(name, [*known, *book.names], n=3, cutoff=0.4)
    raise ValueError(
        f"no arm or prompt is called {name!r}:"
        f" {'did you mean ' + ', '.join(near) + '? ' if near else ''}arms are {', '.join(known)};"
        " any prompt of the study works too, and name=text makes one of your own"
    )


def _controls(
    arm: Arm, prompt: Prompt, names: Sequence[str], book: PromptBook
) -> list[tuple[Arm, Prompt]]:
    """The controls of an arm. "standard" stands for all that can be made from its words and differ
    from the neutral prompt; one that is named must be possible.
    """
    named = [_control(arm, prompt, name, book) for name in names if name != "standard"]
    neutral, standard = book.find(NEUTRAL), []
    for name in STANDARD if "standard" in names else ():
        try:
            made = _control(arm, prompt, name, book)
        except PromptError:  # a single word cannot be shuffled
            continue
        if made[1].transform != neutral.transform and name not in names:
            standard.append(made)
    return named + standard


def _control(arm: Arm, prompt: Prompt, control: str, book: PromptBook) -> tuple[Arm, Prompt]:
    """The arm under a control of its prompt, alike in all else."""
    made = book.control(prompt, control)
    label = f"{arm.label}: {control.replace('_', ' ')}"
    name = f"{arm.name}.{control}"
    return dataclasses.replace(arm, name=name, label=label, train_prompt=made.name), made


def stable_id(text: str) -> int:
    """A number for an example's id that is the same in every process, for sampling keys."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF
