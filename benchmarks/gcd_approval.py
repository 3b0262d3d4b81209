"""`gcd_approval`'s demo as a user runs it: two arms, 30 iterations of 4 prompts x 8 samples of at
most 24 tokens, evaluations and figures included.

python -m benchmarks.gcd_approval
"""

import pathlib
import tempfile

from benchmarks.common import command, save


def main() -> None:
    """Writes benchmarks/results/gcd_approval_cpu.json. The model is in its cache; compiled programs
    are not.
    """
    from etils import epath

    from configs.gcd_approval import PRESETS
    from ip_jax.models import hub
    from ip_jax.report.rl_view import load_rl_view

    hub.resolve(PRESETS["demo"].model.name)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "demo"
        measured = command(
            "gcd_approval",
            folder,
            {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(name) / "compiled")},
        )
        view, rl = load_rl_view(epath.Path(folder)), PRESETS["demo"].rl
        save(
            "gcd_approval_cpu",
            {
                "arms": list(PRESETS["demo"].arms),
                "iterations": rl.iterations,
                "prompts": rl.groups,
                "samples": rl.samples,
                "new_tokens": rl.max_new_tokens,
                **measured,
                "wrong_claims_confirmed_at_the_end": {
                    arm.name: round(arm.rates["hack", "neutral"].value, 3) for arm in view.arms
                },
            },
        )


if __name__ == "__main__":
    main()
