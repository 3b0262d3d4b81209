"""Where activations lie on a mesh: a constraint for the partitioner, and nothing where there is no mesh."""
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

BY_ROW = ("run", "data")  # mesh axes of the first two dimensions [R, B] of a batch
EVERYWHERE = ()


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """`x` with its leading dimensions cut over these axes of the mesh in context, where they divide them, and the others whole; without
    a mesh, `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fitting = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, x.shape)]  # noqa: B905  the rest is whole
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def on_one_cpu(there, elsewhere, *arguments):
    """there(*arguments) where a single CPU runs the program, elsewhere(*arguments) on accelerators and on meshes of several devices."""
    if jax.sharding.get_abstract_mesh().size > 1:
        return elsewhere(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=there, default=elsewhere)
