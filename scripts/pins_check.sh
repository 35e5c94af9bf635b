#!/usr/bin/env bash
# What installing this project beside each SGLang of the window would move: nothing, or it fails.
# Resolves both ways by metadata alone; needs `uv` and the package index, and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

versions=${*:-0.5.15 0.5.19 0.5.21 0.5.23}
extras=lm,minilm,bench,dev
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# SGLang's wheels are for Linux; some of its pins are pre-releases.
resolve() {
    uv pip compile --quiet --no-header --no-annotate --prerelease allow --python-version 3.11 \
        --python-platform x86_64-manylinux_2_34 --output-file "$2" "$1" </dev/null >/dev/null
}

status=0
for version in $versions; do
    echo "sglang==$version" >"$work/stock.in"
    resolve "$work/stock.in" "$work/stock.txt"
    for extra in "" "[$extras]"; do
        # Without the stock list as a constraint: what the resolver would like to move, it moves.
        printf 'sglang==%s\nsglang-deepprune%s @ file://%s\n' "$version" "$extra" "$PWD" \
            >"$work/both.in"
        cp "$work/stock.txt" "$work/both.txt"  # what is installed, as pip would find it
        resolve "$work/both.in" "$work/both.txt"
        moved=$(comm -23 <(sort "$work/stock.txt") <(sort "$work/both.txt"))
        added=$(comm -13 <(sort "$work/stock.txt") <(sort "$work/both.txt") | wc -l)
        echo "SGLang $version, sglang-deepprune$extra: $added packages added, moved: ${moved:-none}"
        [ -z "$moved" ] || status=1
    done
done
exit $status
