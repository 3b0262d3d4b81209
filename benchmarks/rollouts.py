"""The rollouts of one iteration of GCD approval's demo (two arms, 4 prompts, 8 samples of each, 24
new tokens) against HF generate with PEFT.

python -m benchmarks.rollouts
"""

import dataclasses
import statistics

import numpy as np

from benchmarks.common import alternating, in_own_process, peer_model, save, seconds

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def planned_rollouts():
    """(the demo's experiment, its rollout plan, what iteration 0 asks)."""
    from configs.gcd_approval import STUDY
    from ip_jax.lab.reinforced import plan as reinforced_plan
    from ip_jax.lab.run import experiment_of
    from ip_jax.models import hub

    demo = experiment_of(STUDY, STUDY.preset("demo"))
    plan = reinforced_plan.rollout_plan(
        demo, reinforced_plan.runs_of(demo, ""), hub.load_tokenizer(demo.model.name)
    )
    return demo, plan, plan.ask(0)


def our_rollouts():
    """A function that makes the rollouts of both arms as `run` does, with nothing that stops early,
    and how many tokens those are.
    """
    import jax
    import jax.numpy as jnp

    from ip_jax.lab.experiment import decided
    from ip_jax.models import hub
    from ip_jax.models.decoder import split_decoder
    from ip_jax.models.lora import init_lora
    from ip_jax.rl.rollout import generate, sampler_options

    demo, plan, asked = planned_rollouts()
    model, lora = (
        hub.load_pretrained(demo.model.name, jnp.dtype(decided(demo.model).weights)),
        demo.rl.lora,
    )
    adapters = init_lora(jnp.arange(len(plan.runs)), model.config, lora)
    adapters = jax.tree.map(
        lambda x: x + 0.01 * jax.random.normal(jax.random.key(0), x.shape), adapters
    )
    decoder = split_decoder(model.config, model.params, adapters, lora)
    options = sampler_options(plan, (), demo.model.activations, demo.rl.slots)
    tokens = (
        len(plan.runs) * plan.options.groups * plan.options.samples * plan.options.max_new_tokens
    )

    def work():
        assert generate(decoder, plan, asked, options).samples.length.sum() == tokens

    return work, tokens


def peer_rollouts(dtype: str, attention: str, merged: bool):
    """The same prompts in HF generate, arm after arm with its adapter, which is folded into the
    weights before each call if `merged`.
    """
    import peft
    import torch

    demo, plan, asked = planned_rollouts()
    lora = peft.LoraConfig(
        r=demo.rl.lora.rank,
        lora_alpha=demo.rl.lora.alpha,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    arms = [run.arm for run in plan.runs]
    model = peft.get_peft_model(peer_model(dtype, attention), lora, adapter_name=arms[0])
    for arm in arms[1:]:
        model.add_adapter(arm, lora)
    model.eval()
    batches = [
        _left_padded([group.gen[0].token_ids for group in groups]) for groups in asked.groups
    ]

    def work(new: int = plan.options.max_new_tokens):
        for arm, (ids, mask) in zip(arms, batches, strict=True):
            model.set_adapter(arm)
            if merged:
                model.merge_adapter([arm])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=demo.rl.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=plan.options.samples,
                pad_token_id=0,
            )
            assert out.shape == (len(ids) * plan.options.samples, ids.shape[1] + new)
            if merged:
                model.unmerge_adapter()

    with torch.no_grad():
        work(2)
    return work


def _left_padded(prompts: list[np.ndarray]):
    import torch

    longest = max(map(len, prompts))
    ids = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(prompt) for prompt in prompts])
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def best_peer() -> tuple[dict, tuple]:
    """Seconds of every peer configuration (warmed up with two tokens), and the fastest one's
    key.
    """
    times = {}
    for key in [
        (dtype, attention, merged)
        for dtype in ("bfloat16", "float32")
        for attention in ("sdpa", "eager")
        for merged in (True, False)
    ]:
        with in_own_process(peer_rollouts, *key) as work:
            times[key] = min(seconds(work) for _ in range(2))
        print(f"peer {_name(key)}: {times[key]:.2f} s", flush=True)
    return times, min(times, key=times.get)


def _name(key: tuple) -> str:
    dtype, attention, merged = key
    return f"{dtype} {attention} {'merged' if merged else 'adapters apart'}"


def main() -> None:
    """Writes benchmarks/results/rollouts_gcd_approval.json."""
    ours, tokens = our_rollouts()
    first = seconds(ours)
    times, best = best_peer()
    with in_own_process(peer_rollouts, *best) as peer:
        result = alternating(ours, peer)
    demo, plan, _ = planned_rollouts()
    save(
        "rollouts_gcd_approval",
        {
            "what": (
                "one iteration's rollouts of gcd_approval's demo, SmolLM2-135M, every completion as"
                " long as its limit, ours in float32 activations"
            ),
            "target": 3.0,
            **result,
            "runs": len(plan.runs),
            "tokens": tokens,
            "rollout": dataclasses.asdict(plan.options),
            "ours_tokens_per_s": round(tokens / statistics.median(result["ours_s"]), 1),
            "peer_tokens_per_s": round(tokens / statistics.median(result["peer_s"]), 1),
            "ours_first_call_s": round(first, 1),
            "peer": _name(best),
            "peer_options_s": {_name(key): round(value, 2) for key, value in times.items()},
        },
    )


if __name__ == "__main__":
    main()
