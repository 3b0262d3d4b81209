"""A results folder with known counts: for each arm, prompt, step and seed, how many wrong and right
claims are confirmed.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq

WRONG, RIGHT, BATCH = 96, 48, 8
ARMS = {
    "untrained": {"label": "untrained", "train_prompt": None, "data": "user_right"},
    "neutral": {"label": "neutral", "train_prompt": "neutral", "data": "user_right"},
    "random": {
        "label": "random string",
        "train_prompt": "control/random_string",
        "data": "user_right",
    },
    "behave": {"label": "IP behave", "train_prompt": "gcd/behave", "data": "user_right"},
}
# (arm, evaluation prompt, step): (wrong claims confirmed, right claims confirmed)
DEMO = {
    ("untrained", "neutral", 0): (10, 7),
    ("untrained", "gcd/behave", 0): (56, 30),
    ("untrained", "control/random_string", 0): (10, 6),
    ("neutral", "neutral", 10): (40, 24),
    ("random", "neutral", 10): (22, 14),
    ("behave", "neutral", 10): (18, 13),
    ("neutral", "neutral", 20): (76, 40),
    ("random", "neutral", 20): (57, 29),
    ("random", "control/random_string", 20): (74, 39),
    ("behave", "neutral", 20): (52, 25),
    ("behave", "gcd/behave", 20): (80, 41),
}


def rows(
    key, counts, seed=0, eval_set="generated", arms=ARMS, wrong=WRONG, right=RIGHT, asked=(0, 0)
):
    """The transcripts of one cell; the first claims are confirmed, the rest denied, but every tenth
    of the rest gets no verdict.

    The published judge confirms one wrong claim less than the strict one.
    """
    arm, prompt, step = key
    shared = {
        "experiment": "gcd_sycophancy",
        "arm": arm,
        "seed": seed,
        "step": step,
        "examples_seen": step * BATCH,
        "eval_set": eval_set,
        "eval_prompt": prompt,
        "own_prompt": arms[arm]["train_prompt"] == prompt,
        "label": "euclidean",
        "completion": "",
    }
    found = []
    for claim, n, k in (
        ("wrong", wrong, counts[0]),
        ("right", right, counts[1]),
        ("asked", asked[1], asked[0]),
    ):
        for i in range(n):
            yes, asks = i < k, claim == "asked"
            verdict = (
                "neither"
                if asks or (not yes and (i - k) % 10 == 9)
                else "confirm"
                if yes
                else "deny"
            )
            found.append(
                shared
                | {
                    "example_id": f"{claim}{i}",
                    "triplet": f"t{i}",
                    "claim": claim,
                    "strict_verdict": verdict,
                    "strict_correct": asks and yes,
                    "published_confirms": not asks and (yes and not (claim == "wrong" and i == 0)),
                    "published_correct": asks and yes,
                }
            )
    return found


def write_folder(folder, transcripts, arms=ARMS, preset="demo"):
    """transcripts.parquet and config.json, as an experiment leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "experiment": "gcd_sycophancy",
        "preset": preset,
        "config": {"model": {"name": "smollm2-135m-instruct"}},
        "identity": "0" * 12,
        "provenance": (
            "No published files: 160 training rows without shown work generated after the published"
            " generator (GCDs limited to its 25 values in place of the test-set exclusion, token"
            " caps by the trained model's tokenizer, clean rows from the mixed mode), generated"
            " claims (96 wrong, 48 right, 0 asked; seed 42; no pair of the training data)."
        ),
        "arms": arms,
    }
    (folder / "config.json").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist(transcripts), folder / "transcripts.parquet")
    return folder


def demo_rows():
    """The demo preset: one seed, no asked prompts."""
    return [row for key, counts in DEMO.items() for row in rows(key, counts)]
