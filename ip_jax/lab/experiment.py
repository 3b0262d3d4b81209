"""What a supervised experiment is made of: arms, model, training and evaluation, as frozen,
printable dataclasses.
"""

import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Iterable, Sequence

import jax

from ip_jax.models.lora import LoraConfig
from ip_jax.models.placement import cpu_multiplies_bfloat16
from ip_jax.models.quantised import check_quantised
from ip_jax.models.remat import REMAT
from ip_jax.prompts import library
from ip_jax.prompts.transforms import Suffix
from ip_jax.training.schedules import Schedule

TRAIN = ("lora", "full")
TRAIN_ON = ("last", "all")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A named condition. `train_prompt` names a prompt of the library, or is None for the model as
    it comes.

    `text`, where given, is a prompt of the user's own, appended to the user turn like the published
    suffixes; `train_prompt` is then only its name. `also_evaluated_under` names further prompts,
    besides neutral and the arm's own. `start_from` is a PEFT folder (local, or a hub repository)
    whose adapter the training starts with, instead of a fresh one.
    """

    name: str
    label: str
    train_prompt: str | None
    data: str = "user_right"
    text: str | None = None
    also_evaluated_under: tuple[str, ...] = ()
    start_from: str | None = None

    def __post_init__(self):
        if self.start_from and not self.train_prompt:
            raise ValueError(
                f"the arm {self.name} is not trained (it has no train_prompt), so it cannot start"
                f" from {self.start_from}"
            )

    @property
    def transform(self):
        """The op that puts the training prompt into an example."""
        return (
            Suffix(f"\n{self.text}")
            if self.text is not None
            else library.get(self.train_prompt).transform
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
    schedule: Schedule
    train: str = "lora"
    lora: LoraConfig = LoraConfig()
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    max_length: int = 512
    drop_long: bool = False
    train_on: str = "last"
    """Which assistant turns of a conversation count: its last one, or all."""
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
    """`full_steps`: under all of an arm's prompts; `neutral_steps`: under the neutral prompt only,
    without prompts that ask for a solution. Temperature 0 is greedy.
    """

    full_steps: tuple[int, ...]
    neutral_steps: tuple[int, ...] = ()
    max_new_tokens: int = 48
    max_new_tokens_solving: int = 128
    """Of prompts that ask for a solution rather than a verdict: a worked answer is longer than a
    first sentence.
    """
    temperature: float = 0.0
    top_p: float = 1.0
    slots: int = 48
    """Completions of one run that are decoded side by side."""

    def __post_init__(self):
        for field in ("slots", "max_new_tokens", "max_new_tokens_solving"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"evaluation.{field} is {getattr(self, field)}: it must be at least 1"
                )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"evaluation has temperature {self.temperature} and top_p {self.top_p}: the first"
                " must be at least 0, the second above 0 and at most 1"
            )


def check_runs(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError for no arm or seed, one that is named twice, and a seed below 0."""
    for field, values in (("arms", arms), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{field} is {values}: it must name at least one, and none twice")
    if min(seeds) < 0:
        raise ValueError(f"seeds is {seeds}: each must be at least 0")


def choose_arms(names: Iterable[str], known: dict[str, Arm]) -> tuple[Arm, ...]:
    """The arms of a list of names: one of `known`, a prompt of the library, or `name=text` for a
    prompt of one's own.

    Raises ValueError for a name that is none of these, with the nearest ones, for a name given
    twice, and for an own name that is taken or that could not name a file.
    """
    arms = tuple(_choose_arm(name, known) for name in names)
    twice = {arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1}
    if twice:
        raise ValueError(
            f"the arm {sorted(twice)[0]!r} is listed twice: each arm needs a name of its own"
        )
    return arms


def _choose_arm(name: str, known: dict[str, Arm]) -> Arm:
    own_name, equals, text = name.partition("=")
    if equals:
        if own_name in known or own_name in _FILE_NAMES or own_name in library.PROMPTS:
            raise ValueError(
                f"the arm {name!r} needs another name: {own_name} is taken by an arm or a prompt of"
                " the library"
            )
        if not re.fullmatch(r"[A-Za-z]\w*", own_name, re.ASCII) or not text.strip():
            raise ValueError(
                f"the arm {name!r} must read name=text: a name of letters, digits and _, then the"
                " words of its prompt"
            )
        return Arm(own_name, own_name, own_name, text=text)
    if name in known:
        return known[name]
    if name in library.PROMPTS:
        return Arm(_file_name(name), name, name)
    near = difflib.get_close_matches(name, [*known, *library.PROMPTS], n=3, cutoff=0.4)
    raise ValueError(
        f"no arm or prompt is called {name!r}:"
        f" {'did you mean ' + ', '.join(near) + '? ' if near else ''}Arms are {', '.join(known)};"
        " any prompt of the library works too, and name=text makes one of your own"
    )


def _file_name(prompt: str) -> str:
    return prompt.replace("/", "_")


# an own name like this would share its files with the prompt
_FILE_NAMES = frozenset(map(_file_name, library.PROMPTS))


def stable_id(text: str) -> int:
    """A number for an example's id that is the same in every process, for sampling keys."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF
