"""Lines of code by file, without docstrings, comments and blank lines, and what has changed since a release.

python benchmarks/lines.py                   the lines of every file that git tracks
python benchmarks/lines.py v0.1.0            and what has changed since a git revision
python benchmarks/lines.py LINES.json        or since what `--json LINES.json` wrote then
"""

import ast
import dataclasses
import io
import json
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclasses.dataclass(frozen=True)
class Config:
    since: Positional[str] = ""
    """A git revision, or a file that `--json` wrote."""
    json: Path | None = None
    """Where the lines of every file go."""


def lines_of(source: str) -> int:
    """How many lines of a file hold code. A string that stands by itself documents what is before it."""
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = (range(token.start[0], token.end[0] + 1) for token in tokens if token.type not in NO_CODE)
    return len(set().union(*code) - documentation)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def now() -> dict[str, int]:
    names = git("ls-files", "--cached", "--others", "--exclude-standard", "*.py").splitlines()
    return {name: lines_of((ROOT / name).read_text()) for name in names if (ROOT / name).exists()}


def then(since: str) -> dict[str, int]:
    if Path(since).is_file():
        return json.loads(Path(since).read_text())
    names = git("ls-tree", "-r", "--name-only", since).splitlines()
    return {name: lines_of(git("show", f"{since}:{name}")) for name in names if name.endswith(".py")}


def by_folder(lines: dict[str, int]) -> Counter:
    """The sums of every folder, as another entry that ends in a slash."""
    sums = Counter()
    for name, count in lines.items():
        for folder in Path(name).parents:
            sums["in all/" if folder == Path() else f"{folder}/"] += count
    return sums


def main(config: Config) -> None:
    found = now()
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    since = config.since or git("tag", "--list", "--sort=creatordate", "v*").partition("\n")[0]
    before = then(since) if since else None
    table = Table("file", "lines", *([] if before is None else [f"since {since}"]), title="Lines of code")
    rows, old = Counter(found) + by_folder(found), Counter(before or {}) + by_folder(before or {})
    for name in sorted({*rows, *old}, key=lambda name: (name == "in all/", name)):
        change = rows[name] - old[name]
        table.add_row(name, str(rows[name]), *([] if before is None else [f"{change:+}" if change else ""]))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
