"""Where activations lie on a mesh: a constraint for the partitioner, and nothing where there is no mesh."""
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

BY_ROW = ("run", "data")  # mesh axes of the first two dimensions [R, B] of a batch
EVERYWHERE = ()


def constrain(x: Array, axes: tuple[str, ...]) -> Array:
    """`x` with its leading dimensions cut over these axes of the mesh in context and the others whole; without a mesh, `x`."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def on_one_cpu(there, elsewhere, *arguments):
    """there(*arguments) where a single CPU runs the program, elsewhere(*arguments) on accelerators and on meshes of several devices."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return elsewhere(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=there, default=elsewhere)
