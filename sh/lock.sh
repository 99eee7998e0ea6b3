#!/usr/bin/env bash
# Write requirements/ci.lock: every package that the tests need, for Python 3.10 to 3.13 on any system, with the
# SHA-256 of each of its files. Needs uv (pip install uv) and a network. Without torch, torchvision and the CUDA
# libraries that some builds of torch bring: an index of PyTorch's serves other files than PyPI under the same version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

own_builds='^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)$'
compile=(uv pip compile pyproject.toml --extra test --universal --python-version 3.10 --constraint constraints.txt --quiet)
leave_out=()
while read -r name; do
    leave_out+=(--no-emit-package "$name")
done < <("${compile[@]}" --no-annotate --no-header | sed -E 's/[=[ ].*//' | sort -u | grep -E "$own_builds")
mkdir -p requirements
{
    echo "# Made by sh/lock.sh; sh/install.sh --test installs it with --require-hashes."
    "${compile[@]}" --generate-hashes --no-annotate --no-header "${leave_out[@]}" | sed '/^# The following/,/^#$/d'
} >requirements/ci.lock.new
mv requirements/ci.lock.new requirements/ci.lock
