"""Whether a change of the code has changed what it computes, says and compiles to: this tree beside a git revision.

    make same BASE=main                                                 or python benchmarks/same.py main
    python benchmarks/same.py main --targets h100:1 v5e:2x4             also by compilers for GPU and TPU, if installed

For every form of tests/test_straight.py, as lowered for CPU, GPU and TPU and compiled here: the results, the kernels,
the bytes to and from memory, the messages. For every function of tests/test_residuals.py what its backward pass keeps.
Every message of tests/test_errors.py. What is other is listed; it is no fault where it is less, or rounding. Last, a
chain of 150 layers: seconds to trace, lower and compile, which are of this machine, beside a textbook formula.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 150
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Config:
    base: Positional[str] = ""
    """The git revision to compare with."""
    targets: tuple[str, ...] = ()
    """Of benchmarks/communication.py, whose compilers are installed: six layers of convolution, norm and relu."""
    rounds: int = 3
    """How often the chain of layers is timed, each time in a process of its own."""
    record: Path | None = None
    """Compare nothing; write what the jbn that is imported makes to this folder."""
    times: bool = False
    """Compare nothing; print the times of the chain of layers."""
    textbook: bool = False
    """With --times: of a textbook formula in plain jnp in the place of jbn."""


def programs(folder: Path) -> dict[str, Any]:
    """Figures of every form on every platform; the results go to `folder`."""
    import hlo
    import jax
    import numpy as np
    import test_straight as straight

    found = {}
    for form in straight.FORMS:
        operands = straight.put(form)
        for platform in straight.PLATFORMS:
            call = straight.lowered_for(platform, straight.FORMS[form], *operands)
            compiled = jax.jit(call).lower(*operands).compile()
            text, memory = compiled.as_text(), compiled.memory_analysis()
            assert text is not None and memory is not None
            found[f"{form}, {platform}"] = {
                "kernels": sum(hlo.kernels(text).values()),
                "bytes": sum(hlo.traffic(text).values()),
                "messages": [[each.kind, each.bytes] for each in hlo.collectives(text)],
                "branches": hlo.branches(text),
                "temporary bytes": memory.temp_size_in_bytes,
            }
            leaves = map(np.asarray, jax.tree.leaves(compiled(*operands)))
            np.savez(folder / f"{form}, {platform}.npz", *(leaf.astype(np.float64) for leaf in leaves))
    return found


def residuals() -> dict[str, Any]:
    import jax.numpy as jnp
    import test_residuals as kept

    def of(f, weights, dtype):
        found = kept.kept(lambda x, params, state: f(x, params, state, weights=weights), *kept.inputs(dtype))
        return sorted(f"{jnp.dtype(dtype)}{list(shape)}" for shape, dtype in found)

    return {
        f"{function}, {weights}, {jnp.dtype(dtype)}": {"residuals": of(f, given, dtype)}
        for function, f in kept.FUNCTIONS.items()
        for weights, given in kept.WEIGHTS.items()
        for dtype in (jnp.float32, jnp.bfloat16)
    }


def errors() -> dict[str, Any]:
    """The message of every call that tests/test_errors.py knows to be refused."""
    import pytest

    found: dict[str, Any] = {}

    class Recorder:
        def pytest_runtest_call(self, item):
            def refused(error, message, f, *args, **options):
                del error, message
                try:
                    f(*args, **options)
                    said = "nothing"
                except Exception as fault:
                    said = re.sub(r" at 0x\w+", "", f"{type(fault).__name__}: {fault}")
                found[f"{item.name} {sum(name.startswith(item.name) for name in found)}"] = {"says": said}

            item.module.refused = refused

    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    pytest.main([str(ROOT / "tests" / "test_errors.py"), *options], plugins=[Recorder()])
    return found


def times(textbook: bool) -> dict[str, float]:
    """Seconds of processor time to trace, lower and compile a chain of layers, forward and backward."""
    import jax
    import jax.numpy as jnp

    import jbn

    width = 64

    def normalize(x, params, state):
        if not textbook:
            return jbn.batch_norm(x, params, state, train=True, activation=jax.nn.relu)
        mean, var = jnp.mean(x, 0), jnp.mean((x - jnp.mean(x, 0)) ** 2, 0)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * params.scale + params.bias
        return jax.nn.relu(y), jbn.State(0.9 * state.mean + 0.1 * mean, 0.9 * state.var + 0.1 * var, state.weight)

    def loss(x, weights, params, states):
        after = []
        for weight, of, state in zip(weights, params, states, strict=True):
            x, state = normalize(x @ weight, of, state)
            after.append(state)
        return jnp.sum(x**2), after

    layers = [jbn.init(width) for _ in range(LAYERS)]
    params, states = map(list, zip(*layers, strict=True))
    operands = jnp.ones((256, width)), [jnp.eye(width)] * LAYERS, params, states
    start = time.process_time()
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)).trace(*operands)
    middle = time.process_time()
    lowered = traced.lower()
    end = time.process_time()
    lowered.compile()
    return {"trace": middle - start, "lower": end - middle, "compile": time.process_time() - end}


def run(package: Path, *arguments: str) -> str:
    """What a process prints that imports the jbn of `package`, and all else from this tree."""
    path = os.pathsep.join(map(str, (package, ROOT / "tests", ROOT / "benchmarks")))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    given = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    given["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return subprocess.run([sys.executable, *arguments], env=given, check=True, stdout=subprocess.PIPE, text=True).stdout


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str, str, bool]]:
    """Where, what, before, now, and whether that is a fault: whatever is not less."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name, {}), now.get(name, {})
        for what in sorted({*old, *new}):
            was, become = old.get(what), new.get(what)
            if was != become:
                less = isinstance(was, int | float) and isinstance(become, int | float) and become < was
                found.append((name, what, str(was), str(become), not less))
    return found


def apart(before: Path, now: Path) -> dict[str, float]:
    """By how much results differ where they do, of the largest number of each array."""
    import numpy as np

    found = {}
    for path in sorted(before.glob("*.npz")):
        old, new = np.load(path), np.load(now / path.name)
        worst = 0.0
        for name in old:
            scale = np.max(np.abs(old[name])) or 1.0
            worst = max(worst, float(np.max(np.abs(old[name] - new[name]), initial=0.0) / scale))
        if worst:
            found[path.stem] = worst
    return found


def main(config: Config) -> None:
    if config.record is not None:
        config.record.mkdir(parents=True)
        found = programs(config.record) | residuals() | errors()
        (config.record / "figures.json").write_text(json.dumps(found))
    elif config.times:
        print(json.dumps(times(config.textbook)))
    else:
        compare(config)


def compare(config: Config) -> None:
    if not config.base:
        sys.exit("Name the git revision to compare with: make same BASE=main")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        archive = subprocess.run(["git", "archive", config.base, "jbn"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        (here / "base").mkdir()
        subprocess.run(["tar", "-x", "-C", str(here / "base")], input=archive.stdout, check=True)
        packages = {"before": here / "base", "now": ROOT}
        for when, package in packages.items():
            run(package, __file__, "--record", str(here / when))
            if config.targets:
                options = "--results", str(here / when / "targets.json"), "--networks", "six layers", "--norms", "jbn"
                run(package, str(ROOT / "benchmarks" / "communication.py"), *options, "--targets", *config.targets)
        before, now = (json.loads((here / when / "figures.json").read_text()) for when in packages)
        found = differences(before, now)
        if config.targets:
            found += differences(*(by_name(here / when / "targets.json") for when in packages))
        rounding = apart(here / "before", here / "now")
        seconds: dict[str, list[dict[str, float]]] = {when: [] for when in (*packages, "textbook")}
        for _ in range(config.rounds):
            for when, package in packages.items():
                seconds[when].append(json.loads(run(package, __file__, "--times")))
            seconds["textbook"].append(json.loads(run(packages["now"], __file__, "--times", "--textbook")))
    report(found, rounding, seconds, compared=len(before))
    if any(fault for *_, fault in found) or any(worst > 1e-5 for worst in rounding.values()):
        sys.exit(1)


def by_name(path: Path) -> dict[str, Any]:
    """What benchmarks/communication.py found, but for the time that it took."""
    rows = json.loads(path.read_text())
    return {name: {what: of for what, of in row.items() if what != "compile_seconds"} for name, row in rows.items()}


def report(found, rounding, seconds, *, compared: int) -> None:
    console.print(f"{compared} programs, backward passes and messages compared")
    if found:
        table = Table("where", "what", "before", "now", "", title="What is other")
        for name, what, was, become, fault in found:
            table.add_row(name, what, was, become, "" if fault else "less")
        console.print(table)
    if rounding:
        table = Table("where", "largest difference", title="Results that are not the same to the last bit")
        for name, worst in rounding.items():
            table.add_row(name, f"{worst:.1e}")
        console.print(table)
    table = Table(f"{LAYERS} layers", "before, s", "now, s", "ratio", "textbook, s", "now, of that")
    for what in ("trace", "lower", "compile"):
        was, become, least = (statistics.median(each[what] for each in times) for times in seconds.values())
        ratios = f"{become / was:.2f}", f"{least:.2f}", f"{become / least:.2f}"
        table.add_row(what, f"{was:.2f}", f"{become:.2f}", *ratios)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
