# Shared by the scripts in tools/: talk, time, clean up.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT
COWFS=${COWFS:-$ROOT/target/release/cowfs}
export COWFS

# Nothing that the caller happens to have open goes to what is started here: a pipe to a stranger cannot be snapshotted.
for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    # 255 is the script itself.
    if [ "$fd" -gt 2 ] && [ "$fd" -ne 255 ]; then eval "exec $fd>&-" 2>/dev/null || true; fi
done

say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}

# Runs a command and says how long it took; its output goes to $LOG if that is set.
timed() {
    local what=$1 start end
    shift
    start=$(date +%s%N)
    if [ -n "${LOG:-}" ]; then
        "$@" >>"$LOG" 2>&1 || {
            tail -30 "$LOG" >&2
            die "$what"
        }
    else
        "$@" || die "$what"
    fi
    end=$(date +%s%N)
    printf '    %-44s %8.2f s\n' "$what" "$(awk "BEGIN{print ($end-$start)/1e9}")" >&2
}

# Takes a field out of one line of JSON: json_get LINE FIELD
json_get() {
    printf '%s' "$1" | sed -nE "s/.*\"$2\":\"?([^,\"}]*)\"?[,}].*/\1/p"
}

build_release() {
    (cd "$ROOT" && cargo build --release --quiet -p cowfs)
}

# Sets UMLCTL, if it is not set, to one that is built.
build_umlctl() {
    if [ -z "${UMLCTL:-}" ]; then
        UMLCTL=$ROOT/target/release/umlctl
        timed "cargo build --release -p umlctl" cargo build --manifest-path "$ROOT/Cargo.toml" --release --quiet -p umlctl
    fi
}

# Unmounts everything below a directory, whatever state it is in.
unmount_below() {
    local m
    awk -v d="$1/" 'index($5 "/", d) == 1 {print $5}' /proc/self/mountinfo | sort -r | while read -r m; do
        umount -l "$m" 2>/dev/null || true
    done
}
