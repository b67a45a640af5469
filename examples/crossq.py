"""CrossQ's critic (Bhatt et al. 2024) on a linear system: current and next states in one batch, no target network."""

import jax
import jax.numpy as jnp
import optax

import jbn

DISCOUNT, NOISE, WIDTHS, BATCH = 0.9, 0.3, (2, 64, 64, 1), 256


def exact(s, a):
    """Value of action `a` in state `s` [...]: reward -s^2, then 0.9 s + a and noise, and action -0.5 s ever after."""
    return -(s**2) - DISCOUNT * ((0.9 * s + a) ** 2 + NOISE**2 / (1 - DISCOUNT)) / (1 - DISCOUNT * 0.4**2)


def init(key):
    norms, states = zip(*map(jbn.init, WIDTHS[:-1]), strict=True)
    kernels = [jax.nn.initializers.he_normal()(key, WIDTHS[i : i + 2]) for i in range(3)]
    return list(zip(norms, kernels, map(jnp.zeros, WIDTHS[1:]), strict=True)), list(states)


def critic(params, states, s, a, step, train):
    x, new_states = jnp.stack([s, a], -1), []
    r_max, d_max = jbn.renorm_limits(step, start=200, r_end=1600, d_end=1000)
    for (norm, kernel, bias), state in zip(params, states, strict=True):
        x = jax.nn.relu(x) if new_states else x
        x, state = jbn.batch_renorm(x, norm, state, train=train, r_max=r_max, d_max=d_max, decay=0.99)
        x, new_states = x @ kernel + bias, [*new_states, state]
    return x[:, 0], new_states


@jax.jit
def train(key):
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 2500))

    def step(carry, index):
        params, states, moments = carry
        s, a, noise = jax.random.normal(jax.random.fold_in(key, index), (3, BATCH))
        after = 0.9 * s + a + NOISE * noise
        joint = jnp.concatenate([s, after]), jnp.concatenate([a, -0.5 * after])

        def loss(params):
            q, new_states = critic(params, states, *joint, index, train=True)
            target = -(s**2) + DISCOUNT * jax.lax.stop_gradient(q[BATCH:])
            return jnp.mean((q[:BATCH] - target) ** 2), new_states

        gradients, states = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), states, moments), None

    params, states = init(key)
    return jax.lax.scan(step, (params, states, optimizer.init(params)), jnp.arange(2500))[0][:2]


if __name__ == "__main__":
    s, a = (grid.ravel() for grid in jnp.meshgrid(jnp.linspace(-1.5, 1.5, 21), jnp.linspace(-1, 1, 21)))
    params, states = train(jax.random.key(0))
    error = critic(params, states, s, a, 0, train=False)[0] - exact(s, a)
    print(f"explained variance {1 - jnp.var(error) / jnp.var(exact(s, a)):.4f}, bias {jnp.mean(error):.3f}")
