"""Computes what is missing of the claims, job by job, then draws and tells all of them."""

import importlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import claim
import figures
import jax
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import track

console = Console(highlight=False, soft_wrap=True)


class Config(Protocol):
    """What a program is told, as dataclasses have it."""

    @property
    def data(self) -> Path | None: ...
    @property
    def folder(self) -> Path: ...
    @property
    def claims(self) -> tuple[str, ...]: ...
    @property
    def markdown(self) -> bool: ...


def into_pages(name: str, told: Sequence[str], pages: Sequence[Path]) -> None:
    """The tables of a claim in the pages that have a place for them, `<!-- name -->` to `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    for page in pages:
        text = page.read_text()
        if start in text:
            before, after = text.split(start)[0], text.split(end)[1]
            page.write_text("\n".join([before + start, "", *told, "", end + after]))


def show(config: Config, size: Any, image_names: Callable[[], Sequence[str]], pages: Sequence[Path] = ()) -> None:
    """Each claim is a module of `jobs(data, size)`, `draw(found, path)` and `tell(found)`; what is there is kept."""
    modules = {name: importlib.import_module(name) for name in config.claims}
    if config.markdown:
        for name, module in modules.items():
            found = claim.read(config.folder / f"{name}.json")
            print(f"**{name}**\n", *module.tell(found), "", sep="\n")
        return
    facts = {
        "size": size._asdict(),
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "jax": jax.__version__,
        "images": list(image_names()),
    }
    records = {name: claim.Record(config.folder / f"{name}.json", facts) for name in modules}
    missing = []
    for name, module in modules.items():
        for job, run in module.jobs(config.data, size).items():
            if job not in records[name].jobs:
                missing.append((name, job, run))
    for name, job, run in track(missing, "showing", console=console, disable=not console.is_terminal):
        started = time.perf_counter()
        found = run()
        records[name].add(job, jax.block_until_ready(found), time.perf_counter() - started)
        console.print(f"{name}: {job}, {time.perf_counter() - started:.0f} s")
    embedded = {name for name in facts["images"] if name.startswith("embedded")}
    figures.footnotes[:] = [f"images: {name}" for name in sorted(embedded)]
    for name, module in modules.items():
        found = {job: records[name].jobs[job] for job in module.jobs(config.data, size)}
        with plt.rc_context():
            module.draw(found, config.folder / f"{name}.png")
        console.print(f"\n{name}", *module.tell(found), sep="\n")
        into_pages(name, module.tell(found), pages)
    seconds = sum(job["took"] for record in records.values() for job in record.jobs.values())
    console.print(f"\n{seconds / 60:.0f} minutes in all, {' and '.join(facts['images'])}")
