"""Less compiling, which is most of the time of tests, for programs that run once and are compared to some digits."""

from importlib.metadata import version

# Beside JAX's own jax_disable_most_optimizations; later versions of XLA do not know it.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if version("jax") < "0.11" else {}


def environment(devices):
    """Variables of a process of its own with that many devices."""
    flags = {"xla_force_host_platform_device_count": devices} | OPTIONS
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
    return {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}


def quickly(on):
    """Whether what this process compiles from here on takes the least time."""
    import jax  # reads the environment, which programs that import this file set first

    if jax.config.values["jax_disable_most_optimizations"] != on:
        jax.clear_caches()  # what is there was compiled in the other way
        jax.config.update("jax_disable_most_optimizations", on)


def take_options():
    """Let OPTIONS go with jax_disable_most_optimizations in this process, which has flags for all or nothing."""
    import jax
    from jax._src import compiler

    own = compiler.get_compile_options

    def with_options(*args, env_options_overrides=None, **others):
        quick = OPTIONS if jax.config.values["jax_disable_most_optimizations"] else {}
        return own(*args, env_options_overrides=quick | (env_options_overrides or {}), **others)

    compiler.get_compile_options = with_options
