# What the fetch scripts share; sourced by them, from the root of the checkout.

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

fail() {
    echo "ulrl: $*" >&2
    exit 1
}

md5() { # of a file; by Python, since the command has another name on every system
    "$python" -c 'import hashlib, sys; print(hashlib.md5(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

fetch() { # URL, MD5, file: nothing is done when the file is there; a download that was stopped goes on
    local url=$1 sum=$2 file=$3 code=0
    [[ -f $file && $(md5 "$file") == "$sum" ]] && return
    if [[ ! -f $file.part || $(md5 "$file.part") != "$sum" ]]; then
        echo "ulrl: fetching $url"
        curl --fail --location --continue-at - --retry 3 --connect-timeout 30 --speed-limit 1 --speed-time 60 \
            --progress-bar --output "$file.part" "$url" || code=$?
        ((code == 0)) || fail "cannot fetch $url (curl's code $code, see above): check the network and run this" \
            "again, it goes on where it stopped; if that never ends well, remove $file.part first"
    fi
    if [[ $(md5 "$file.part") != "$sum" ]]; then
        rm "$file.part"
        fail "$url is not the published file (its MD5 is not $sum); what came was removed"
    fi
    mv "$file.part" "$file"
}

unpack() { # zip file, folder
    "$python" -m zipfile -e "$1" "$2" || fail "$1 cannot be unpacked into $2"
}

command -v curl >/dev/null || fail "curl is needed to fetch the data"
command -v "$python" >/dev/null || fail "no $python found; name a Python with PYTHON=..."
