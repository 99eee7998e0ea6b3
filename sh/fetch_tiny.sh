#!/usr/bin/env bash
# Fetch Tiny-ImageNet (about 240 MB) and lay it out as BackdoorBench does:  sh/fetch_tiny.sh [DATA]
#   DATA           the folder for data sets (default: data); the images come to DATA/tiny/tiny-imagenet-200
# A run that was stopped goes on where it was; a second run finds everything in place and does nothing.
set -euo pipefail
given=${1:+$(mkdir -p "$1" && cd "$1" && pwd)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source sh/fetch.bash

final=${given:-data}/tiny/tiny-imagenet-200
work=${given:-data}/tiny/.fetch

if [[ ! -d $final ]]; then
    mkdir -p "$work"
    fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip 90528d7ca1a48142e341f4ef8d21d0de "$work/tiny.zip"
    rm -rf "$work/unpacked"
    unpack "$work/tiny.zip" "$work/unpacked"
    # The test images lie in one folder with a list of their classes; BackdoorBench wants a folder per class.
    (
        cd "$work/unpacked/tiny-imagenet-200/val"
        while read -r image class _; do
            mkdir -p "$class"
            mv "images/$image" "$class/"
        done <val_annotations.txt
        rm -r images val_annotations.txt
    )
    mv "$work/unpacked/tiny-imagenet-200" "$final"
fi
rm -rf "$work"
echo "ulrl: Tiny-ImageNet is in $final"
