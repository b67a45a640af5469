"""Several processes that train on one batch together over loopback, each with its own rows and devices.

`launch` starts as many as the largest form takes; in the others some of them, or of their devices, are left out. By
hand, each in a shell of its own:

    python tests/processes.py --coordinator 127.0.0.1:1234 --processes 2 --process 0 --devices 1
    python tests/processes.py --coordinator 127.0.0.1:1234 --processes 2 --process 1 --devices 1
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import product

import compiling

FORMS = ((4, 2), (4, 1), (2, 2), (2, 1))  # processes, and devices of each


def sharing_programs(folder):
    """Environment of processes of which the first compiles what spans them, for all, and keeps it in `folder`.

    Each of them calls `take_programs` too.
    """
    timeout = {"JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS": "300000"}
    return timeout | {"JAX_SHARE_BINARY_BETWEEN_HOSTS": "1", "JAX_COMPILATION_CACHE_DIR": str(folder)}


def take_programs():
    """Of CPUs JAX gives each process names of its own for a program: by those of its devices, which are left out."""
    from jax._src import cache_key

    cache_key._hash_accelerator_config = lambda *_: None


def launch(processes=4, devices=2, limit=300):
    """What each process prints: a list of [[processes, devices], way, dtype, masked, offset, differences].

    Where one fails, or they take more than `limit` seconds, all are killed and RuntimeError says what they wrote.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{unused.getsockname()[1]}"
    with ExitStack() as stack:
        workers, outputs, logs = [], [], []
        environment = os.environ | sharing_programs(stack.enter_context(tempfile.TemporaryDirectory()))
        for process in range(processes):
            options = {"coordinator": coordinator, "processes": processes, "process": process, "devices": devices}
            command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
            outputs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            logs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            streams = {"stdout": outputs[-1], "stderr": logs[-1]}
            workers.append(stack.enter_context(subprocess.Popen(command, env=environment, **streams)))
            stack.callback(workers[-1].kill)
        deadline = time.monotonic() + limit
        while None in (codes := [worker.poll() for worker in workers]) or any(codes):
            if any(codes) or time.monotonic() > deadline:
                raise RuntimeError(f"exit codes {codes}\n" + "\n".join(read(log)[-3000:] for log in logs))
            time.sleep(0.05)
        return [json.loads(read(output).splitlines()[-1]) for output in outputs]  # below what Gloo prints


def read(file):
    file.seek(0)
    return file.read()


def work(process):
    """The largest differences from float64 of this process's part, for each form it has a part in, way and case."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import ways
    from jax.sharding import NamedSharding

    def placed_on(mesh, processes):
        def place(tree, spec):
            def own(a):
                if isinstance(a, jax.Array) and not a.is_fully_addressable:
                    return a  # the state of the step before
                part = np.split(a, processes)[process] if spec else np.asarray(a)
                return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), part)

            return jax.tree.map(own, tree)

        return place

    by_process = np.reshape(jax.devices(), (jax.process_count(), -1))
    forms = [form for form in FORMS if np.all(np.less_equal(form, by_process.shape))]
    cases = (jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, True)  # statistics are float32 in all
    rows = []
    # Every other of all combinations: each form has each way and each case, and each way each case twice.
    for form, way, (dtype, masked) in list(product(forms, ways.over(by_process.ravel()), cases))[::2]:
        processes, devices = form
        if process >= processes:
            continue
        held = list(by_process[:processes, :devices].ravel())
        name, place = f"{processes} x {devices}, {way}", placed_on(ways.mesh(devices=held, i=len(held)), processes)
        ways.WAYS[name] = ways.over(held)[way]
        for offset in (0.0, 1e3):
            rows.append(
                [form, way, jnp.dtype(dtype).name, masked, offset, ways.compare(name, dtype, masked, offset, place)]
            )
    mesh = ways.mesh(i=jax.device_count())
    found = recalibrated(mesh, placed_on(mesh, jax.process_count()))
    return [*rows, [by_process.shape, "recalibrate", "float32", True, 0.0, found]]


def recalibrated(mesh, place):
    """The largest differences of recalibrated states from float64, of two layers over four masked batches."""
    import jax
    import numpy as np
    import reference
    import ways
    from jax.sharding import PartitionSpec as P

    import jbn

    def local(params, states, batch):
        x, first = jbn.batch_norm(batch[0], params, states[0], train=True, weights=batch[1], axis_name="i")
        _, second = jbn.batch_norm(abs(x), params, states[1], train=True, weights=batch[1], axis_name="i")
        return None, [first, second]

    batches = [ways.batch(seed, masked=True)[:2] for seed in range(4)]
    split = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("i")), out_specs=P())
    params, states = place((ways.PARAMS, [jbn.init(ways.SHAPE[-1])[1]] * 2), P())
    states = jbn.recalibrate(split, params, states, [place(batch, P("i")) for batch in batches])
    x, mask = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    found = {}
    for layer, state in enumerate(states):
        count, mean, var = reference.moments(x, mask)
        var = var * count / (count - 1)
        found[f"mean {layer}"] = float(np.max(np.abs(state.mean - mean) / np.sqrt(var)))
        found[f"var {layer}"] = float(np.max(np.abs(state.var / var - 1)))
        x = np.abs(reference.normalize(x, mean, var, *ways.PARAMS))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", required=True, help="address:port of process 0")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--process", type=int, required=True, help="from 0")
    parser.add_argument("--devices", type=int, required=True, help="of each process")
    args = parser.parse_args()
    os.environ.update(compiling.environment(args.devices))
    import jax  # reads them

    take_programs()
    patience = 30  # seconds, rather than minutes, until the loss of a process is seen
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process,
        initialization_timeout=patience,
        heartbeat_timeout_seconds=patience,
        shutdown_timeout_seconds=patience,
    )
    if jax.device_count() != args.processes * args.devices:
        raise RuntimeError(f"{jax.device_count()} devices; expected {args.processes} x {args.devices}.")
    print(json.dumps(work(args.process)))


if __name__ == "__main__":
    main()
