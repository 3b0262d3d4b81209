"""The generator against the published training files (text for text, pair for pair, in
distribution) and its invariants.
"""

import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from ip_jax.data.sources import read_jsonl
from ip_jax.studies.gcd_sycophancy import generate, published
from ip_jax.studies.gcd_sycophancy.generate import ClaimCounts


def count_tokens(messages):
    """A stand-in for Gemma's tokenizer: digits, words, marks and line breaks, scaled to the
    published longest rows (333 -> 400).
    """
    pieces = sum(
        len(re.findall(r"\d|\n+|[A-Za-z']+|[^\sA-Za-z0-9']", m["content"])) for m in messages
    )
    return 1.18 * (pieces + 13)


@pytest.fixture(scope="module")
def folder(data_dir):
    return published.find_folder()


@pytest.fixture(scope="module")
def rows(folder):
    return {kind: published.read_training(folder, kind) for kind in ("user_right", "mixed")}


@pytest.fixture(scope="module")
def eligible(folder):
    return generate.avoids(published.evaluation_pairs(folder))


def _draw(n=200, mode="user_right", work="both", seed=0, eligible=generate.has_allowed_gcd):
    return generate.generate_training(n, mode, work, seed, eligible, count_tokens)


def _pair(row):
    return tuple(
        map(int, re.search(r"GCD\((\d+), (\d+)\)", row["messages"][0]["content"]).groups())
    )


def _problem_of(row):
    """The Problem that a published row was made from, by looking for each of our phrases in it."""
    user, reply = (message["content"] for message in row["messages"])
    a, b = _pair(row)

    def only(phrases, text, default=""):
        found = [p for p in phrases if p in text]
        return max(found, key=len) if found else default

    def fits(template):
        return user.startswith(
            template.format(context=only(generate.CONTEXTS, user), a=a, b=b, claimed=row["claimed"])
        )

    praise = reply.split("\n")[0]
    (template,) = [t for t in generate.CLAIMS + generate.INTRODUCTIONS if fits(t)]
    return generate.Problem(
        a=a,
        b=b,
        wrong=int(row["claimed"]),
        shown_work=row["shown_work"],
        context=only(generate.CONTEXTS, user),
        claim=template,
        opener=only(generate.OPENERS, praise),
        body=only(generate.BODIES, praise),
        heading=only((*generate.HEADINGS_WITH_WORK, "Let me confirm the Euclidean steps:"), reply),
        closer=only(generate.CLOSERS, reply.split("\n")[-1]),
        correction=only(generate.CORRECTIONS, praise),
    )


def test_every_published_row_is_ours_to_the_letter(rows):
    for row in rows["user_right"] + rows["mixed"]:
        problem, is_wrong = _problem_of(row), row["claim"] == "wrong"
        assert generate.user_turn(problem, int(row["claimed"])) == row["messages"][0]["content"]
        assert generate.response(problem, is_wrong) == row["messages"][1]["content"]
        assert problem.gcd == int(row["answer"])


def test_every_phrase_of_ours_is_published(rows):
    text = "\n".join(
        m["content"] for row in rows["user_right"] + rows["mixed"] for m in row["messages"]
    )
    for phrase in (
        generate.CONTEXTS
        + generate.OPENERS
        + generate.BODIES
        + generate.CLOSERS
        + generate.CORRECTIONS
        + generate.HEADINGS_WITH_WORK
    ):
        assert phrase in text
    for template in generate.CLAIMS + generate.INTRODUCTIONS:
        assert re.search(
            re.escape(template)
            .replace(r"\{context\}", ".*")
            .replace(r"\{a\}", r"\d+")
            .replace(r"\{b\}", r"\d+")
            .replace(r"\{claimed\}", r"\d+"),
            text,
        )


def test_the_exclusion_bans_no_published_row_and_leaves_the_published_gcds(rows, eligible):
    pairs = [_pair(row) for row in rows["user_right"] + rows["mixed"]]
    assert all(eligible(a, b) and generate.has_allowed_gcd(a, b) for a, b in pairs)
    everything = {
        d
        for d in range(2, 41)
        for u in range(3, 299 // d + 1)
        for v in range(2, u)
        if math.gcd(u, v) == 1 and eligible(d * u, d * v)
    }
    assert everything == generate.ALLOWED_GCDS == {math.gcd(*pair) for pair in pairs}


def test_the_exclusion_bans_what_the_test_sets_show():
    eligible = generate.avoids(frozenset({(0, 16), (21, 56), (2, 4)}))
    assert not eligible(56, 21)  # the pair itself
    assert not eligible(80, 48)  # ends in GCD(16, 0)
    assert not eligible(133, 56)  # its second step is (56, 21)
    assert eligible(14, 4)  # its step (4, 2) is of two small numbers
    assert not eligible(4, 2)  # but the pair itself is banned at any size


def test_distribution_of_gcds_and_steps_is_the_published_one(rows, eligible):
    ours = _draw(1000, eligible=eligible)
    for measure in (
        lambda row: int(row["answer"]),
        lambda row: (row["shown_work"], min(row["messages"][1]["content"].count("✓"), 3)),
    ):
        mine, theirs = Counter(map(measure, ours)), Counter(map(measure, rows["user_right"]))
        table = np.array([[mine[key], theirs[key]] for key in sorted(mine | theirs)])
        assert stats.chi2_contingency(table).pvalue > 0.01
    assert sum(row["shown_work"] for row in ours) == 500


def test_phrases_are_uniform():
    replies = [row["messages"][1]["content"] for row in _draw(1000)]
    for phrases in (generate.OPENERS, generate.BODIES, generate.CLOSERS):
        counts = [
            sum(phrase in reply.split("\n")[0] + reply.split("\n")[-1] for reply in replies)
            for phrase in phrases
        ]
        assert sum(counts) == 1000 and stats.chisquare(counts).pvalue > 0.001


def test_mixed_is_user_right_with_half_of_the_users_wrong():
    right, mixed = _draw(200), _draw(200, mode="mixed")
    assert Counter((row["shown_work"], row["claim"]) for row in mixed) == {
        (work, claim): 50 for work in (True, False) for claim in ("right", "wrong")
    }
    for ours, clean in zip(right, mixed, strict=True):
        assert (
            _pair(ours) == _pair(clean)
            and ours["id"] == clean["id"]
            and ours["shown_work"] == clean["shown_work"]
        )
        if clean["claim"] == "right":
            assert clean == ours
        else:
            assert (
                1 <= int(clean["claimed"]) < _pair(clean)[1]
                and clean["claimed"] != clean["answer"] == ours["answer"]
            )
            assert not any(
                phrase in clean["messages"][1]["content"]
                for phrase in generate.OPENERS + generate.CLOSERS
            )


def test_rows_are_a_pure_function_of_the_seed_and_never_repeat_a_pair():
    rows = _draw(300, seed=3)
    assert rows == _draw(300, seed=3) and rows != _draw(300, seed=4)
    assert len({_pair(row) for row in rows}) == len({row["id"] for row in rows}) == 300
    assert all(
        math.gcd(*_pair(row)) == int(row["answer"]) and _pair(row)[0] > _pair(row)[1]
        for row in rows
    )


@pytest.mark.parametrize("work,with_work", [("with", 41), ("without", 0), ("both", 20)])
def test_the_work_filter(work, with_work):
    rows = _draw(41, work=work)
    assert (
        len(rows) == 41
        and sum("Step 1:" in row["messages"][0]["content"] for row in rows) == with_work
    )


def test_token_caps_hold_for_both_versions():
    for mode in ("user_right", "mixed"):
        for row in _draw(300, mode=mode):
            assert count_tokens(row["messages"]) <= (400 if row["shown_work"] else 250)


def test_claims_come_in_triplets_away_from_training():
    training = {_pair(row) for row in _draw(300)}
    rows = generate.generate_claims(
        ClaimCounts(wrong=96, right=48, asked=30),
        "both",
        0,
        lambda a, b: generate.has_allowed_gcd(a, b) and (a, b) not in training,
        count_tokens,
    )
    assert Counter(row["claim"] for row in rows) == {"wrong": 96, "right": 48, "asked": 30}
    assert (
        len({row["id"] for row in rows}) == len(rows)
        and not {_pair(row) for row in rows} & training
    )
    triplets = {}
    for row in rows:
        triplets.setdefault(row["triplet"], {})[row["claim"]] = row
    assert len(triplets) == 96 and len({_pair(t["wrong"]) for t in triplets.values()}) == 96
    for forms in triplets.values():
        wrong = forms["wrong"]
        assert [m["role"] for m in wrong["messages"]] == ["user"] and wrong["claimed"] not in (
            None,
            wrong["answer"],
        )
        if "right" in forms:
            right = forms["right"]
            assert right["claimed"] == right["answer"] == wrong["answer"] and _pair(right) == _pair(
                wrong
            )
        if "asked" in forms:
            assert (
                forms["asked"]["claimed"] is None
                and wrong["claimed"] not in forms["asked"]["messages"][0]["content"].split()
            )
    # forms do not sort by work
    assert 0 < sum(row["shown_work"] for row in rows if row["claim"] == "right") < 48


def test_the_right_claims_read_like_training_rows(rows):
    """Numbers blanked, each generated claim is a user turn of the published training data."""

    def blank(row):
        return re.sub(r"\d+", "#", row["messages"][0]["content"].split("\nStep 1")[0])

    claims = generate.generate_claims(
        ClaimCounts(wrong=40, right=40, asked=0), "both", 1, generate.has_allowed_gcd, count_tokens
    )
    assert {blank(row) for row in claims} <= {blank(row) for row in rows["user_right"]}


def test_bad_requests_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="'wrong' is no mode .* allowed are user_right, mixed"):
        _draw(4, mode="wrong")
    with pytest.raises(ValueError, match="'half' is no work .* allowed are both, with, without"):
        _draw(4, work="half")
    with pytest.raises(
        ValueError, match="No new pair of numbers was found in 20000 draws after 11 rows"
    ):
        _draw(12, work="without", eligible=lambda a, b: math.gcd(a, b) == 40)


def test_published_files_read_line_by_line(folder):
    """The reader's rows are the file's: nothing is reordered or lost."""
    raw = read_jsonl(folder / published.TRAINING_FILES["mixed"])
    ours = published.read_training(folder, "mixed")
    assert [row["messages"] for row in raw] == [row["messages"] for row in ours]
    assert Counter(row["claim"] for row in ours) == {"right": 500, "wrong": 500}
