#!/usr/bin/env bash
# Test what is shipped: the wheel of dist/ in a new environment with jax alone and pytest, from another folder.
#   tests/wheel.sh PYTHON [REQUIREMENT ...]      tests/wheel.sh python3.11 jax==0.10.0 jaxlib==0.10.0
#   TESTS="tests/test_import.py ..."             these and the docstrings, rather than all
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# What is asked for by version is free of the constraints.
asked=$(printf '^%s==\n' "${@%%[=<>]*}")
if [ $# -gt 0 ]; then grep --invert-match "$asked" constraints.txt; else cat constraints.txt; fi > "$folder/constraints.txt"
"$python" -m venv "$folder/venv"
bin=$folder/venv/bin
"$bin/python" -m pip install --quiet --constraint "$folder/constraints.txt" dist/*.whl "$@"
"$bin/python" -c 'import jbn, jax, sys; print(f"jbn {jbn.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}")'
"$bin/python" -m pip install --quiet --constraint "$folder/constraints.txt" pytest pytest-xdist flatbuffers
mkdir "$folder/tests"
cp conftest.py pyproject.toml "$folder"
cp -r tests/*.py tests/golden benchmarks/hlo.py benchmarks/conversion.py benchmarks/libraries.py "$folder/tests"
rm "$folder"/tests/{test_documents,test_files,test_faults,faults}.py  # README, docs and the table of faults are not in the wheel
cd "$folder"
"$bin/python" -m pytest -p conftest --doctest-ignore-import-errors --pyargs jbn
"$bin/python" -m pytest --numprocesses 2 --dist loadfile ${TESTS:-tests}
