# What the sweep_*.sh share: their options, each also an environment variable. To be sourced.
set -euo pipefail
[[ ${ULRL_HOME:-/} == /* ]] || ULRL_HOME=$PWD/$ULRL_HOME # before the cd, it is relative to where the user is
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ATTACKS=${ATTACKS:-badnet blended sig wanet}
DATASETS=${DATASETS:-digits}
MODEL=${MODEL:-preactresnet18}
WIDTH=${WIDTH:-16}
PRATIO=${PRATIO:-0.1}
TARGETS=${TARGETS:-0}
DEFENSES=${DEFENSES:-harden ulrl rnp tsbd fst ft ft-sam fp anp nad i-bau sau npd nc clp bnp}
RATIOS=${RATIOS:-0.1}
SEEDS=${SEEDS:-0}
export PATH="$PWD/.venv/bin:$PATH" # as sh/install.sh makes it; else the python that is active

sweep_flags=() # what is not ours is for ulrl.sweep: --jobs 2, --engine ray, --dry_run, --status, --retry_failed, ...
while (($#)); do
    if [[ " ${no_effect:-} " == *" $1 "* ]]; then
        echo "ulrl: $1 would have no effect on sh/${0##*/}; leave it out, or run sh/sweep_defenses.sh" >&2
        exit 2
    fi
    case $1 in
        --attacks) ATTACKS=${2:?"--attacks needs a value"} && shift 2 ;;
        --datasets) DATASETS=${2:?"--datasets needs a value"} && shift 2 ;;
        --model) MODEL=${2:?"--model needs a value"} && shift 2 ;;
        --width) WIDTH=${2:?"--width needs a value"} && shift 2 ;;
        --pratio) PRATIO=${2:?"--pratio needs a value"} && shift 2 ;;
        --targets) TARGETS=${2:?"--targets needs a value"} && shift 2 ;;
        --defenses) DEFENSES=${2:?"--defenses needs a value"} && shift 2 ;;
        --ratios) RATIOS=${2:?"--ratios needs a value"} && shift 2 ;;
        --seeds) SEEDS=${2:?"--seeds needs a value"} && shift 2 ;;
        *) sweep_flags+=("$1") && shift ;;
    esac
done

list() { # "a b" as [a, b]
    local words
    read -ra words <<<"$1"
    local IFS=,
    echo "[${words[*]}]"
}

attacks() { # the section of a sweep file
    cat <<YAML
attacks:
  attack: $(list "$ATTACKS")
  dataset: $(list "$DATASETS")
  model: $MODEL
  width: $WIDTH
  pratio: $(list "$PRATIO")
  target: $(list "$TARGETS")
  seeds: $(list "$SEEDS")
YAML
}

defenses() {
    cat <<YAML
defenses:
  defense: $(list "$DEFENSES")
  ratio: $(list "$RATIOS")
  seeds: [0] # the records have seeds of their own
YAML
}

sweep() { # the sweep file comes on standard input
    python -m ulrl.sweep /dev/stdin ${sweep_flags[@]+"${sweep_flags[@]}"}
}
