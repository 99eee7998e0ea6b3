#!/usr/bin/env bash
# All checks, the quick ones first; stops at the first failure:  sh/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash sh/install.sh --test
export PATH="$PWD/.venv/bin:$PATH"
# Two test processes already fill two cores; more threads in each would only fight over them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check
ruff format --check
mypy
lint-imports
# By file: what a file prepares for its tests is prepared once.
pytest -n 2 --dist loadfile "$@"

# The numbers again as a machine without AVX-512 rounds them, which is most of them.
if (($# == 0)) && ! [[ ${ATEN_CPU_CAPABILITY:-} ]]; then
    ATEN_CPU_CAPABILITY=avx2 pytest -n 2 tests/test_training.py tests/test_selection.py \
        tests/test_models.py::test_defense_on_every_architecture
fi
