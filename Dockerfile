# One image for every process of a run; `ip-jax` is its entry.
#
#   docker build --build-arg EXTRAS=tpu,gcs  -t ip-jax .      Cloud TPU (the default)
#   docker build --build-arg EXTRAS=cuda,gcs -t ip-jax .      NVIDIA GPUs, with the driver of the host
#   docker run --rm -v "$PWD/results:/work/results" -v "$HOME/.cache:/cache" ip-jax run gcd_sycophancy
FROM python:3.11-slim

ARG EXTRAS=tpu,gcs
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 HF_HOME=/cache/huggingface IP_JAX_CACHE=/cache/ip_jax

# The dependencies first: a change of the code alone does not install them again.
WORKDIR /src
COPY setup.py constraints.txt pyproject.toml ./
RUN mkdir ip_jax configs experiments \
    && pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && pip uninstall --yes ip_jax
COPY ip_jax ip_jax
COPY configs configs
COPY experiments experiments
RUN pip install --no-deps .

WORKDIR /work
ENTRYPOINT ["ip-jax"]
