"""ip-jax check: look before you train."""

import argparse
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ip_jax.cli import studies

WRONG = 2  # the exit code where something is wrong
CUT = 1200  # characters of a conversation that are shown


def main(arguments: list[str], console: Console) -> None:
    """Trains nothing and loads no weights. Exits with WRONG where something is wrong; raises
    ValueError as a run would before it loads a model.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--arm")
    asked = studies.read("check", arguments, own)
    from ip_jax.lab.base_model import load_tokenizer
    from ip_jax.lab.run import experiment_of
    from ip_jax.lab.supervised.plan import Supervised

    if asked.study is None or asked.study.engine is not None:
        raise ValueError(f"{arguments[0]} trains no language model: there is nothing to look at")
    experiment = experiment_of(asked.study, asked.preset)
    tokenizer = load_tokenizer(experiment.model)
    if isinstance(experiment, Supervised):
        wrong = _check_supervised(asked, experiment, tokenizer, console)
    else:
        wrong = _check_reinforced(asked, experiment, tokenizer, console)
    if wrong:
        raise SystemExit(WRONG)


def _check_supervised(asked, experiment, tokenizer, console: Console) -> bool:
    from ip_jax.lab import inspection

    trained = [arm for arm in experiment.arms if arm.train_prompt is not None]
    for arm in _chosen(trained, asked.options.arm):
        _heading(console, f"{arm.label} ({arm.name}), prompt {arm.train_prompt}")
        for shown in inspection.examples_of_arm(experiment, arm, tokenizer):
            console.print(
                f"{shown.example_id}: {shown.tokens} tokens, {shown.counted} carry loss",
                style="dim",
                highlight=False,
            )
            console.print(_marked(shown.pieces, "green", console))
            if any(piece.marked for piece in shown.changes):
                console.print("what the prompt adds:", style="dim")
                console.print(_marked(shown.changes, "cyan", console))
    _heading(console, "scorer")
    for name, text, verdict in inspection.scored_examples(asked.study, experiment):
        said = text.strip()[:60] or "(empty reply)"
        console.print(f"{name}: {escape(said)} -> {escape(str(verdict))}", highlight=False)
    _heading(console, "system slot")
    console.print(inspection.system_slot(experiment, tokenizer), highlight=False, markup=False)
    found = inspection.findings(asked.study, experiment, tokenizer)
    if not found.wrong:  # a run would refuse what is wrong, and so does a plan of it
        _heading(console, "cost")
        _cost(asked, experiment, console)
    _report(console, found.wrong, found.missing)
    return bool(found.wrong)


def _check_reinforced(asked, experiment, tokenizer, console: Console) -> bool:
    """The first task of each arm under its two prompts, and the grade of an empty reply."""
    from ip_jax.lab.reinforced import plan
    from ip_jax.prompts.chat import render_prompt

    plan.check(experiment)
    for arm in _chosen(experiment.arms, asked.options.arm):
        _heading(console, f"{arm.label} ({arm.name}), reward {arm.reward}")
        messages = experiment.environment.messages(experiment.tasks[0])
        for what, prompts in (("sampled", arm.gen_prompt), ("trained", arm.train_prompt)):
            choice = prompts.draw(experiment.seeds[0], 0, 0, 0)
            ids = render_prompt(tokenizer, choice.messages(messages))
            console.print(f"{what} under {choice.prompt.name}: {len(ids)} tokens", style="dim")
            console.print(tokenizer.decode(ids), markup=False, highlight=False)
    _heading(console, "reward")
    graded = experiment.environment.grade(experiment.tasks[0], "")
    console.print(f"(empty reply) -> {graded}", markup=False, highlight=False)
    _heading(console, "cost")
    _cost(asked, experiment, console)
    one = ["there is one seed: how training runs differ stays unknown (--seeds 0 1 2)"]
    _report(console, [], one if len(experiment.seeds) == 1 else [])
    return False


def _chosen(arms: Sequence, name: str | None) -> list:
    if name is None:
        return list(arms)
    chosen = [arm for arm in arms if arm.name == name]
    if not chosen:
        names = ", ".join(arm.name for arm in arms)
        raise ValueError(f"no arm that trains is called {name!r}: there is {names}")
    return chosen


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold", highlight=False, markup=False)


def _marked(pieces, colour: str, console: Console) -> Text:
    """The pieces as they are, the marked ones in a colour, or between marks where there are no
    colours; long ones are cut in the middle.
    """
    begin, end = ("", "") if console.color_system else ("«", "»")
    text = Text()
    for piece in pieces:
        if piece.marked:
            text.append(f"{begin}{_cut(piece.text)}{end}", colour)
        else:
            text.append(_cut(piece.text))
    return text


def _cut(text: str) -> str:
    if len(text) <= CUT:
        return text
    return f"{text[: CUT // 2]} [... {len(text) - CUT} characters ...] {text[-CUT // 2 :]}"


def _cost(asked, experiment, console: Console) -> None:
    """Memory and floating-point operations by the formulas of `ip-jax plan`, and how long these
    take at the least.
    """
    from ip_jax.planning import chips, command

    topology = chips.read_topology("local")
    planned = command.by_formula(
        command.subject_of(asked.preset, None, topology.platform, lambda _: experiment), topology
    )
    flops = sum(phase.times * phase.cost.flops for phase in planned.phases)
    needed = max(planned.needed.values())
    console.print(
        f"{experiment.model.name}: {planned.grouping}; {needed / 2**30:.1f} GiB of memory a device,"
        f" {flops / 1e12:.3g} TFLOP in all",
        highlight=False,
    )
    rate = _products(experiment.model.weights)
    console.print(
        f"at least {flops / rate / 60:.1f} minutes at the {rate / 1e9:.0f} GFLOP/s that a product"
        f" of matrices in {experiment.model.weights} reaches here",
        highlight=False,
    )


def _products(dtype: str, size: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of products of [size, size] matrices on this device."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a: a @ a)
    matrix = product(jnp.ones((size, size), dtype)).block_until_ready()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        product(matrix).block_until_ready()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def _report(console: Console, wrong: list[str], missing: list[str]) -> None:
    console.print()
    for line in wrong:
        console.print(f"[red]wrong:[/red] {escape(line)}", highlight=False)
    for line in missing:
        console.print(f"[yellow]note:[/yellow] {escape(line)}", highlight=False)
    if not wrong:
        console.print("[green]nothing is wrong[/green]: ip-jax run trains this")
