"""On-policy reinforcement learning as sizes alone, at the scale of the papers: what it would need
and cost, without a model or tasks at hand.

    ip-jax plan rl_shapes --topology v5e:4x4
    ip-jax plan rl_shapes --topology h200:1 --rl.slots 128
    ip-jax plan rl_shapes --topology v5e:4x4 --runs 4 --rl.runs-per-program 4

The published environment of reward hacking for Qwen3-4B: 16 prompts x 16 samples an iteration, 1536
+ 1536 tokens, LoRA r=32, alpha 32, 7e-5 with a cosine decay after 10 of 200 iterations, GRPO with
token means of micro-batches of 8 samples and a penalty towards the reference at the generation
prompt (k3, 1e-3), temperature 0.7, top-p 0.95. One run stands for one arm and seed; 119 held-out
problems are answered once in 20 iterations. Every prompt and completion is taken as long as its
limit: real ones are shorter.
"""

import dataclasses

from ip_jax.lab.experiment import ModelConfig
from ip_jax.lab.reinforced.plan import RlConfig, RlEval
from ip_jax.models.lora import LoraConfig
from ip_jax.planning.reinforced_workload import PromptLengths, RlShapes
from ip_jax.planning.workload import HfFields, Questions
from ip_jax.rl.advantages import Aggregation
from ip_jax.rl.algorithm import Algorithm
from ip_jax.rl.estimators import ESTIMATORS, Kl
from ip_jax.training.schedules import Schedule

EXPERIMENT = None  # nothing to run
QWEN3_4B = HfFields(  # Qwen/Qwen3-4B, config.json
    "Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    head_dim=128,
    tie_word_embeddings=True,
)
PRESETS = {
    "qwen3-4b": RlShapes(
        QWEN3_4B,
        RlConfig(
            iterations=200,
            groups=16,
            samples=16,
            max_new_tokens=1536,
            max_length=3072,
            learning_rate=7e-5,
            schedule=Schedule("cosine", warmup=10, total=200),
            lora=LoraConfig(rank=32, alpha=32),
            temperature=0.7,
            top_p=0.95,
            weight_decay=0.1,
            samples_per_row=4,
            tokens_per_micro_batch=32_768,
            checkpoint_every=20,
            runs_per_program=1,
            remat="full",
        ),
        RlEval(steps=(), max_new_tokens=1536, temperature=0.7, top_p=0.95, slots=128),
        PromptLengths(generation=1536, training=1536),
        Questions(prompts=119, length=1536, sweeps=10),
        "qwen3-4b",
        ModelConfig("Qwen/Qwen3-4B", weights="bfloat16", activations="bfloat16"),
        Algorithm(
            dataclasses.replace(ESTIMATORS["train_old"], clip=0.2, dual_clip=3.0),
            Kl("tg", "loss", "k3", 1e-3),
            "group_mean_std",
            Aggregation("token_mean_per_chunk", chunk=8),
            betas=(0.9, 0.99),
            max_grad_norm=1.0,
        ),
    ),
}
