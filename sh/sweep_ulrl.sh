#!/usr/bin/env bash
# ULRL at several shares of clean data, on the records of sweep_attacks.sh, which are made where missing:
#   sh/sweep_ulrl.sh --datasets "digits fashion_mnist" --ratios "0.01 0.05 0.1" --seeds "0 1 2" --jobs 2
# Options as sweep_attacks.sh, and RATIOS; DEFENSES does nothing here.
RATIOS=${RATIOS:-0.05 0.1}
no_effect=--defenses
source "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh"

DEFENSES=ulrl
{ attacks && defenses; } | sweep
