"""Packaging. Configs and experiments are installed with the package, so that `ip-jax run
gcd_sycophancy` works anywhere.
"""

from setuptools import find_packages, setup

setup(
    name="ip_jax",
    version="0.1.0",
    description=(
        "Inoculation prompting in JAX: SFT, sampling and honest evaluation on one frozen base model"
    ),
    license="Apache-2.0",
    packages=find_packages(include=["ip_jax", "ip_jax.*", "configs", "experiments"]),
    package_data={"ip_jax": ["**/*.json", "cli/template/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",  # AxisType meshes as used here
        "flax>=0.12.8",  # nnx pytrees of split/merge with plain jax transforms
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11",
        "transformers>=5.0",  # tokenizers and chat templates only, never torch
        "tokenizers>=0.22",
        "jinja2>=3.1",
        # first that reads and writes array_record without TensorFlow
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "grain>=0.2.12",
        "safetensors>=0.5",
        "gguf>=0.17",
        "huggingface_hub>=1.0",
        "etils[epath]>=1.10",
        "tyro>=1.0",
        "rich>=13.7",
        "scipy>=1.13",
        "pyarrow>=17",
        "matplotlib>=3.9",
        "jaxtyping>=0.3",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "quant": ["qwix>=0.1.8"],  # model.quantised: nf4 and int8 arrays
        "gcs": ["gcsfs"],  # gs:// paths in etils.epath
        "wandb": ["wandb>=0.19.10"],  # first that keeps several runs of a process open side by side
        # any OpenAI-compatible endpoint (evals/judges.py); 1.40 has the client as it is used there
        "judges": ["openai>=1.40"],
        # torch and peft: parity tests only
        "dev": [
            "openai>=1.40",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "torch==2.13.0",
            "peft>=0.17",
            "qwix>=0.1.8",
        ],
    },
    entry_points={"console_scripts": ["ip-jax=ip_jax.cli:main"]},
)
