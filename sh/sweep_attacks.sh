#!/usr/bin/env bash
# Make the records of several attacks:  sh/sweep_attacks.sh --attacks "badnet sig" --seeds "0 1" --jobs 2
# Each option is an environment variable too (ATTACKS, DATASETS, MODEL, WIDTH, PRATIO, TARGETS, SEEDS); others are
# for `ulrl sweep`, such as --dry_run and --status. A second run does only what is missing.
# DEFENSES and RATIOS, as --defenses and --ratios, are for sweep_defenses.sh; here they do nothing.
no_effect="--defenses --ratios"
source "$(dirname "${BASH_SOURCE[0]}")/_sweep.sh"

attacks | sweep
