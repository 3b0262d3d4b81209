"""The dials of a policy gradient: all that makes another program of an arm. Prompts, rewards and learning rates are data instead."""
import dataclasses

from ip_jax.rl.advantages import BASELINES, Aggregation, check_baseline
from ip_jax.rl.amplification import check_pmi
from ip_jax.rl.estimators import ESTIMATORS, Estimator, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.selection import Selection


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """How an iteration's rewards become an update. Arms with equal ones are runs of one program.

    `baseline`: see `rl.advantages`. `selection` replaces advantages: the best samples are copied (supervised). `pmi` (gamma, bound) weighs positive
    advantages by 1 + gamma * clip(LLR, -bound, bound). `epochs` passes over the rows, each in `minibatches` updates.
    Raises ValueError for combinations that have no meaning, with the reason.
    """

    estimator: Estimator = ESTIMATORS["plain"]
    kl: Kl = Kl()
    baseline: str = "group_mean_std"
    aggregation: Aggregation = Aggregation("token_mean")
    gate: Gate = Gate("off")
    selection: Selection | None = None
    pmi: tuple[float, float] | None = None
    entropy_bonus: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    max_grad_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}: choose from {', '.join(BASELINES)}")
        if min(self.epochs, self.minibatches) < 1:
            raise ValueError(f"epochs is {self.epochs} and minibatches {self.minibatches}: both must be at least 1")
        if self.pmi is not None:
            check_pmi(*self.pmi)
        for reason, is_so in self._contradictions().items():
            if is_so:
                raise ValueError(reason)

    def _contradictions(self) -> dict[str, bool]:
        name, gated = self.estimator.name, self.gate.kind != "off"
        several, in_reward = self.updates > 1, self.kl.place == "reward"
        return {
            f"{name} compares a pass with itself, so from the second update of an iteration on it forgets that the policy has moved: use train_old, or "
            "one epoch and one minibatch": several and self.estimator.old in ("itself", "noise") and not self.selection,
            f"{name} trains its policy loss at the generation prompt, where there is nothing to gate: use gate off": gated and self.estimator.auxiliary is not None,
            f"{name} trains its policy loss at the generation prompt, and kl.context is {self.kl.context!r}: its penalty is gg": self.kl.context in ("tt", "tg")
            and self.estimator.auxiliary is not None,
            f"gate.rejected is {self.gate.rejected} and the loss has the penalty {self.kl.context}, whose policy is at the training prompt: samples that go back to "
            "the generation prompt have none there: use gg, or put it in the reward": self.gate.rejected != "drop" and self.kl.context in ("tt", "tg") and not in_reward,
            f"gate.rejected is {self.gate.rejected} and minibatches {self.minibatches}: samples that go back to the generation prompt are updated with the "
            "others, in one minibatch": self.gate.rejected != "drop" and self.minibatches > 1,
            "a selection copies samples and has no ratio, penalty, gate or PMI weight: use plain, without kl and with gate off": self.selection is not None
            and (name != "plain" or self.kl.context != "none" or gated or self.pmi is not None),
            f"kl.estimator is {self.kl.estimator!r} and its place the reward: there only k1 is added up along a sequence": self.kl.context != "none"
            and in_reward and self.kl.estimator != "k1",
        }

    @property
    def updates(self) -> int:
        """Optimizer updates of one iteration."""
        return self.epochs * self.minibatches

    @property
    def estimator_of_update(self) -> Estimator:
        """The estimator as it is computed: with a single update, the policy before it is the policy itself, and needs no pass of its own."""
        if self.estimator.old == "training" and self.updates == 1:
            return dataclasses.replace(self.estimator, old="itself")
        return self.estimator

    @property
    def penalty_shares_rows(self) -> bool:
        """Whether the policy loss and the KL penalty compare log-probabilities under one prompt, so that one pass serves both; gg in the loss
        has rows of its own where the policy loss is at the training prompt.
        """
        return self.kl.context in ("tt", "tg") or (self.kl.context == "gg" and self.kl.place == "loss" and self.estimator.auxiliary is not None)

    def check_group(self, of_group: int) -> None:
        """Raises ValueError for groups of `of_group` samples that the baseline cannot work with."""
        if self.selection is None:
            check_baseline(self.baseline, of_group)


def passes_needed(algorithm: Algorithm) -> frozenset[str]:
    """The passes without a gradient that an iteration makes before its update: of the policy or the reference, at the training or generation prompt.

    The policy at the generation prompt is not among them but for `truncated`: the sampler's own log-probabilities say it.
    """
    kl, gate = algorithm.kl, algorithm.gate
    in_reward = kl.place == "reward"
    wanted = {
        "policy_training": algorithm.estimator_of_update.old == "training" or gate.needs_log_probs or algorithm.pmi is not None or (in_reward and kl.context in ("tt", "tg")),
        "policy_generation": algorithm.estimator.truncate is not None,
        "reference_training": kl.context == "tt",
        "reference_generation": kl.context in ("gg", "tg"),
    }
    return frozenset(name for name, is_so in wanted.items() if is_so)
