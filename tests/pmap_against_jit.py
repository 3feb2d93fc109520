"""Three steps on all devices, by ``parallel.Jit``, by ``parallel.Pmap`` and by jit alone with a batch that is sharded over a
mesh, against jit on one device; each from the same state. Prints the devices, the relative difference of the losses, the
largest difference of the parameters.

Steps that follow each other would not do: where a ReLU's input is 0 but for rounding, its gradient is there or is not, and one
such place in one step (jax 0.10.2 had it in the second, 0.6.2 in none) changes all later ones.

Run by test_train.py in a process with several forced host devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from w2s_jax import models
from w2s_jax.parallel import Jit, Pmap, lay_out
from w2s_jax.train import initial_state, train_step


def small_step(axis_name=None, form="direct"):
    # one form: the compiled kernel, which "auto" takes where it can, rounds otherwise
    student = models.build("wav2small", channels=2, axis_name=axis_name, form=form)
    variables = models.build("wav2small", channels=2).init(jax.random.key(0), jnp.zeros((1, 640)))
    optimizer = optax.sgd(0.1)
    state = initial_state(variables, optimizer)

    def step(state, batch):
        return train_step(
            state, batch, student=student, frontend=variables["frontend"], optimizer=optimizer, l2=0.1, axis_name=axis_name
        )

    return step, state


def largest(one, two) -> float:
    """Largest difference between two trees of parameters, whose values are around 0.1 to 1."""
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def main(form: str = "direct") -> None:
    devices, rng = jax.local_device_count(), np.random.default_rng(0)
    step, state = small_step(form=form)
    parallel_step, _ = small_step("batch", form)
    one, layout = jax.jit(step), lay_out(devices, 4 * devices)
    ways = [way(layout) for way in (Jit, Pmap)]

    def first_step(state, data, inputs, samples):
        return parallel_step(state, jax.tree.map(lambda leaf: leaf[0], inputs))

    compiled = [way.compile(first_step) for way in ways]
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    losses, params = [], []
    for _ in range(3):
        batch = (
            rng.standard_normal((4 * devices, 1000)).astype(np.float32),
            rng.standard_normal((4 * devices, 3)).astype(np.float32),
        )
        results = [one(jax.device_put(state, everywhere), jax.device_put(batch, split))]
        inputs = jax.tree.map(lambda x: x.reshape(1, devices, -1, *x.shape[1:]), batch)
        results += [run(way.replicate(state), (), inputs, 0) for way, run in zip(ways, compiled, strict=True)]
        state, measured = one(state, batch)
        losses += [abs(float(measured["loss"]) - float(m["loss"])) / float(measured["loss"]) for _, m in results]
        params += [largest(state.params, other.params) for other, _ in results]
    print(devices, max(losses), max(params))


if __name__ == "__main__":
    main()
