#!/usr/bin/env bash
# Make the folders for what runs write (record/) and for downloaded datasets (data/).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p record data
