"""Less compiling, which is most of the time of tests, for programs that run once and are compared to some digits."""

from importlib.metadata import version

# Beside JAX's own jax_disable_most_optimizations; later versions of XLA do not know it.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if version("jax") < "0.11" else {}
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
