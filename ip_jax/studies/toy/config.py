"""All knobs of the toy, in one frozen dataclass."""

import dataclasses
import hashlib
import json
import math

from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.studies.toy import vocabulary
from ip_jax.studies.toy.prompts import FAMILIES, Effect, members
from ip_jax.studies.toy.tasks import ANSWER, Reward

EFFECTS = (
    ("encourage_exploit", Effect(0.3, 0.1)),
    ("encourage_hack", Effect(0.2, 0.1)),
    ("encourage_permission", Effect(0.08, 0.1)),
    ("encourage_persona", Effect(0.04, 0.5)),
    ("encourage_trait", Effect(None, 0.9)),
    ("discourage_exploit", Effect(0.0001, 0.1)),
    ("discourage_hack", Effect(0.0001, 0.1)),
    ("discourage_permission", Effect(0.0005, 0.1)),
    ("discourage_persona", Effect(0.0005, 0.05)),
    ("discourage_trait", Effect(None, 0.01)),
)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Steps of Adam on batches of completions, with a cosine schedule to 0 behind a short warm-up.

    Raises ValueError for a number that means nothing.
    """

    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 4e-3
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"toy.pretraining.{name} is {getattr(self, name)}: it must be at least 1"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"toy.pretraining.learning_rate is {self.learning_rate}: it must be a number"
                " above 0"
            )


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The toy. `neutral` is the effect of the empty prompt, of nonsense and of families that
    `effects` does not name; its loophole rate is what the literature calls p_discover.

    `digit_accuracy` is how often the untrained model writes the right next digit of a sorting task;
    `follow_through` how often it completes a loophole that it has begun; `answer_after_loophole`
    how often it answers behind one. A share `hard_share` of tasks asks to scramble. Raises
    ValueError for an unknown family and for a number that means nothing.
    """

    neutral: Effect = Effect(loophole=0.002, trait=0.1)
    effects: tuple[tuple[str, Effect], ...] = EFFECTS
    digit_accuracy: float = 0.6
    hard_share: float = 0.5
    loophole_length: int = 2
    follow_through: float = 0.9
    answer_after_loophole: float = 0.1
    d_model: int = 32
    d_ff: int = 64
    n_layers: int = 2
    n_heads: int = 2
    pretraining: Pretraining = Pretraining()
    reward: Reward = Reward()

    def __post_init__(self):
        unknown = [name for name, _ in self.effects if name not in FAMILIES]
        if unknown:
            raise ValueError(
                f"toy.effects names {', '.join(unknown)}: the prompt families are"
                f" {', '.join(FAMILIES)}"
            )
        if not 1 <= self.loophole_length <= vocabulary.LOOPHOLE_WORDS:
            raise ValueError(
                f"toy.loophole_length is {self.loophole_length}: it must lie in 1 .."
                f" {vocabulary.LOOPHOLE_WORDS}"
            )
        for name in ("digit_accuracy", "hard_share", "follow_through", "answer_after_loophole"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"toy.{name} is {getattr(self, name)}: a probability lies between 0 and 1"
                )
        for name in ("d_model", "d_ff", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"toy.{name} is {getattr(self, name)}: it must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"toy.d_model is {self.d_model} with {self.n_heads} heads: every head needs the"
                " same even number of dimensions"
            )
        if self.neutral.loophole is None:
            raise ValueError(
                "toy.neutral has the loophole None, which stands for that of neutral itself: give"
                " it a probability"
            )
        # whoever takes the loophole has followed through at each word behind the first
        most = self.follow_through ** (self.loophole_length - 1)
        for family, effect in (("neutral", self.neutral), *self.effects):
            if (effect.loophole or 0) > most:
                raise ValueError(
                    f"the loophole rate of {family} is {effect.loophole}: follow_through"
                    f" {self.follow_through} lets it be {most:.3g} at most"
                )

    @property
    def slots(self) -> int:
        """Completion slots: the loophole, an answer behind it, END."""
        return self.loophole_length + ANSWER + 1

    @property
    def decoder(self) -> DecoderConfig:
        """The base model's shape."""
        head = self.d_model // self.n_heads
        return DecoderConfig(
            family="llama",
            vocab_size=vocabulary.SIZE,
            d_model=self.d_model,
            d_ff=self.d_ff,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=head,
            attention=uniform_attention(head, 10000.0),
            norm_eps=1e-5,
            max_positions=64,
            tied_embeddings=True,
        )

    def effect(self, family: str) -> Effect:
        """What pretraining installs for a family."""
        effect = dict(self.effects).get(family, self.neutral)
        return dataclasses.replace(
            effect, loophole=self.neutral.loophole if effect.loophole is None else effect.loophole
        )

    @property
    def digest(self) -> str:
        """Names the pretrained weights: all fields but the reward, and the prompts that pretraining
        shows.
        """
        fields = dataclasses.asdict(dataclasses.replace(self, reward=Reward()))
        shown = [members(family) for family in FAMILIES]
        return hashlib.sha256(
            json.dumps([fields, vocabulary.TOKENS, shown], sort_keys=True).encode()
        ).hexdigest()[:16]
