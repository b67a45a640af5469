"""Run a benchmark by its name: python benchmarks NAME [its options]. Without a name: what there is."""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = [*FOLDER.glob("[a-z]*.py"), *FOLDER.glob("*/__main__.py")]
PROGRAMS = {
    path.stem if path.parent == FOLDER else path.parent.name: path
    for path in sorted(FILES)
    if '__name__ == "__main__"' in path.read_text()
}


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name not in PROGRAMS:
        for program, path in PROGRAMS.items():
            print(f"  {program:<18}", (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0])
        asked = name and not name.startswith("-")
        sys.exit(f"There is no benchmark {name!r}; these are all." if asked else 0)
    sys.argv = [str(PROGRAMS[name]), *options]
    runpy.run_path(str(PROGRAMS[name]), run_name="__main__")


if __name__ == "__main__":
    main()
