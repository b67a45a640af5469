"""Plant faults in jbn/, one at a time, and tell which the tests see, and which those of `make quick` see too.

    python tests/faults.py                     each fault of tests/faults.txt, by the tests that stand with it there
    python tests/faults.py --quick             by tests/test_quick.py as well
    python tests/faults.py --peers             also what only the tests against other libraries see
    python tests/faults.py -k center --says    those with this word in their name, with what the tests say
    python tests/faults.py --check             nothing but whether each text and each test is there

Each fault is planted in a copy of the tree, and tested in a process of its own; first all tests run without one.
"""

import ast
import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
QUICK = "tests/test_quick.py"
console = Console(highlight=False, markup=False)


class Fault(NamedTuple):
    name: str
    old: str  # what stands in jbn/ once
    new: str
    tests: list[str]

    @property
    def of_peers(self) -> bool:
        return any(test.startswith("tests/peers/") for test in self.tests)


class Outcome(NamedTuple):
    status: int  # pytest's: 0 if all pass, 1 if one fails, others if none was run; 124 if time was up
    seconds: float
    says: str

    @property
    def seen(self) -> bool:
        return self.status == 1


@dataclasses.dataclass
class Config:
    names: Annotated[str, tyro.conf.arg(aliases=["-k"])] = ""
    """Only faults in whose name this regular expression is found."""
    quick: bool = False
    """By tests/test_quick.py as well."""
    peers: bool = False
    """Also faults that tests/peers sees."""
    check: bool = False
    """Look whether each text stands in jbn/ once and each test is there, and run nothing."""
    says: bool = False
    """Show what the first test that fails says."""
    jobs: int = 2
    """How many run at a time."""
    timeout: float = 600.0
    """Seconds that the tests of one fault may take."""


def read() -> list[Fault]:
    """The faults of tests/faults.txt."""
    found = []
    for block in re.split(r"\n{2,}", (ROOT / "tests/faults.txt").read_text()):
        name, *lines = block.splitlines()
        if lines and lines[0].startswith("- "):
            marked = {mark: [line[2:] for line in lines if line[0] == mark] for mark in "-+>"}
            found.append(Fault(name, "\n".join(marked["-"]), "\n".join(marked["+"]), marked[">"]))
    return found


def misplaced(faults: list[Fault]) -> list[str]:
    """What is wrong with the table: a text that is not there once, a name that is, code that is none, no such test."""
    sources = [path.read_text() for path in (ROOT / "jbn").rglob("*.py")]
    wrong = [
        f"{name!r} stands there {count} times" for name, count in Counter(f.name for f in faults).items() if count > 1
    ]
    for fault in faults:
        places = [source for source in sources for _ in range(source.count(fault.old))]
        if len(places) != 1:
            wrong.append(f"{fault.name!r}: in jbn/ there is {len(places)} times: {fault.old}")
            continue
        try:
            ast.parse(places[0].replace(fault.old, fault.new))
        except SyntaxError as error:
            wrong.append(f"{fault.name!r}: {error.msg}")
        wrong += [] if fault.tests else [f"{fault.name!r}: there is no test"]
        for test in fault.tests:
            file, _, function = test.partition("[")[0].partition("::")
            there = (ROOT / file).is_file() and (not function or f"def {function}(" in (ROOT / file).read_text())
            wrong += [] if there else [f"{fault.name!r}: there is no {test}"]
    return wrong


def copy(folder: Path) -> None:
    """The tree as git sees it, with what is new."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def plant(fault: Fault, folder: Path) -> None:
    for path in (folder / "jbn").rglob("*.py"):
        path.write_text(path.read_text().replace(fault.old, fault.new))


def run(folder: Path, tests: list[str], *options: str, timeout: float | None = None) -> Outcome:
    """The tests by the jbn of that folder, with what earlier runs have compiled."""
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".venv" / "compiled"))
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": compiled, "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "--quiet", "--color=no", "-p", "no:cacheprovider", *options, *tests]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome(124, time.perf_counter() - start, "time is up")
    said = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE) or [done.stdout[-1000:] + done.stderr[-1000:]]
    return Outcome(done.returncode, time.perf_counter() - start, "\n".join(said))


def outcomes(fault: Fault, config: Config) -> list[Outcome]:
    """By its own tests, and by the quick ones where these are asked for."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        plant(fault, Path(folder))
        of = [fault.tests, [QUICK]] if config.quick else [fault.tests]
        return [run(Path(folder), tests, "--exitfirst", timeout=config.timeout) for tests in of]


def sound(faults: list[Fault], config: Config, pool: ThreadPoolExecutor) -> None:
    """Without a fault all tests pass."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests)) + [QUICK] * config.quick
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        parts = [tests[start :: config.jobs] for start in range(config.jobs)]
        for outcome in pool.map(lambda part: run(Path(folder), part), filter(None, parts)):
            if outcome.status:
                sys.exit(f"Without a fault:\n{outcome.says}")


def main(config: Config) -> None:
    faults = [fault for fault in read() if re.search(config.names, fault.name)]
    if wrong := misplaced(faults):
        sys.exit("\n".join(wrong))
    if config.check:
        return
    faults = [fault for fault in faults if config.peers or not fault.of_peers]
    columns = ["fault", "tests", "seen", *["by make quick"] * config.quick, "seconds", *["says"] * config.says]
    table, seen, seen_by_quick = Table(*columns), 0, 0
    with ThreadPoolExecutor(config.jobs) as pool:
        sound(faults, config, pool)
        found = pool.map(lambda fault: outcomes(fault, config), faults)
        for fault, (own, *quick) in track(zip(faults, found, strict=True), "Faults", len(faults), console=console):
            seen, seen_by_quick = seen + own.seen, seen_by_quick + any(other.seen for other in quick)
            if not own.seen:
                console.print(f"NOT SEEN: {fault.name}", style="red")  # at once
            cells = [fault.name, "\n".join(fault.tests).replace("tests/", ""), "seen" if own.seen else "NOT SEEN"]
            cells += ["seen" * other.seen for other in quick]
            cells += [f"{sum(outcome.seconds for outcome in (own, *quick)):.0f}"] + [own.says] * config.says
            table.add_row(*cells, style=None if own.seen else "red")
    console.print(table)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    by_quick = f"; by make quick {seen_by_quick}" if config.quick else ""
    minutes = (used.ru_utime + used.ru_stime) / 60
    console.print(f"{seen} of {len(faults)} seen{by_quick}; {minutes:.0f} min of processor time")
    sys.exit(seen < len(faults))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
