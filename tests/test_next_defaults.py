"""JAX's next implementations of `checkpoint` and of custom rules, each in a process of its own, as a user would set it.

They are off by default in jax 0.10 to 0.12. The derivatives, and what the backward pass keeps, are the same with them.
"""

import os
import subprocess
import sys
from functools import partial

import compiling
import pytest

FLAGS = ("jax_remat3", "jax_custom_jvp3", "jax_custom_vjp3")


@pytest.mark.parametrize("flags", [*FLAGS, ",".join(FLAGS)])
def test_every_derivative(flags):
    import jax

    if not set(flags.split(",")) <= set(jax.config.values):
        pytest.skip(f"jax {jax.__version__} does not have all of {flags}")
    if jax.__version_info__ < (0, 11) and "jax_remat3" in flags:
        pytest.skip(f"jax {jax.__version__} has no rule of vmap for a checkpoint_name with jax_remat3")
    command = [sys.executable, "-W", "error", __file__, flags]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]


def work(flags):
    import hlo
    import jax
    import jax.numpy as jnp
    import numpy as np
    import reference
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P
    from test_residuals import kept

    import jbn

    for flag in flags.split(","):
        jax.config.update(flag, True)
    rng = np.random.default_rng(0)
    x, tangent = rng.normal(1, 2, (2, 16, 4, 3)).astype(np.float32)
    weights = (rng.uniform(size=(16, 4, 1)) < 0.7).astype(np.float32)
    params, state = jbn.init(3)

    def loss(x, params, weights, axis_name=None, activation=None):
        options = {"weights": weights, "axis_name": axis_name, "activation": activation}
        return jnp.sum(jnp.sin(jbn.batch_norm(x, params, state, train=True, **options)[0]))

    def textbook(x, params, weights, activation=None):
        y = reference.textbook(x, *params, 1e-5, weights, axes=(0, 1))
        return jnp.sum(jnp.sin(y if activation is None else activation(y)))

    def same(got, wanted):  # sums of 64 values of which the largest is about 10
        jax.tree.map(partial(np.testing.assert_allclose, rtol=64 * 2**-24, atol=640 * 2**-24), got, wanted)

    def derivatives(f):
        gradient = jax.grad(f, (0, 1))

        def every(x, params):
            twice = jax.grad(lambda x: jnp.sum(gradient(x, params)[0] ** 2))(x)
            along = jax.jvp(f, (x, params), (tangent, params))[1]
            return gradient(x, params), twice, along, jax.vmap(gradient, (0, None))(jnp.stack([x, 2 * x]), params)

        return jax.jit(every)(x, params)

    options = {"weights": weights, "activation": jnp.tanh}
    same(derivatives(partial(loss, **options)), derivatives(partial(textbook, **options)))
    wanted = jax.grad(textbook, (0, 1))(x, params, np.ones_like(weights))

    def steps(x, params):
        def one(total, part):
            return total + loss(part, params, None), None

        return jax.lax.scan(one, jnp.zeros(()), x[None])[0]

    same(jax.jit(jax.grad(steps, (0, 1)))(x, params), wanted)

    keep = jax.checkpoint_policies.save_only_these_names("jbn.moments")
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    for wrap in (lambda f: f, partial(jax.checkpoint, policy=keep)):
        local = wrap(partial(loss, axis_name="i"))
        split = jax.shard_map(
            lambda x, params, local=local: jax.grad(local, (0, 1))(x, params, None),
            mesh=mesh,
            in_specs=(P("i"), P()),
            out_specs=(P("i"), P()),
        )
        compiled = jax.jit(split).lower(x, params).compile()
        same(compiled(x, params), wanted)
        assert len(hlo.collectives(compiled.as_text())) == 2  # nothing is measured again, by a user's policy neither

        narrow = jnp.asarray(x, jnp.bfloat16)
        call = wrap(lambda x, params: jbn.batch_norm(x, params, state, train=True)[0])
        residuals = kept(call, narrow, params)
        assert [dtype for shape, dtype in residuals if shape == x.shape] == [jnp.bfloat16], residuals
        assert {shape for shape, _ in residuals} <= {x.shape, (3,), ()}, residuals


if __name__ == "__main__":
    from pathlib import Path

    os.environ.update(compiling.environment(devices=8))
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    work(sys.argv[1])
