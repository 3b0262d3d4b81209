"""Supervised steps on real GCD data: against HF transformers + PEFT, three arms in one program
against one, density of packing.

python -m benchmarks.sft
"""

import contextlib
import statistics

import numpy as np

from benchmarks.common import alternating, in_own_process, peer_model, save, seconds

EXAMPLES = 8  # of one step and run
STEPS = 1
DEMO_STEPS = 20
LEARNING_RATE = 2e-4


def gcd_sources(arms: list[str], rows: int = 160):
    """Tokenizer and sources of the first rows without shown work (the demo's 160) for a list of
    prompts.
    """
    from ip_jax.data.pipeline import RunSource
    from ip_jax.models import hub
    from ip_jax.prompts.chat import render_conversation
    from ip_jax.studies.gcd_sycophancy import data, published
    from ip_jax.studies.gcd_sycophancy.prompts import BOOK

    tokenizer = hub.load_tokenizer("smollm2-135m-instruct")
    gcd = data.load(
        data.DataSpec(rows=rows, work="without"),
        lambda messages: len(render_conversation(tokenizer, messages).token_ids),
        published.find_folder(),
    )
    return tokenizer, [
        RunSource(name, gcd.training["user_right"], BOOK.find(name).transform, 0) for name in arms
    ]


def our_step(tokenizer, sources):
    """(a function that runs STEPS steps, real tokens of them, density, the compiled step, positions
    that each of DEMO_STEPS steps computes) of one program with a run per source.
    """
    import jax
    import jax.numpy as jnp

    from configs.gcd_sycophancy import PRESETS
    from ip_jax.data.packing import positions_of, usage
    from ip_jax.data.pipeline import batch_reader, renderer
    from ip_jax.lab.experiment import ModelConfig, decided
    from ip_jax.models import hub
    from ip_jax.models.decoder import split_decoder
    from ip_jax.models.lora import LoraConfig, init_lora
    from ip_jax.training.schedules import Schedule
    from ip_jax.training.sft import SftOptions, compile_sft_step
    from ip_jax.training.state import Batch, init_state

    model = hub.load_pretrained("smollm2-135m-instruct", jnp.dtype(decided(ModelConfig()).weights))
    lora = LoraConfig(rank=16, alpha=32)
    runs = len(sources)
    graphdef, adapters, base = split_decoder(
        model.config, model.params, init_lora(jnp.zeros(runs, int), model.config, lora), lora
    )
    state = init_state(
        adapters, jnp.full(runs, LEARNING_RATE), jnp.zeros(runs), jnp.zeros(runs, int)
    )
    reader = batch_reader(
        sources,
        renderer(tokenizer),
        EXAMPLES,
        DEMO_STEPS,
        PRESETS["demo"].sft.tokens_per_micro_batch,
    )
    step = compile_sft_step(graphdef, SftOptions(Schedule("constant"), shared=reader.shared))
    batches, densities = zip(*[reader(i) for i in range(STEPS)], strict=True)
    holder = [state]

    def work():
        for packed in batches:
            holder[0], metrics = step(holder[0], base, tuple(Batch(**arrays) for arrays in packed))
        jax.block_until_ready(metrics)

    # the peer computes all of them
    tokens = sum(
        len(dataset[i].token_ids) for dataset in reader.datasets for i in range(STEPS * EXAMPLES)
    )
    density = float(np.mean([reader(i)[1] for i in range(DEMO_STEPS)]))
    positions = [
        positions_of(usage(lengths, reader.shapes)[0], reader.shapes) for lengths in reader.lengths
    ]
    return work, tokens, density, step, positions


def peer_step(dtype: str, attention: str, batch_size: int):
    """A function that trains HF transformers + PEFT on the same STEPS * EXAMPLES examples of the
    neutral arm, padded to the longest of each batch.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from ip_jax.data.pipeline import renderer, run_dataset

    tokenizer, (source,) = gcd_sources(["neutral"])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peer_model("bfloat16" if dtype == "bfloat16" else "float32", attention)
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    dataset = run_dataset(source, renderer(tokenizer))
    examples = [dataset[i] for i in range(STEPS * EXAMPLES)]
    batches = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        length = max(len(e.token_ids) for e in chunk)
        ids = torch.zeros((len(chunk), length), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, e in enumerate(chunk):
            n = len(e.token_ids)
            ids[row, :n], mask[row, :n] = torch.tensor(e.token_ids), 1
            labels[row, :n] = torch.where(torch.tensor(e.response_mask), ids[row, :n], -100)
        batches.append((ids, mask, labels))
    context = (
        torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()
    )

    def work():
        for ids, mask, labels in batches:
            with context:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def best_peer() -> tuple[dict, tuple]:
    """Seconds of every peer configuration (its second pass over the batch), and the fastest one's
    key.
    """
    times = {}
    for dtype in ("float32", "autocast", "bfloat16"):
        for attention in ("sdpa", "eager"):
            for batch_size in (4, 8):
                with in_own_process(peer_step, dtype, attention, batch_size) as work:
                    work()
                    times[dtype, attention, batch_size] = seconds(work)
                print(
                    f"peer {dtype} {attention} batch {batch_size}:"
                    f" {times[dtype, attention, batch_size]:.2f} s",
                    flush=True,
                )
    return times, min(times, key=times.get)


def against_peer() -> None:
    """One arm against HF transformers + PEFT."""
    from ip_jax.lab.experiment import ModelConfig, decided

    tokenizer, sources = gcd_sources(["neutral"])
    one, tokens, density, step, _ = our_step(tokenizer, sources)
    one()
    times, best = best_peer()
    with in_own_process(peer_step, *best) as peer:
        peer()
        result = alternating(one, peer)
    save(
        "sft_smollm2_cpu",
        {
            **result,
            "ours_weights": decided(ModelConfig()).weights,
            "tokens": tokens,
            "ours_tokens_per_s": round(tokens / statistics.median(result["ours_s"]), 1),
            "peer_tokens_per_s": round(tokens / statistics.median(result["peer_s"]), 1),
            "peer_best": list(best),
            "peer_all_s": {
                "/".join(map(str, key)): round(value, 3) for key, value in times.items()
            },
            "real_over_padded": round(density, 4),
            "programs_compiled": step._cache_size(),
        },
    )


def three_arms() -> None:
    """Three arms in one program against the same three, each in a program of its own, one after
    another: steps, and with compilation.
    """
    tokenizer, sources = gcd_sources(["neutral", "gcd/behave", "control/random_string"])
    alone = [our_step(tokenizer, [source]) for source in sources]
    together, tokens, density, step, positions = our_step(tokenizer, sources)
    # with compilation
    first = {
        "one_by_one": [round(seconds(work), 2) for work, *_ in alone],
        "together": round(seconds(together), 2),
    }
    result = alternating(together, lambda: [work() for work, *_ in alone])
    computed = {
        "together": positions,
        "one_by_one": np.sum([one[4] for one in alone], axis=0).tolist(),
    }
    of_a_step = {
        "together": statistics.median(result["ours_s"]),
        "one_by_one": statistics.median(result["peer_s"]),
    }
    # the first one is measured: all, by their positions
    steps = {name: of_a_step[name] * sum(computed[name]) / computed[name][0] for name in computed}
    compiling = {
        "together": first["together"] - of_a_step["together"],
        "one_by_one": sum(first["one_by_one"]) - of_a_step["one_by_one"],
    }
    in_all = {name: compiling[name] + steps[name] for name in steps}
    save(
        "three_arms_in_one_program_cpu",
        {
            **result,
            "what": "peer: the same three arms, each in a program of its own",
            "tokens": tokens,
            "programs_compiled": step._cache_size(),
            "real_over_padded": round(density, 4),
            "real_over_padded_alone": [round(one[2], 4) for one in alone],
            "first_call_s": first,
            "positions_of_each_step": computed,
            "demo_steps": DEMO_STEPS,
            "steps_s": {name: round(value, 1) for name, value in steps.items()},
            "ratio_of_all_steps": round(steps["one_by_one"] / steps["together"], 3),
            "training_s": {name: round(value, 1) for name, value in in_all.items()},
            "ratio_with_compilation": round(in_all["one_by_one"] / in_all["together"], 3),
        },
    )


def main() -> None:
    """Both comparisons."""
    against_peer()
    three_arms()


if __name__ == "__main__":
    main()
