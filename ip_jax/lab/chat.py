"""Talking to what an experiment trained: one run's adapter over its base model, in the terminal."""

import dataclasses

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy, under which safetensors then returns bf16 tensors
import numpy as np
from etils import epath
from rich.console import Console
from rich.text import Text

from ip_jax.lab.base_model import load_base, stop_ids
from ip_jax.lab.trained import decoder_of, read_run
from ip_jax.prompts.chat import completion_text, render_prompt
from ip_jax.prompts.prompt import Prompt
from ip_jax.prompts.transforms import Identity
from ip_jax.sampling.sampler import Request, SamplerOptions, sample
from ip_jax.training.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """`prompt` is put into the first user turn; `seed` of the run, None for its first one."""

    arm: str
    seed: int | None
    prompt: Prompt
    temperature: float = 0.7
    max_new_tokens: int = 200


def chat(folder: epath.Path, options: ChatOptions, console: Console) -> None:
    """Reads lines until an empty one. Raises ValueError for an arm or seed that is not there,
    before the model is loaded.
    """
    # what is typed has no slot that a neutral prompt would have to fill
    transform = Identity() if options.prompt.kind == "neutral" else options.prompt.transform
    run = read_run(folder, options.arm, options.seed)
    with console.status(f"loading {run.model.name}"):
        model = load_base(run.model, make_mesh())
        decoder = decoder_of(run, model)
    sampler = SamplerOptions(
        stop_ids=stop_ids(run.model, model.tokenizer),
        slots=1,
        prefill_prompts=1,
        dtype=run.model.activations,
    )
    messages: list[dict] = []
    console.print(
        f"{options.arm}, seed {run.seed}, prompt {options.prompt.name}; an empty line ends",
        style="dim",
    )
    while line := _line(console):
        messages.append({"role": "user", "content": line})
        prompt = render_prompt(
            model.tokenizer, transform({"id": "chat", "messages": messages})["messages"]
        )
        request = Request(
            np.asarray(prompt),
            example_id=len(messages),
            seed=run.seed,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
        )
        completion = sample(*decoder, [[request]], sampler)[0][0][0]
        reply = completion_text(model.tokenizer, completion.token_ids, completion.ended)
        console.print(Text(options.arm, "bold cyan"), Text(reply))
        if not reply.strip():  # a conversation cannot go on from it
            console.print("an empty reply: the conversation begins anew", style="dim")
            messages = []
            continue
        messages.append({"role": "assistant", "content": reply})


def _line(console: Console) -> str:
    """What is typed next; "" at the end of the input."""
    try:
        return console.input("[bold]you[/bold] ").strip()
    except EOFError:
        console.print()  # what follows begins on a line of its own
        return ""
