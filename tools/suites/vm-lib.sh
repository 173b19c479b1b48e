# Shared by the suites that try virtual machines for long. A suite says in VMS which machines are its own, sets DIR, and
# has a function `evidence`, called when it fails.
# shellcheck shell=bash

now() { date +%s%N; }
# Nothing takes so long: what does hangs.
uml() { timeout -k 5 "${PATIENCE:-240}" "$UMLCTL" "$@" </dev/null; }

# Takes all away, after what is needed to find out why, if the suite did not come to its end.
CLIENTS='' DONE=''
cleanup() {
    local code=$?
    trap - EXIT
    [ -n "$DONE" ] || evidence || true
    [ -z "$CLIENTS" ] || kill "$CLIENTS" 2>/dev/null || true
    uml rm -f "${VMS[@]}" >/dev/null 2>&1 || true
    rm -rf "$DIR"
    exit $((code == 0 && ${#DONE} == 0 ? 1 : code))
}
begin() {
    trap cleanup EXIT
    trap 'exit 130' INT TERM HUP
}
end_clients() {
    kill "$CLIENTS" && wait "$CLIENTS" || true
    CLIENTS=
}

# That neither its kernel nor its supervisor complains: quiet VM
quiet() {
    local dir=$UMLCTL_HOME/vms/$1
    ! grep -nE 'BUG|Oops|Call Trace|EXT4-fs error|I/O error|blocked for more|soft lockup|self-detected stall|panic|segfault' \
        "$dir/kernel.log" || die "its kernel complains"
    [ ! -s "$dir/supervisor.log" ] || die "its supervisor says: $(cat "$dir/supervisor.log")"
}
# That the file system of a VM that has ended is sound: sound VM
sound() {
    "$COWFS" image --help >/dev/null 2>&1 || return 0
    "$COWFS" image export "$UMLCTL_HOME/vms/$1/disk.cow" "$DIR/disk.raw" >/dev/null || die "cowfs image export"
    e2fsck -fn "$DIR/disk.raw" >"$DIR/e2fsck.log" 2>&1 || die "its file system: $(tail -5 "$DIR/e2fsck.log")"
    note "its file system is sound"
}
