# Shared by tools/image-busybox and tools/image-debian: options, and a filesystem from a directory without a mount.
# shellcheck shell=bash

# Reads the options that both have. Sets OUT, SIZE, INIT, FILES, FORCE; leaves what it does not know in REST.
image_options() {
    OUT='' SIZE=$1 INIT=$ROOT/tools/image/init FILES=() FORCE='' REST=()
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        --size | --init | --file)
            [ $# -ge 2 ] || usage "$1 needs a value"
            case $1 in
            --size) SIZE=$2 ;;
            --init) INIT=$2 ;;
            --file) FILES+=("$2") ;;
            esac
            shift
            ;;
        --force) FORCE=1 ;;
        -h | --help) usage ;;
        --*)
            REST+=("$1")
            if [ $# -ge 2 ]; then
                REST+=("$2")
                shift
            fi
            ;;
        *)
            [ -z "$OUT" ] || usage "$1: there is an image name already, $OUT"
            OUT=$1
            ;;
        esac
        shift
    done
    [ -n "$OUT" ] || usage "the name of the image is missing"
    [[ $SIZE =~ ^[1-9][0-9]*[KMG]?$ ]] || usage "$SIZE is no size: write 64M or 2G"
    [ -z "$INIT" ] || [ -r "$INIT" ] || usage "$INIT cannot be read"
    [ -n "$FORCE" ] || [ ! -e "$OUT" ] || die "$OUT is there already; give --force to replace it"
    [ -d "$(dirname "$OUT")" ] || die "$(dirname "$OUT") is no directory"
}

# Copies what --init and --file name into a tree: image_files TREE
image_files() {
    local tree=$1 f src dst
    install -m 755 "$INIT" "$tree/init"
    for f in "${FILES[@]}"; do
        src=${f%%:*} dst=${f#*:}
        [[ $f == *:/* ]] && [ -e "$src" ] || die "--file $f: write SOURCE:/PLACE, and the source must be there"
        mkdir -p "$(dirname "$tree$dst")"
        cp -a --no-preserve=ownership "$src" "$tree$dst"
    done
}

# Makes an ext4 of a tree and puts it in place when it is whole: image_make TREE
image_make() {
    local tree=$1
    PARTIAL=$OUT.partial.$$
    truncate -s "$SIZE" "$PARTIAL"
    mke2fs -q -F -t ext4 -m 0 -L root -E root_owner=0:0 -d "$tree" "$PARTIAL" || die "mke2fs: is --size $SIZE enough?"
    # These two are needed before anything is mounted on /dev. Made this way they need no privilege. debugfs does not look
    # whether a name is there already.
    local name number
    for name in console null; do
        [ ! -e "$tree/dev/$name" ] || continue
        case $name in console) number='5 1 020600' ;; null) number='1 3 020666' ;; esac
        printf 'cd /dev\nmknod %s c %s\nset_inode_field %s mode %s\n' "$name" "${number% *}" "$name" "${number##* }"
    done | debugfs -w "$PARTIAL" >"$tree.log" 2>&1 || die "debugfs: $(cat "$tree.log")"
    e2fsck -fn "$PARTIAL" >"$tree.log" 2>&1 || die "the filesystem is not sound: $(tail -5 "$tree.log")"
    sync "$PARTIAL"
    mv -f "$PARTIAL" "$OUT"
    printf '%s\n' "$OUT"
}
