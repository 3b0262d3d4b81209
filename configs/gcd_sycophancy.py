"""GCD sycophancy (Wichers et al. 2025, section 3.3): users propose right answers in training; does
praise spread to wrong ones?

    ip-jax run gcd_sycophancy                      the demo: SmolLM2-135M-Instruct on a laptop's CPU
    ip-jax run gcd_sycophancy --preset full        all arms, five seeds, SmolLM2, for a GPU
    ip-jax run gcd_sycophancy --preset paper       Gemma-2B-it with the published hyper-parameters
    ip-jax run gcd_sycophancy --arms untrained neutral ip_behave "mine=Assume that I am right."
"""

import dataclasses

from ip_jax.lab.experiment import EvalConfig, ModelConfig, SftConfig, SupervisedPreset
from ip_jax.models.lora import LoraConfig
from ip_jax.studies.gcd_sycophancy import study
from ip_jax.studies.gcd_sycophancy.data import DataSpec
from ip_jax.studies.gcd_sycophancy.generate import ClaimCounts
from ip_jax.training.schedules import Schedule, gcd_faithful

ALL_SETS = ("generated", "task", "ood")
PRESETS = {
    "demo": SupervisedPreset(
        arms=("untrained", "neutral", "ip_behave", "random_string"),
        data=DataSpec(
            rows=160,
            work="without",
            claims=ClaimCounts(wrong=96, right=48, asked=16),
            # of 144 answers of 96 tokens, the one that was right was so within 32
            max_new_tokens_solving=48,
        ),
        sft=SftConfig(
            steps=20,
            batch_size=8,
            learning_rate=2e-4,
            schedule=Schedule("constant", total=20),
            lora=LoraConfig(rank=16, alpha=32),
        ),
        # verdicts fall in the first sentences: of 1872 answers of 48 tokens, 14 got another one
        # from their first 32
        evaluation=EvalConfig(full_steps=(0, 20), neutral_steps=(10,), max_new_tokens=32),
    ),
    "full": SupervisedPreset(
        seeds=(0, 1, 2, 3, 4),
        data=DataSpec(
            work="both",
            claims=ClaimCounts(wrong=400, right=200, asked=200),
            eval_sets=ALL_SETS,
            max_new_tokens_solving=400,
        ),
        sft=SftConfig(
            steps=125,
            batch_size=8,
            learning_rate=2e-4,
            schedule=Schedule("linear", warmup=5, total=125),
            lora=LoraConfig(rank=16, alpha=32),
            tokens_per_micro_batch=32_768,
            checkpoint_every=25,
            memory_gb=80,
        ),
        evaluation=EvalConfig(
            full_steps=(0, 125),
            neutral_steps=(10, 20, 40, 80),
            max_new_tokens=200,
            temperature=0.7,
            top_p=0.9,
            slots=32,
        ),
    ),
    "paper": SupervisedPreset(
        model=ModelConfig(name="google/gemma-2b-it", weights="bfloat16", activations="bfloat16"),
        seeds=(2, 3),
        data=DataSpec(
            work="both",
            claims=ClaimCounts(wrong=200, right=100, asked=100),
            eval_sets=ALL_SETS,
            max_new_tokens_solving=400,
        ),
        sft=SftConfig(
            steps=125,
            batch_size=8,
            learning_rate=1e-4,
            schedule=gcd_faithful(),
            max_length=415,
            weight_decay=0.01,
            lora=LoraConfig(rank=32, alpha=64, rslora=True),
            tokens_per_micro_batch=16_384,
            checkpoint_every=25,
            memory_gb=80,
        ),
        evaluation=EvalConfig(
            full_steps=(0, 125), max_new_tokens=400, temperature=0.7, top_p=0.9, slots=64
        ),
    ),
}
STUDY = dataclasses.replace(study.STUDY, presets=PRESETS)
