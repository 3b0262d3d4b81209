"""What the backward pass keeps of a layer and what it computes again, by name."""

from collections.abc import Callable

import jax

KEPT = "product"  # checkpoint name of the results of products
# of what attention's backward pass needs: queries, keys, values, context, log normalisers
ATTENTION = "attention"

_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable] = {
    # All but bits turned into bfloat16: kept, these would be a copy of every layer's weights.
    "none": lambda primitive, *_, **__: primitive is not jax.lax.bitcast_convert_type_p,
    "products": _POLICIES.save_only_these_names(KEPT, ATTENTION),  # all else is cheap to make again
    "attention": _POLICIES.save_only_these_names(ATTENTION),
    "full": _POLICIES.nothing_saveable,
}


def rematerialised(layer: Callable, remat: str, prevent_cse: bool) -> Callable:
    """`layer` with a backward pass that keeps what `remat` names, and always the layer's input.

    From most memory to least: "none" keeps every intermediate result; "products" the results of
    matrix products and attention's inputs and outputs; "attention" only the latter, so that the
    projections are computed again; "full" nothing. `prevent_cse` is needed outside of a scan, where
    XLA would take the second computation for the first.
    """
    return jax.checkpoint(layer, prevent_cse=prevent_cse, policy=REMAT[remat])
