"""What the scripts of this folder share: the batches, the check, and the file. Any Python from 3.8 on runs it.

x                [steps + 1, batch, features] the training batches, of which the last is the next step
entries/NAME     what the library stores after all but the last, by its own names, shapes and dtypes
evaluated        evaluation of the last batch by them
trained          the training output on the last batch
next/NAME        what it stores after that step
settings         JSON: library, package, python, decay (weight of the old value), epsilon, feature_axis (of x), steps
"""

import io
import json
import platform
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "libraries"
RENORM = FOLDER.parent / "renorm"
STEPS = 4
SCALE, BIAS = np.array([0.5, -1, 2], np.float32), np.array([0.1, 1, -3], np.float32)


def batches(*middle):
    """[steps + 1, 8, *middle, features]: their mean and spread move from step to step, and from feature to feature."""
    rng = np.random.default_rng(0)
    steps = range(STEPS + 1)
    shape = (8, *middle, len(SCALE))
    return np.float32([rng.normal([0, 0.5 * step, -1], [1 + step, 1, 0.5], shape) for step in steps])


def expected(x, axes, decay, unbiased, start, debias):
    """The running mean and variance in float64; `start` is what they are before the first batch, or "first"."""
    measured = [(batch.mean(axes), batch.var(axes, ddof=int(unbiased))) for batch in x.astype(np.float64)]
    running = measured[0] if start == "first" else start
    for moments in measured:
        running = [decay * old + (1 - decay) * new for old, new in ((running[i], moments[i]) for i in (0, 1))]
    return [value / (1 - decay ** len(x)) if debias else value for value in running]


def write(
    library,
    *,
    package,
    train,
    evaluate,
    entries,
    running,
    decay,
    epsilon,
    unbiased,
    start=(0, 1),
    debias=False,
    x=None,
    feature_axis=-1,
    scale=SCALE,
    bias=BIAS,
    by_running=False,
    unbiased_output=False,
    frozen=None,
    rtol=1e-5,
    denominator=None,
    before_last=None,
):
    """Train, store and evaluate, and compare that with NumPy in float64 before it is written.

    train(batch), evaluate(batch) -> output; entries() -> {name: array}; running(entries) -> the mean and variance of it
    that evaluation uses, which began at `start` (mean, var) or at the first batch, and are divided by
    1 - decay^steps with `debias`. `scale` and `bias` are what the layer applies, `denominator(var)` what it divides by.
    `unbiased` is the running variance, `unbiased_output` the one that training normalizes by; `by_running` where it
    normalizes by the running statistics after the step, `frozen` the function that is "trained" by and moves nothing.
    `before_last()` is called before the entries are taken. `rtol` is wider where the library's own rounding is.
    """
    x = batches() if x is None else x
    denominator = denominator or (lambda var: np.sqrt(var + epsilon))
    for batch in x[:-1]:
        train(batch)
    if before_last:
        before_last()
    stored = {name: np.array(value) for name, value in entries().items()}
    evaluated = np.array(evaluate(x[-1]))
    again = {name: np.array(value) for name, value in entries().items()}
    trained = np.array((frozen or train)(x[-1]))
    after = {name: np.array(value) for name, value in entries().items()}

    kept = feature_axis if isinstance(feature_axis, tuple) else (feature_axis,)
    axes = tuple(axis for axis in range(x.ndim - 1) if axis - (x.ndim - 1) not in kept)
    width = [x.shape[axis] for axis in kept]
    last = x[-1].astype(np.float64)

    def close(found, right, what):
        np.testing.assert_allclose(found, right, rtol=rtol, atol=rtol, err_msg=f"{library}: {what}")

    def by(mean, var):
        def wide(value):
            return np.reshape(value, [x.shape[a] if a in kept else 1 for a in range(1 - x.ndim, 0)])

        y = (last - wide(mean)) / wide(denominator(np.asarray(var, np.float64)))
        return y * wide(np.broadcast_to(scale, width)) + wide(np.broadcast_to(bias, width))

    for held, steps, what in ((stored, x[:-1], "entries"), (after, x, "next")):
        right = expected(x[:-1] if frozen else steps, axes, decay, unbiased, start, debias)
        for i, found in enumerate(running(held)):
            close(np.reshape(found, width), right[i], "{} {}".format(what, ("mean", "var")[i]))
    close(evaluated, by(*(np.reshape(value, width) for value in running(stored))), "evaluated")
    measured = running(after) if by_running or frozen else (last.mean(axes), last.var(axes, ddof=int(unbiased_output)))
    close(trained, by(*(np.reshape(value, width) for value in measured)), "trained")
    for name, value in stored.items():
        np.testing.assert_array_equal(again[name], value, err_msg=f"{library}: evaluation changes {name}")

    settings = {
        "library": library,
        "package": f"{package}=={version(package)}",
        "python": platform.python_version(),
        "decay": decay,
        "epsilon": epsilon,
        "feature_axis": feature_axis,
        "steps": STEPS,
    }
    arrays = {"x": x, "evaluated": evaluated, "trained": trained, "settings": json.dumps(settings)}
    arrays.update({"entries/" + name: value for name, value in stored.items()})
    arrays.update({"next/" + name: value for name, value in after.items()})
    save(FOLDER / (library.replace(" ", "-") + ".npz"), arrays)
    print(", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in stored.items()))


def write_renorm(name, package, runs):
    """Twenty steps of batch renormalization by each of `runs`: {settings: layer}, whose correction starts on the way.

    layer(batch, train) -> output, running mean, running variance, after the step.
    """
    rng = np.random.default_rng(0)
    x = np.float32([rng.normal([0, 0.5 * t, -1], [1 + 9 * (t > 9), 1, 0.2], (8, 3)) for t in range(20)])
    arrays = {"x": x}
    for run, (settings, layer) in runs.items():
        found = [[np.array(each) for each in layer(batch, True)] for batch in x]
        parts = {part: np.array([step[i] for step in found]) for i, part in enumerate(("y", "mean", "var"))}
        settings = {"package": f"{package}=={version(package)}", "python": platform.python_version(), **settings}
        parts.update(evaluated=np.array(layer(x[-1], False)[0]), settings=json.dumps(settings))
        arrays.update({f"{run}/{part}": value for part, value in parts.items()})
    save(RENORM / f"{name}.npz", arrays)


def save(path, arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:  # as np.savez_compressed, whose headers are longer
        for name, value in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            file.writestr(
                zipfile.ZipInfo(name + ".npy", (2026, 11, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )
    print(f"{path.name}: {path.stat().st_size} bytes")
