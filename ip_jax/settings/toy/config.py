"""All knobs of the toy, in one frozen dataclass."""
import dataclasses
import hashlib
import json

from ip_jax.models.families import DecoderConfig, uniform_attention
from ip_jax.settings.toy import vocabulary
from ip_jax.settings.toy.prompts import FAMILIES, Effect, members
from ip_jax.settings.toy.tasks import ANSWER, Reward

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
    """Steps of Adam on batches of completions, with a cosine schedule to 0 behind a short warm-up."""

    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 4e-3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The toy. `neutral` is the effect of the empty prompt, of nonsense and of families that `effects` does not name; its loophole rate is what
    the literature calls p_discover.

    `digit_accuracy` is how often the untrained model writes the right next digit of a sorting task; `follow_through` how often it
    completes a loophole that it has begun; `answer_after_loophole` how often it answers behind one. A share `hard_share` of tasks asks to scramble.
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
            raise ValueError(f"toy.effects names {', '.join(unknown)}: the prompt families are {', '.join(FAMILIES)}")
        if not 1 <= self.loophole_length <= vocabulary.LOOPHOLE_WORDS:
            raise ValueError(f"toy.loophole_length is {self.loophole_length}: it must lie in 1 .. {vocabulary.LOOPHOLE_WORDS}")

    @property
    def slots(self) -> int:
        """Completion slots: the loophole, an answer behind it, END."""
        return self.loophole_length + ANSWER + 1

    @property
    def decoder(self) -> DecoderConfig:
        """The base model's shape."""
        head = self.d_model // self.n_heads
        return DecoderConfig(
            family="llama", vocab_size=vocabulary.SIZE, d_model=self.d_model, d_ff=self.d_ff, n_layers=self.n_layers, n_heads=self.n_heads,
            n_kv_heads=self.n_heads, head_dim=head, attention=uniform_attention(head, 10000.0), norm_eps=1e-5, max_positions=64, tied_embeddings=True,
        )

    def effect(self, family: str) -> Effect:
        """What pretraining installs for a family."""
        effect = dict(self.effects).get(family, self.neutral)
        return dataclasses.replace(effect, loophole=self.neutral.loophole if effect.loophole is None else effect.loophole)

    @property
    def digest(self) -> str:
        """Names the pretrained weights: all fields but the reward, and the prompts that pretraining shows."""
        fields = dataclasses.asdict(dataclasses.replace(self, reward=Reward()))
        shown = [members(family) for family in FAMILIES]
        return hashlib.sha256(json.dumps([fields, vocabulary.TOKENS, shown], sort_keys=True).encode()).hexdigest()[:16]
