#!/usr/bin/env bash
# The defenses that DEFENSES names, on the records of sweep_attacks.sh, which are made where missing:
#   sh/sweep_defenses.sh --defenses "ulrl ft" --ratios "0.05 0.1" --jobs 2
# Options as sweep_attacks.sh, and DEFENSES, RATIOS.
source "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh"

{ attacks && defenses; } | sweep
