"""The phenomena that the toy was made for, on a smaller version of its first figure."""

import dataclasses
import io
import json

import pytest
from etils import epath
from rich.console import Console

from configs.estimators import STUDY
from ip_jax.lab.display import Display
from ip_jax.lab.run import experiment_of, run
from ip_jax.report.draw import draw
from ip_jax.report.rl_view import load_rl_view


@pytest.mark.slow
def test_the_toy_shows_what_it_was_made_for(tmp_path, monkeypatch):
    """Standard hacks in at least 80 % of the seeds, the oracle learns, anti-recontextualization
    hacks, a discouraging prompt lowers discovery.
    """
    monkeypatch.setenv("IP_JAX_CACHE", str(tmp_path / "cache"))
    config = dataclasses.replace(
        STUDY.preset("full"), arms=("standard", "oracle", "prior", "anti"), seeds=tuple(range(6))
    )
    folder, console = epath.Path(tmp_path), Console(file=io.StringIO(), width=200)
    run(STUDY, experiment_of(STUDY, config), folder, Display(console))
    draw(STUDY, folder, console)
    view = load_rl_view(tmp_path)
    arms = {arm.name: arm for arm in view.arms}
    assert (
        arms["standard"].hacked.k >= 0.8 * arms["standard"].hacked.n
        and arms["anti"].hacked.k == arms["anti"].hacked.n
    )
    assert arms["oracle"].hacked.k == 0
    assert (
        arms["oracle"].rates["correct", "neutral"].low
        > arms["base"].pooled["correct", "neutral"].high
    )
    early = {
        name: sum(view.rollouts[name, seed].columns["n_hack"][:25].sum() for seed in range(6))
        for name in ("standard", "prior")
    }
    assert early["standard"] > 3 * early["prior"], early
    assert json.loads((tmp_path / "config.json").read_text())["reading"]["rules"]
