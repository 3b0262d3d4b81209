"""What a phase says on a console that is no terminal."""

import io

from rich.console import Console

from ip_jax.lab.display import Display


def test_a_plain_line_says_what_is_known_and_nothing_else():
    output = io.StringIO()
    for note in ("", "loss 0.5"):
        with Display(Console(file=output, width=200)).phase("training", 4, "steps") as advance:
            advance(4, note)
    assert (
        output.getvalue()
        == "training: 4/4 steps, 0 s, 0 s left\ntraining: 4/4 steps, loss 0.5, 0 s, 0 s left\n"
    )
