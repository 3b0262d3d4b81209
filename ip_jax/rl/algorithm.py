"""The dials of a policy gradient: all that makes another program of an arm. Prompts, rewards and
learning rates are data instead.
"""

import dataclasses
import math

from ip_jax.rl.advantages import BASELINES, Aggregation, check_baseline
from ip_jax.rl.amplification import PMI_AGAINST, check_pmi
from ip_jax.rl.estimators import ESTIMATORS, Estimator, Kl
from ip_jax.rl.gates import Gate
from ip_jax.rl.selection import Selection


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """How an iteration's rewards become an update. Arms with equal ones are runs of one program.

    `baseline`: see `rl.advantages`. `selection` replaces advantages: the best samples are copied
    (supervised). `pmi` (gamma, bound) weighs positive advantages by 1 + gamma * clip(LLR, -bound,
    bound), where the training prompt is compared with the generation prompt, or, `pmi_against`
    "guide", with the arm's guide prompt (under one prompt for both the LLR of the first is 0).
    `entropy_bonus` is in the loss, a token's entropy in nats times it; a negative one is a penalty
    on entropy. `epochs` passes over the rows, each in `minibatches` updates. Raises ValueError for
    combinations that have no meaning, with the reason.
    """

    estimator: Estimator = ESTIMATORS["plain"]
    kl: Kl = Kl()
    baseline: str = "group_mean_std"
    aggregation: Aggregation = Aggregation("token_mean")
    gate: Gate = Gate("off")
    selection: Selection | None = None
    pmi: tuple[float, float] | None = None
    pmi_against: str = "generation"
    entropy_bonus: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    max_grad_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}: choose from {', '.join(BASELINES)}")
        if min(self.epochs, self.minibatches) < 1:
            raise ValueError(
                f"epochs is {self.epochs} and minibatches {self.minibatches}: both must be at"
                " least 1"
            )
        if not math.isfinite(self.entropy_bonus):
            raise ValueError(
                f"entropy_bonus is {self.entropy_bonus}: it must be a number, below 0 to make"
                " entropy costly"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(
                f"max_grad_norm is {self.max_grad_norm}: it must be a number above 0, or None for"
                " no bound"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: both must lie in [0, 1)")
        if self.pmi is not None:
            check_pmi(*self.pmi)
        if self.pmi_against not in PMI_AGAINST or (
            self.pmi is None and self.pmi_against != "generation"
        ):
            raise ValueError(
                f"pmi_against is {self.pmi_against!r} with pmi {self.pmi}: choose from"
                f" {', '.join(PMI_AGAINST)}; without a pmi leave it alone"
            )
        for reason, is_so in self._contradictions().items():
            if is_so:
                raise ValueError(reason)

    def _contradictions(self) -> dict[str, bool]:
        name, gated = self.estimator.name, self.gate.kind != "off"
        several, in_reward = self.updates > 1, self.kl.place == "reward"
        instead = "train_old" if self.estimator.auxiliary is None else "old 'generation' and a clip"
        return {
            (
                f"{name} compares a pass with itself, so from the second update of an "
                f"iteration on it forgets that the policy has moved: use {instead}, or one "
                "epoch and one minibatch"
            ): (several and self.estimator.old in ("itself", "noise") and not self.selection),
            (
                f"{name} and the gate {self.gate.kind} both draw, from the same random "
                "numbers: use a gate that draws none, or an estimator without noise"
            ): (self.estimator.old == "noise" and self.gate.draws),
            (
                f"{name} trains its policy loss at the generation prompt, where there is "
                "nothing to gate: use gate off"
            ): (gated and self.estimator.auxiliary is not None),
            (
                f"{name} trains its policy loss at the generation prompt, and kl.context is "
                f"{self.kl.context!r}: its penalty is gg"
            ): (self.kl.context in ("tt", "tg") and self.estimator.auxiliary is not None),
            (
                f"gate.rejected is {self.gate.rejected} and the loss has the penalty "
                f"{self.kl.context}, whose policy is at the training prompt: samples that "
                "go back to the generation prompt have none there: use gg, or put it in "
                "the reward"
            ): (self.gate.rejected != "drop" and self.kl.context in ("tt", "tg") and not in_reward),
            (
                f"gate.rejected is {self.gate.rejected} and minibatches {self.minibatches}: "
                "samples that go back to the generation prompt are updated with the "
                "others, in one minibatch"
            ): (self.gate.rejected != "drop" and self.minibatches > 1),
            (
                "a selection copies samples and has no ratio, penalty, gate or PMI weight: "
                "use plain, without kl and with gate off"
            ): (
                self.selection is not None
                and (name != "plain" or self.kl.context != "none" or gated or self.pmi is not None)
            ),
            (
                f"kl.estimator is {self.kl.estimator!r} and its place the reward: there "
                "only k1 is added up along a sequence"
            ): (self.kl.context != "none" and in_reward and self.kl.estimator != "k1"),
        }

    @property
    def updates(self) -> int:
        """Optimizer updates of one iteration."""
        return self.epochs * self.minibatches

    @property
    def estimator_of_update(self) -> Estimator:
        """The estimator as it is computed: with a single update, the policy before it is the policy
        itself, and needs no pass of its own.
        """
        if self.estimator.old == "training" and self.updates == 1:
            return dataclasses.replace(self.estimator, old="itself")
        return self.estimator

    @property
    def penalty_shares_rows(self) -> bool:
        """Whether the loss has a KL penalty whose policy is at the prompt of the policy loss, so
        that one pass serves both; gg has rows of its own where the policy loss is at the training
        prompt.
        """
        return self.kl.place == "loss" and (
            self.kl.context in ("tt", "tg")
            or (self.kl.context == "gg" and self.estimator.auxiliary is not None)
        )

    def check_group(self, of_group: int) -> None:
        """Raises ValueError for groups of `of_group` samples that the baseline cannot work with."""
        if self.selection is None:
            check_baseline(self.baseline, of_group)

    def check_guided(self) -> None:
        """Raises ValueError for what has no meaning on guided samples, whose log-probabilities are
        not the policy's at the generation prompt.
        """
        name = self.estimator.name
        reasons = {
            (
                f"{name} clips the ratio to the policy at the generation prompt: use "
                "importance_sequence, which weighs guided samples exactly, or plain"
            ): (self.estimator.old == "generation" and self.estimator.clip is not None),
            (
                f"{name} corrects the sampler's numerics, and would take guidance for an "
                "error: use importance_sequence or plain"
            ): (self.estimator.truncate is not None),
            (
                f"the gate {self.gate.kind} compares with the policy at the generation "
                "prompt: use off, absolute, oracle, or random at a rate"
            ): (self.gate.compares_prompts),
            (
                "a PMI weight compares with the policy at the generation prompt: use "
                "pmi_against guide"
            ): (self.pmi is not None and self.pmi_against == "generation"),
            (
                f"{name} compares samples that a gate sends back with the policy at the "
                "generation prompt: let the gate drop them, or use one update"
            ): (self.gate.rejected != "drop" and self.estimator_of_update.old == "training"),
            (
                "a penalty gg in the reward is of samples of the policy at the generation "
                "prompt: put it in the loss, or use tt"
            ): (self.kl.context == "gg" and self.kl.place == "reward"),
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise ValueError(
                    f"guided samples are not those of the policy at the generation prompt: {reason}"
                )


def check_guidance(where: str, guidance: float, has_guide: bool, algorithm: Algorithm) -> None:
    """Raises ValueError for a guidance that is no weight, a guide prompt that is missing or that
    nothing uses, and as `Algorithm.check_guided`.
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(f"{where}: guidance is {guidance}: it must be a number of at least 0")
    if has_guide != (guidance > 0 or algorithm.pmi_against == "guide"):
        raise ValueError(
            f"{where} has {'a' if has_guide else 'no'} guide prompt: guidance above 0 or a PMI"
            " weight against the guide needs one, and nothing else uses it"
        )
    if guidance > 0:
        algorithm.check_guided()


def passes_needed(algorithm: Algorithm) -> frozenset[str]:
    """The passes without a gradient that an iteration makes before its update: of the policy or the
    reference, at the training or generation prompt.

    The policy at the generation prompt is not among them but for `truncated`: the sampler's own
    log-probabilities say it.
    """
    kl, gate = algorithm.kl, algorithm.gate
    in_reward = kl.place == "reward"
    wanted = {
        "policy_training": (
            algorithm.estimator_of_update.old == "training"
            or gate.needs_log_probs
            or algorithm.pmi is not None
            or (in_reward and kl.context in ("tt", "tg"))
        ),
        "policy_generation": algorithm.estimator.truncate is not None,
        "policy_guide": algorithm.pmi_against == "guide",
        "reference_training": kl.context == "tt",
        "reference_generation": kl.context in ("gg", "tg"),
    }
    return frozenset(name for name, is_so in wanted.items() if is_so)
