#!/usr/bin/env bash
# From a fresh checkout to a repaired model: backdoor a small network on the digits dataset with BadNets,
# then remove the backdoor with Harden. Needs no GPU and downloads no dataset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash sh/install.sh
bash sh/init_folders.sh
.venv/bin/python attack/badnet.py --yaml_path config/attack/prototype/digits.yaml --patch_size 2 --save_folder_name quickstart --overwrite
.venv/bin/python defense/harden.py --result_file quickstart --overwrite
echo "The backdoored model is in record/quickstart; the repaired one and its plots are in record/quickstart/defense/harden."
