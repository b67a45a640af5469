"""Several processes that train together: how they meet, agree, and end when one of them is lost."""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
HEARTBEAT_SECONDS = 20  # silence after which a process counts as lost; a dead connection is noticed at once
MEETING_SECONDS = 120  # from the start of the first process to that of the last
MESSAGE_BYTES = 8192
# In the errors of JAX where it does not reach another process; Gloo carries the collectives of CPUs.
SIGNS_OF_LOSS = ("Gloo", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "another task", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Cluster:
    coordinator: str | None = None
    """HOST:PORT of process 0, to train with several processes; all see the same --run folder."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this one is, from 0."""
    distributed: bool = False
    """Several processes that JAX finds by itself: Slurm, Kubernetes, Cloud TPU, Open MPI."""


def join(cluster: Cluster) -> None:
    """Meet the other processes, if there are any; before anything else is done with JAX.

    Raises:
      ValueError: the address and the two numbers are not given together, or do not fit.
    """
    address = (cluster.coordinator, cluster.processes, cluster.process)
    if address == (None, None, None) and not cluster.distributed:
        return
    if not cluster.distributed:
        coordinator, processes, process = address
        if coordinator is None or processes is None or process is None:
            raise ValueError("--coordinator, --processes and --process go together; or give --distributed alone.")
        if ":" not in coordinator or processes < 1 or not 0 <= process < processes:
            raise ValueError(
                f"coordinator {coordinator}, process {process} of {processes}; expected HOST:PORT, and processes that "
                f"count from 0."
            )
    elif address != (None, None, None):
        raise ValueError("--distributed finds the other processes by itself; leave --coordinator and its numbers out.")
    where = "which JAX looks for" if cluster.distributed else f"{cluster.processes} in all, at {cluster.coordinator}"
    print(f"Waiting up to {MEETING_SECONDS} s for the other processes, {where}.", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and the process would go on
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python runs no handler of its own in there
    try:
        jax.distributed.initialize(
            *address, initialization_timeout=MEETING_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise ValueError(f"JAX cannot meet other processes here ({error}). Is this a cluster that it knows?") from None
    finally:
        signal.signal(signal.SIGINT, handler)


def gather(value) -> list:
    """What each process has as `value`, which must fit into JSON."""
    if jax.process_count() == 1:
        return [value]
    message = json.dumps(value, default=str, ensure_ascii=False).encode()
    if len(message) > MESSAGE_BYTES:
        raise ValueError(f"a message of {len(message)} bytes; expected at most {MESSAGE_BYTES}.")
    messages = multihost_utils.process_allgather(np.frombuffer(message.ljust(MESSAGE_BYTES), np.uint8))
    return [json.loads(bytes(row)) for row in np.asarray(messages)]


def agree(prepare: Callable[[], tuple[T, dict]]) -> T:
    """What `prepare` gives, if it succeeds in every process and the facts it gives beside are the same in all.

    Raises:
      ValueError: what went wrong, and where, or a fact that differs, with both values; in every process alike.
    """
    try:
        prepared, facts = prepare()
        answer = {"facts": facts, "problem": None}
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            raise
        prepared, answer = None, {"facts": {}, "problem": str(error)[:1500]}
    answers = gather(answer)
    for process, other in enumerate(answers):
        if other["problem"] is not None:
            raise ValueError(f"process {process}: {other['problem']}")
    for process, other in enumerate(answers):
        for name, value in answers[0]["facts"].items():
            if other["facts"][name] != value:
                raise ValueError(
                    f"process 0 has {name} {value} and process {process} has {other['facts'][name]}; start all alike."
                )
    return cast(T, prepared)


@contextmanager
def ending_at_once(advice: str):
    """Where anything goes wrong in one of several processes, end it at once: the usual way out waits for the others.

    They cannot go on without it, and see its connection close. Where a process hangs, JAX ends the others.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = 1
        if isinstance(error, Exception) and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            seen = str(error).splitlines()[0][:300]
            print(
                f"error: another process is lost, and training cannot go on without it. {advice}\n"
                f"What this process saw: {seen}",
                file=sys.stderr,
            )
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
