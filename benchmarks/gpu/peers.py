"""HF transformers and PEFT on the same GPU, same shape, random weights, at their best: every option
that fits is timed, and the fastest counts.
"""

import dataclasses
import gc
import importlib.util
import statistics
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import seconds
from benchmarks.gpu.sizes import RlSizes, Sizes
from ip_jax.planning.workload import HfFields

MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure_training(sizes: Sizes) -> dict:
    """LoRA r=8 in bfloat16, adapters too (float32 ones, PEFT's default, are slower), for each
    attention and batch size; activations are computed again (gradient checkpointing) only where
    they do not fit. Batches are the examples of our packed rows, one a row, without padding.
    """
    model = _with_adapter(_model(sizes, sizes.large), 8, 16).train()
    trained = _trained(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    rates = {}
    for attention in attentions():
        model.get_base_model().set_attn_implementation(attention)
        for rows in sizes.peer_rows:
            ids = _random_ids(sizes, sizes.large, rows * sizes.segments, sizes.segment)

            def step(ids=ids):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            model.gradient_checkpointing_disable()
            spent, name = _fitting(step), f"{attention}, {rows} rows"
            if spent is None:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
                spent, name = _fitting(step), f"{name}, gradient checkpointing"
            rates[name] = spent and round(ids.numel() / spent, 1)
    return _best(rates)


def measure_generation(sizes: Sizes) -> dict:
    """{batch: tokens/s ...} of `generate` at temperature 1 for each attention, a whole batch of
    prompts at once, nothing that stops early.
    """
    model = _model(sizes, sizes.large).eval()
    return {str(batch): _generation(model, sizes, batch) for batch in sizes.batches}


def _generation(model, sizes: Sizes, batch: int) -> dict:
    ids, rates = _random_ids(sizes, sizes.large, batch, sizes.prompt), {}

    def generate(new=sizes.new):
        return _generate(model, ids, new, 1.0)

    for attention in attentions():
        model.set_attn_implementation(attention)
        spent = _fitting(generate, warm_up=lambda: generate(2), repeats=2)
        rates[attention] = spent and round(batch * sizes.new / spent, 1)
    return _best(rates)


def _generate(model, ids: torch.Tensor, new: int, temperature: float) -> torch.Tensor:
    """[B, T + new]: `new` tokens behind each prompt of `ids` [B, T], whatever they are."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    assert out.shape == (len(ids), ids.shape[1] + new)
    return out


def measure_loop(sizes: Sizes) -> dict:
    """`RlSizes.rates` of one iteration of reinforcement learning with the largest batches that fit:
    the adapter folded into the weights while it samples, gradient checkpointing while it learns,
    bfloat16 throughout, flash attention where it is installed. {"error": ...} where none fits.
    """
    work, attention = sizes.reinforced, attentions()[-1]
    model = _with_adapter(_model(sizes, work.hf), work.rl.lora.rank, work.rl.lora.alpha)
    model.get_base_model().set_attn_implementation(attention)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prompts = _random_ids(sizes, work.hf, work.rl.groups, work.prompt).repeat_interleave(
        work.rl.samples, 0
    )
    sampled = torch.cat(
        [prompts, _random_ids(sizes, work.hf, work.completions, work.rl.max_new_tokens)], 1
    )
    batch, rollout_s = _largest(
        work.peer_batches, lambda size: _rollout(model.eval(), work, prompts, sampled, size)
    )
    rows, update_s = _largest(work.peer_rows, _update(model.train(), work, sampled))
    if not (rollout_s and update_s):
        return {
            "error": (
                f"the peer runs out of memory even with {batch} completions sampled or {rows}"
                " learned from at once"
            )
        }
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        **work.rates(rollout_s, update_s),
        "measured_iterations": 1,
        "warm_up": "a batch that fills the cache by its prompts, a micro-batch",
        "attention": attention,
        "batch": batch,
        "micro_batch": rows,
        "peak_bytes": memory,
    }


def _largest(
    candidates: tuple[int, ...], work_of: Callable[[int], tuple[Callable, Callable]]
) -> tuple[int, float | None]:
    """(size, seconds of one call) of the first size whose (work, warm-up) fits; of the last one and
    None where none does.
    """
    for size in candidates:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what other shapes left behind is in these ones' way
        work, warm_up = work_of(size)
        spent = _fitting(work, warm_up, repeats=1)
        if spent is not None:
            break
    return size, spent


def _rollout(
    model, work: RlSizes, prompts: torch.Tensor, sampled: torch.Tensor, batch: int
) -> tuple[Callable, Callable]:
    """(all completions of `prompts` [N, X], `batch` at once; a call that needs as much memory).
    `sampled` [N, X + C]: ids of the full length.
    """

    def roll_out():
        model.merge_adapter()
        for ids in prompts.split(batch):
            _generate(model, ids, work.rl.max_new_tokens, work.rl.temperature)
        model.unmerge_adapter()

    return roll_out, lambda: _generate(model, sampled[:batch, :-2], 2, work.rl.temperature)


def _update(
    model, work: RlSizes, sampled: torch.Tensor
) -> Callable[[int], tuple[Callable, Callable]]:
    """Of a size of micro-batches: (the update from all of `sampled` [N, X + C], one micro-batch's
    gradient).
    """
    new, trained = work.rl.max_new_tokens, _trained(model)
    optimizer = torch.optim.AdamW(
        trained,
        lr=work.rl.learning_rate,
        betas=work.algorithm.betas,
        weight_decay=work.rl.weight_decay,
    )
    rewards = torch.rand(work.rl.groups, work.rl.samples, device=sampled.device)
    advantages = (
        (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ).flatten()

    def backward(ids: torch.Tensor, advantage: torch.Tensor):
        (
            _policy_loss(model, ids, advantage, new, work.rl.temperature) / (work.completions * new)
        ).backward()

    def sized(rows: int) -> tuple[Callable, Callable]:
        def learn():
            for micro in zip(sampled.split(rows), advantages.split(rows), strict=True):
                backward(*micro)
            torch.nn.utils.clip_grad_norm_(trained, work.algorithm.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        def warm_up():
            backward(sampled[:rows], advantages[:rows])
            optimizer.zero_grad()

        return learn, warm_up

    return sized


def _policy_loss(
    model, ids: torch.Tensor, advantage: torch.Tensor, new: int, temperature: float
) -> torch.Tensor:
    """The sum of -advantage [B] * log p over the last `new` tokens of each row of `ids` [B, X +
    C].
    """
    logits = model(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits
    # the last token predicts nothing; were it cut off, the logits would be copied
    targets = functional.pad(ids[:, -new:], (0, 1), value=-100)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float() / temperature,
        targets.flatten(),
        reduction="none",
        ignore_index=-100,
    )
    return (advantage[:, None] * losses.view(targets.shape)).sum()


def attentions() -> tuple[str, ...]:
    """transformers' attention implementations to try here."""
    return (
        ("sdpa", "flash_attention_2")
        if torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
        else ("sdpa",)
    )


def _device(sizes: Sizes) -> torch.device:
    if sizes.platform == "gpu" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: install its CUDA build for the peers' numbers")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(sizes: Sizes, hf: HfFields):
    """A shape with random bfloat16 weights, made on the device."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(hf).items()
        if name != "architecture" and value is not None
    }
    torch.manual_seed(0)
    with _device(sizes):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(MODEL_TYPES[hf.architecture], **fields), dtype=torch.bfloat16
        )


def _with_adapter(model, rank: int, alpha: float):
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _trained(model) -> list[torch.Tensor]:
    return [p.to(torch.bfloat16) for p in model.parameters() if p.requires_grad]


def _random_ids(sizes: Sizes, hf: HfFields, rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, hf.vocab_size, (rows, length), device=_device(sizes))


def _fitting(work, warm_up=None, repeats: int = 3) -> float | None:
    """Median seconds of `work` behind a warm-up; None where the memory does not suffice."""
    out_of_memory = False
    try:
        (warm_up or work)()
        spent = [seconds(lambda: (work(), _synchronize())) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        out_of_memory = True
    if out_of_memory:  # here the traceback, which holds the activations, is gone
        gc.collect()
        torch.cuda.empty_cache()
        return None
    return statistics.median(spent)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best(rates: dict[str, float | None]) -> dict:
    """{"tokens_per_s", "best", "options": tokens/s of all, None for out of memory}. {"error": ...}
    where nothing fits.
    """
    fitting = {name: rate for name, rate in rates.items() if rate}
    if not fitting:
        return {"error": f"the peer runs out of memory in every configuration: {', '.join(rates)}"}
    best = max(fitting, key=fitting.get)
    return {"tokens_per_s": fitting[best], "best": best, "options": rates}
