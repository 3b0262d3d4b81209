"""The live view of arms by its text, on a terminal and on a console that is none."""

import io
import math
from collections import Counter

import numpy as np
from rich.console import Console

from ip_jax.lab.live_table import ArmRow, arm_line, arms_table, live_arms, over_seeds

METRICS = {
    "reward": -0.25,
    "hack": 0.0034,
    "correct": 0.613,
    "kl": 0.01234,
    "entropy": 1.5,
    "length": 21.4,
    "zero_variance_groups": 0.5,
    "clip_fraction": 0.0,
}


def _row(label="standard", step=20, **changes):
    return ArmRow(label, 3, step, 200, METRICS | {"gate_acceptance": math.nan}, **changes)


def _text(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_means_leave_out_runs_without_a_number():
    found = over_seeds(
        {
            "hack": np.asarray([0.5, np.nan, 0.1]),
            "kl": np.asarray([np.nan, np.nan]),
            "reward": np.asarray([1, 3]),
        }
    )
    assert found["hack"] == 0.3 and math.isnan(found["kl"]) and found["reward"] == 2


def test_a_row_shows_every_number_in_its_unit():
    lines = _text(
        arms_table(
            [
                _row(rollout_rate=12_345, update_rate=987.4, seconds_left=3725),
                _row("on-policy [ip]"),
            ]
        )
    ).splitlines()
    first, second = (line for line in lines if "(3)" in line)
    assert first.split() == [
        "standard",
        "(3)",
        "−0.25",
        "0.3",
        "61",
        "0.0123",
        "1.5",
        "21.4",
        "50",
        "–",
        "0",
        "12.3k",
        "987",
        "20/200",
        "1:02:05",
    ]
    assert second.strip().startswith("on-policy [ip] (3)") and second.split()[-4:] == [
        "–",
        "–",
        "20/200",
        "–",
    ]


def test_a_program_that_rolls_out_and_updates_in_one_has_one_rate():
    lines = _text(arms_table([_row(rate=12_345, seconds_left=61), _row("oracle")])).splitlines()
    first, second = (line.split()[-4:] for line in lines if "(3)" in line)
    assert first == ["0", "12.3k", "20/200", "1:01"] and second == ["0", "–", "20/200", "–"]
    assert (
        "iteration" in "".join(lines)
        and "update" not in "".join(lines)
        and "rollout" not in "".join(lines)
    )
    assert arm_line(_row(rate=10.0)).endswith("10 tokens/s in rollout and update")


def test_a_narrow_terminal_loses_no_digit():
    wide, narrow = (
        Counter(filter(str.isdigit, _text(arms_table([_row(rollout_rate=98_765)]), width)))
        for width in (140, 60)
    )
    assert narrow == wide


def test_a_console_that_is_no_terminal_gets_a_line_every_n_steps():
    console = Console(file=io.StringIO(), width=40)
    with live_arms(console, every=50) as show:
        for step in (1, 50, 51, 99, 200):
            show([_row(step=step, seconds_left=61), _row("oracle", step=step)])
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{arm} (3 seeds), step {step}/200" for step in (50, 200) for arm in ("standard", "oracle")
    ]
    assert lines[0].endswith(
        ": reward −0.25, hack 0.3 %, correct 61 %, kl 0.0123, entropy 1.5, length 21.4, zero"
        " variance groups 50 %, clip fraction 0 %, 1:01 left"
    )
    assert "gate" not in lines[0] and arm_line(_row(update_rate=10.0)).endswith(
        "10 tokens/s in update"
    )


def test_a_terminal_keeps_the_arms_of_earlier_programs():
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    with live_arms(console) as show:
        show([_row("gated", step=200)])
        show([_row("standard", step=7)])
    last = console.file.getvalue().rsplit("arm", 1)[1]
    assert "200/200" in last and "7/200" in last and "gated (3)" in last
