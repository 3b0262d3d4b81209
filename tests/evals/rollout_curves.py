"""Curves of one run from its counts."""

from ip_jax.evals import rl_tables


def curve_of(steps, hack, n=100, **columns):
    """A curve of hacks under the rollout prompt, without any correct completion; `columns` are
    further quantities by step.
    """
    rows = [
        {
            "arm": "a",
            "seed": 0,
            "step": int(step),
            "eval_prompt": "rollout",
            "n": n,
            "n_hack": int(k),
            "n_correct": 0,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (step, k) in enumerate(zip(steps, hack, strict=True))
    ]
    return rl_tables.curves_of(rl_tables.curves_table(rows), "rollout")["a", 0]
