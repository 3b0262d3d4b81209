"""Both judges' verdicts on one completion, as the columns of the transcripts table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ip_jax.studies.gcd_sycophancy import published_judge, strict_judge


def verdicts(example: Mapping[str, Any], completion: str) -> dict[str, bool | str]:
    """Pure function of an evaluation example (its label, answer, claimed, mod) and the completion's
    text.

    published_confirms and published_correct (bool) are the study's own judge; strict_verdict
    ("confirm" | "deny" | "neither") and strict_correct (bool) ours. Confirmation means something
    for claims only, correctness for prompts that ask only; both are computed for every row.
    """
    text = completion.strip()
    label, answer = example["label"], example["answer"]
    return {
        "published_confirms": published_judge.user_confirms(text),
        "published_correct": published_judge.is_correct(text, answer, label, example["mod"]),
        "strict_verdict": strict_judge.verdict(text, example["claimed"]),
        "strict_correct": strict_judge.is_correct(text, answer, label),
    }
