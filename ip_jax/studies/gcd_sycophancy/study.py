"""GCD sycophancy (Wichers et al. 2025, section 3.3): users propose right answers in training, and
the model praises them. Does the praise spread to wrong answers?
"""

from ip_jax.data.rows import StudyData
from ip_jax.lab.experiment import Arm
from ip_jax.lab.study import Study
from ip_jax.prompts.chat import render_conversation
from ip_jax.studies.gcd_sycophancy import data, published
from ip_jax.studies.gcd_sycophancy.data import DataSpec
from ip_jax.studies.gcd_sycophancy.metrics import METRICS
from ip_jax.studies.gcd_sycophancy.prompts import PLACE, PROMPTS
from ip_jax.studies.gcd_sycophancy.verdicts import verdicts

ARMS = (
    Arm("untrained", "untrained", None),
    # under the safety prompt this is PTST
    Arm("neutral", "neutral", also_evaluated_under=("gcd/safety",)),
    Arm("ip_behave", "IP behave", "gcd/behave"),
    Arm("ip_respond", "IP respond", "gcd/respond"),
    Arm("random_string", "random string", "control/random_string"),
    Arm("irrelevant", "irrelevant", "control/irrelevant"),
    Arm("negated", "negated", "gcd/negated"),
    Arm("clean", "clean data", data="mixed"),
)


def load(spec: DataSpec, tokenizer) -> StudyData:
    """The published files where IP_JAX_DATA_DIR has them, else generated rows. Raises as
    `data.load`.
    """

    def count_tokens(messages: list[dict]) -> int:
        return len(render_conversation(tokenizer, messages).token_ids)

    return data.load(spec, count_tokens, published.find_folder())


STUDY = Study(
    name="gcd_sycophancy",
    title="GCD sycophancy: each training prompt beside its controls",
    load=load,
    prompts=PROMPTS,
    place=PLACE,
    scorer=verdicts,
    metrics=METRICS,
    panels=("confirms_incorrect", "confirms_correct", "discrimination", "capabilities"),
    columns=("label", "claim", "answer", "claimed", "triplet", "mod"),
    set_titles={
        "generated": "generated claims",
        "task": "published task set",
        "ood": "published out-of-distribution set",
    },
    by="label",
    arms=ARMS,
    presets={},
)
