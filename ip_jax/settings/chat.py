"""Talking to what an experiment trained: one run's adapter over its base model, in the terminal."""
import dataclasses
import difflib
import json

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy, under which safetensors then returns bf16 tensors
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from rich.console import Console
from rich.text import Text
from safetensors import safe_open

from ip_jax.models import hub
from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import TARGETS, LoraConfig
from ip_jax.prompts import library
from ip_jax.prompts.chat import end_of_turn_id, render_prompt
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.settings.base_model import load_base
from ip_jax.settings.experiment import ModelConfig
from ip_jax.training.sharding import make_mesh

UNTRAINED = "untrained"


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """`prompt`: a library prompt put into the first user turn; `seed` of the run, None for its first one."""

    arm: str
    seed: int | None = None
    prompt: str = "neutral"
    temperature: float = 0.7
    max_new_tokens: int = 200


def trained_runs(folder: epath.Path) -> dict[str, list[int]]:
    """The complete runs of a results folder: arm -> seeds."""
    runs: dict[str, list[int]] = {}
    for path in sorted(folder.glob("runs/*/run.json")):
        record = json.loads(path.read_text())
        runs.setdefault(record["arm"], []).append(record["seed"])
    return runs


def chat(folder: epath.Path, options: ChatOptions, console: Console) -> None:
    """Reads lines until an empty one. Raises ValueError for an arm, seed or prompt that is not there, before the model is loaded."""
    transform = library.get(options.prompt).transform
    runs = trained_runs(folder)
    if options.arm != UNTRAINED and options.arm not in runs:
        near = difflib.get_close_matches(options.arm, runs, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"{folder} has no trained arm {options.arm!r}: {hint}there is {', '.join([*runs, UNTRAINED])}")
    seeds = runs.get(options.arm, [0])
    if options.seed is not None and options.seed not in seeds:
        raise ValueError(f"arm {options.arm} has no run with seed {options.seed}: there is {', '.join(map(str, seeds))}")
    seed = seeds[0] if options.seed is None else options.seed
    config = ModelConfig(**json.loads((folder / "config.json").read_text())["config"]["model"])
    with console.status(f"loading {config.name}"):
        model = load_base(config, make_mesh())
        decoder = _as_trained(model, folder, options.arm, seed)
    sampler = SamplerOptions(stop_ids=(end_of_turn_id(model.tokenizer),), slots=1, prefill_prompts=1, dtype=config.activations)
    messages: list[dict] = []
    console.print(f"{options.arm}, seed {seed}, prompt {options.prompt}; an empty line ends", style="dim")
    while line := console.input("[bold]you[/bold] ").strip():
        messages.append({"role": "user", "content": line})
        prompt = render_prompt(model.tokenizer, transform({"id": "chat", "messages": messages})["messages"])
        request = Request(np.asarray(prompt), example_id=len(messages), seed=seed, temperature=options.temperature, max_new_tokens=options.max_new_tokens)
        completion = sample(*decoder, [[request]], sampler)[0][0][0]
        reply = model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        console.print(Text(options.arm, "bold cyan"), Text(reply))
        messages.append({"role": "assistant", "content": reply})


def _as_trained(model: hub.Pretrained, folder: epath.Path, arm: str, seed: int):
    """(graphdef, lora, base) of one run: its adapter over the base, or all its weights. Raises ValueError if it began from other weights."""
    if arm == UNTRAINED:
        return split_decoder(model.config, model.params)
    run = folder / "runs" / f"{arm}-s{seed}"
    full = (run / "weights.safetensors").exists()
    path = run / ("weights.safetensors" if full else "adapter.safetensors")
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["run"])
        if about["fingerprint"] != model.fingerprint:
            raise ValueError(f"{path} was trained on other weights than those of {model.name}")
        if full:
            return split_decoder(model.config, unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="."))  # noqa: SIM118
        lora = {t: {kind: file.get_tensor(f"{t}.{kind}")[None] for kind in "ab"} for t in TARGETS if f"{t}.a" in file.keys()}  # noqa: SIM118
    lora_config = LoraConfig(rank=about["rank"], alpha=about["scale"] * about["rank"], targets=tuple(lora))
    return split_decoder(model.config, model.params, lora, lora_config)
