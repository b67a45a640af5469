#!/usr/bin/env bash
# Write tests/golden/libraries again, each library in an environment of its own, in a folder that is removed.
#
#   tests/golden/make.sh [NAME...]     scripts of tests/golden/make; without, all. Each says in its first lines which
#                                      Python it is run with, as pythonX.Y on the PATH, and what is installed.
#   ENVIRONMENTS=FOLDER                keeps the environments there, for the next time
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ $# -eq 0 ]; then
    set -- $(cd "$here/make" && ls -- *.py | grep -v '^golden.py$' | sed 's/\.py$//')
fi
failed=()
for name; do
    script=$here/make/$name.py
    environment=${ENVIRONMENTS:-$folder}/$name
    work=$(mktemp -d -p "$folder")
    {
        [ -d "$environment" ] || "python$(sed -n 's/^# python: //p' "$script")" -m venv "$environment"
        sed -n 's/^# pip: //p' "$script" | xargs "$environment/bin/python" -m pip install --quiet
        # not as a script: the folder that it is in would come first, and paddle.py be what `import paddle` finds
        (cd "$work" && PYTHONPATH=$here "$environment/bin/python" -c \
            'import runpy, sys; runpy.run_path(sys.argv[1], run_name="__main__")' "$script")
    } || failed+=("$name")
    [ -n "${ENVIRONMENTS:-}" ] || rm -rf "$environment"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
