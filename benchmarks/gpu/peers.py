"""HF transformers and PEFT on the same GPU, same shape, random weights, at their best: every option that fits is timed, and the fastest counts."""
import dataclasses
import gc
import importlib.util
import statistics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import seconds
from benchmarks.gpu.sizes import Sizes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure_training(sizes: Sizes) -> dict:
    """LoRA r=8 in bfloat16, adapters too (float32 ones, PEFT's default, are slower), for each attention and batch size; activations are
    computed again (gradient checkpointing) only where they do not fit. Batches are the examples of our packed rows, one a row, without padding.
    """
    model = get_peft_model(
        _model(sizes), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"), autocast_adapter_dtype=False
    ).train()
    trained = [p.to(torch.bfloat16) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    rates = {}
    for attention in attentions():
        model.get_base_model().set_attn_implementation(attention)
        for rows in sizes.peer_rows:
            ids = _random_ids(sizes, rows * sizes.segments, sizes.segment)

            def step(ids=ids):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            model.gradient_checkpointing_disable()
            spent, name = _fitting(step), f"{attention}, {rows} rows"
            if spent is None:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                spent, name = _fitting(step), f"{name}, gradient checkpointing"
            rates[name] = spent and round(ids.numel() / spent, 1)
    return _best(rates)


def measure_generation(sizes: Sizes) -> dict:
    """{batch: tokens/s ...} of `generate` at temperature 1 for each attention, a whole batch of prompts at once, nothing that stops early."""
    model = _model(sizes).eval()
    return {str(batch): _generation(model, sizes, batch) for batch in sizes.batches}


def _generation(model, sizes: Sizes, batch: int) -> dict:
    ids, rates = _random_ids(sizes, batch, sizes.prompt), {}

    def generate(new: int = sizes.new):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0,
        )
        assert out.shape == (batch, sizes.prompt + new)

    for attention in attentions():
        model.set_attn_implementation(attention)
        spent = _fitting(generate, warm_up=lambda: generate(2), repeats=2)
        rates[attention] = spent and round(batch * sizes.new / spent, 1)
    return _best(rates)


def attentions() -> tuple[str, ...]:
    """transformers' attention implementations to try here."""
    return ("sdpa", "flash_attention_2") if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") else ("sdpa",)


def _device(sizes: Sizes) -> torch.device:
    if sizes.platform == "gpu" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: install its CUDA build for the peers' numbers")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(sizes: Sizes):
    """The large shape with random bfloat16 weights, made on the device."""
    fields = {name: value for name, value in dataclasses.asdict(sizes.large).items() if name != "architecture" and value is not None}
    torch.manual_seed(0)
    with _device(sizes):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **fields), dtype=torch.bfloat16)


def _random_ids(sizes: Sizes, rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, sizes.large.vocab_size, (rows, length), device=_device(sizes))


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
    """{"tokens_per_s", "best", "options": tokens/s of all, None for out of memory}. {"error": ...} where nothing fits."""
    fitting = {name: rate for name, rate in rates.items() if rate}
    if not fitting:
        return {"error": f"the peer runs out of memory in every configuration: {', '.join(rates)}"}
    best = max(fitting, key=fitting.get)
    return {"tokens_per_s": fitting[best], "best": best, "options": rates}
