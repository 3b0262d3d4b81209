"""The toy: 20 seeds of six arms, from compilation to figures (pretraining of the base model beside
it), and whether it shows what it was made for.

python -m benchmarks.toy
"""

import dataclasses
import io
import tempfile

from benchmarks.common import save, seconds

ARMS = ("standard", "oracle", "prior", "anti", "on_policy_ip", "plain")


def main() -> None:
    """Writes benchmarks/results/toy_cpu.json."""
    from etils import epath
    from rich.console import Console

    from configs.estimators import STUDY
    from ip_jax.lab.display import Display
    from ip_jax.lab.run import experiment_of, run
    from ip_jax.report.draw import draw
    from ip_jax.report.rl_view import load_rl_view
    from ip_jax.studies.toy.pretraining import base_params

    config = dataclasses.replace(STUDY.preset("full"), arms=ARMS)

    def figure(folder: epath.Path, console: Console) -> None:
        run(STUDY, experiment_of(STUDY, config), folder, Display(console))
        draw(STUDY, folder, console)

    with tempfile.TemporaryDirectory() as name:
        folder, quiet = epath.Path(name), Console(file=io.StringIO())
        pretraining = seconds(lambda: base_params(config.toy, folder / "base"))
        running = seconds(lambda: figure(folder / "figure", quiet))
        view = load_rl_view(folder / "figure")
        early = {
            arm: int(
                sum(view.rollouts[arm, seed].columns["n_hack"][:25].sum() for seed in config.seeds)
            )
            for arm in ARMS
        }
        save(
            "toy_cpu",
            {
                "seeds": len(config.seeds),
                "iterations": config.rl.iterations,
                "samples_an_iteration": config.rl.groups * config.rl.samples,
                "pretraining_s": round(pretraining, 1),
                "figure_s": round(running, 1),
                "hacked_runs": {
                    arm.name: f"{arm.hacked.k}/{arm.hacked.n}" for arm in view.arms if arm.hacked
                },
                "correct_at_x_0": {
                    arm.name: round(arm.rates["correct", "neutral"].value, 3) for arm in view.arms
                },
                "hacks_in_25_iterations": early,
            },
        )


if __name__ == "__main__":
    main()
