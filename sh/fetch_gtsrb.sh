#!/usr/bin/env bash
# Fetch GTSRB (about 350 MB) and lay it out as BackdoorBench does:  sh/fetch_gtsrb.sh [DATA]
#   DATA           the folder for data sets (default: data); the images come to DATA/gtsrb/Train and Test
# A run that was stopped goes on where it was; a second run finds everything in place and does nothing.
set -euo pipefail
given=${1:+$(mkdir -p "$1" && cd "$1" && pwd)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source sh/fetch.bash

base=https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370
final=${given:-data}/gtsrb
work=$final/.fetch

if [[ ! -d $final/Train || ! -d $final/Test ]]; then
    mkdir -p "$work"
    fetch "$base/GTSRB_Final_Training_Images.zip" f33fd80ac59bff73c82d25ab499e03a3 "$work/train.zip"
    fetch "$base/GTSRB_Final_Test_Images.zip" c7e4e6327067d32654124b0fe9e82185 "$work/test.zip"
    fetch "$base/GTSRB_Final_Test_GT.zip" fe31e9c9270bbcd7b84b7f21a9d9d9e5 "$work/labels.zip"
    rm -rf "$work/unpacked" "$final/Train" "$final/Test"
    for part in train test labels; do unpack "$work/$part.zip" "$work/unpacked"; done
    mv "$work/unpacked/GT-final_test.csv" "$work/unpacked/GTSRB/Final_Test/Images/"
    mv "$work/unpacked/GTSRB/Final_Training/Images" "$final/Train"
    mv "$work/unpacked/GTSRB/Final_Test/Images" "$final/Test"
fi
rm -rf "$work"
echo "ulrl: GTSRB is in $final"
