# shellcheck shell=bash
# What the images' build scripts share. Needs no privileges, mounts or loop devices: packages come from apt as it is
# configured here, disks are written as plain files.

say() { echo "guest-images: $*" >&2; }
die() { say "$*"; exit 1; }

# require_tools: all that is missing, named by the packages to install.
require_tools() {
    local missing=() tool
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the images can be built on amd64 only"
    # Tools that live in sbin are not on every user's path.
    PATH=$PATH:/usr/sbin:/sbin
    for tool in cpio:cpio mcopy:mtools mke2fs:e2fsprogs mkfs.vfat:dosfstools qemu-img:qemu-utils \
        sfdisk:fdisk syslinux:syslinux xz:xz-utils zstd:zstd; do
        command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
    done
    [ -e /usr/lib/syslinux/mbr/mbr.bin ] || missing+=(syslinux-common)
    [ ${#missing[@]} = 0 ] || die "tools are missing: run 'apt-get install ${missing[*]}'"
}

# closure PACKAGE...: NAME=VERSION of the packages and of all that they depend on, as if nothing were installed.
closure() {
    apt-get -qq -s -o Dir::State::status=/dev/null --no-install-recommends install "$@" |
        awk '$1 == "Inst" { print $2 "=" substr($3, 2) }'
}

# kernel_packages META-PACKAGE: the packages that hold its kernel and modules (Ubuntu has two), nothing of their hooks.
kernel_packages() {
    apt-cache depends --recurse --important "$1" |
        awk '$1 == "Depends:" && $2 ~ /^linux-(image|modules)-[0-9]/ { print $2 }' | sort -u
}

# fetch DIR PACKAGE...: apt checks each package against its signed index.
fetch() {
    local dir=$1
    shift
    say "downloading $# packages"
    # The sandbox user of apt could not write to our directory; as an ordinary user there is none anyway.
    (cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download "$@") >&2
}

# unpack DEB-DIR ROOT: whether or not the packages know of merged /usr, their files land below ROOT/usr.
unpack() {
    local deb
    mkdir -p "$2"/usr/{bin,sbin,lib,lib64}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$2"
    for deb in "$1"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$2" --keep-directory-symlink --no-same-owner
    done
}

# copy_modules FROM TO LIST NAME...: the modules and what they depend on, uncompressed; TO/LIST has them in loading order.
# A driver that the kernel has not got as a module is built in or of no use: skipped.
copy_modules() {
    local from=$1 to=$2 list=$2/$3 name path
    shift 3
    declare -A module_done=() module_path=()
    while read -r path; do
        name=${path##*/}
        name=${name%%.ko*}
        module_path[${name//-/_}]=$path
    done < <(find "$from" -name '*.ko*')
    : >"$list"
    for name; do add_module "${name//-/_}" "$to" "$list"; done
}

add_module() {
    local name=$1 to=$2 list=$3 path=${module_path[$1]:-} dependency
    [ -n "$path" ] && [ -z "${module_done[$name]:-}" ] || return 0
    module_done[$name]=1
    case $path in
        *.xz) xz -dc "$path" ;;
        *.zst) zstd -qdc "$path" ;;
        *) cat "$path" ;;
    esac >"$to/$name.ko"
    # The dependencies stand in the module's own .modinfo section: "depends=a,b".
    for dependency in $(tr '\0' '\n' <"$to/$name.ko" | LC_ALL=C sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "${dependency//-/_}" "$to" "$list"
    done
    echo "$name.ko" >>"$list"
}

# make_disk RAW SIZE-MIB BOOT-MIB KERNEL INITRD COMMAND-LINE: a BIOS disk whose first partition boots; the second one,
# empty, takes the rest.
make_disk() {
    local raw=$1 size_mib=$2 boot_mib=$3 kernel=$4 initrd=$5 command_line=$6
    local boot=$raw.boot config=$raw.syslinux.cfg
    truncate -s "${size_mib}M" "$raw"
    sfdisk --quiet "$raw" <<EOF
label: dos
start=1MiB, size=${boot_mib}MiB, type=c, bootable
start=$((boot_mib + 1))MiB, type=83
EOF
    dd if=/usr/lib/syslinux/mbr/mbr.bin of="$raw" conv=notrunc status=none
    # "-h": the boot sector must know where on the disk its partition begins.
    mkfs.vfat -C -n LEVERETBOOT -h 2048 "$boot" $((boot_mib * 1024)) >/dev/null
    cat >"$config" <<EOF
SERIAL 0 115200
DEFAULT leveret
PROMPT 0
LABEL leveret
  LINUX /vmlinuz
  INITRD /initrd
  APPEND $command_line
EOF
    mcopy -i "$boot" "$kernel" ::/vmlinuz
    mcopy -i "$boot" "$initrd" ::/initrd
    mcopy -i "$boot" "$config" ::/syslinux.cfg
    syslinux --install "$boot"
    dd if="$boot" of="$raw" bs=1M seek=1 conv=notrunc,sparse status=none
}

# make_ext4 RAW OFFSET-MIB LABEL [DIRECTORY]: a file system from there to the end of the disk.
make_ext4() {
    local size_kib=$((($(stat -c %s "$1") / 1048576 - $2) * 1024))
    mke2fs -q -t ext4 -m 0 -L "$3" -E "offset=$(($2 * 1048576)),nodiscard" ${4:+-d "$4"} "$1" "${size_kib}k"
}

compress() { qemu-img convert -q -c -f raw -O qcow2 "$1" "$2"; }
