"""Bytes of activations by formula: how many runs fit one program, and plans where there is no
compiler for the devices.

Dims: D model, F hidden, N heads, K kv heads, H head dim.
"""

from ip_jax.models.families import DecoderConfig


def kept_bytes(config: DecoderConfig, remat: str, weights: int, activations: int) -> float:
    """What the backward pass is left of one token by all layers: each layer's input, and what
    `remat` (`models.remat`) names.

    `weights` and `activations`: bytes of an element of what is held in the dtype of the weights,
    and of the residual stream.
    """
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention, products = 2 * heads + 2 * kv, heads + 2 * kv + 2 * config.d_model
    # a mixture keeps no hidden states of its experts
    products += 0 if config.n_experts else 2 * config.d_ff
    by_policy = {
        "none": 2 * (attention + products),
        "products": attention + products,
        "attention": attention,
        "full": 0,
    }
    return config.n_layers * (activations * config.d_model + weights * by_policy[remat])


def layer_bytes(config: DecoderConfig, tensor: int = 1) -> float:
    """One layer's own arrays of one token in float32, and as much for their gradients, on one of
    `tensor` devices that share the layer.
    """
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    hidden = config.d_ff * max(config.experts_per_token, 1)
    return 8 * (4 * config.d_model + (3 * heads + 4 * kv + 4 * hidden) / tensor)
