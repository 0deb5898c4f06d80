# Words that every script passed to the demonstration image can use.

# report KEY VALUE...: one line for the host to read.
report() {
    key=$1
    shift
    echo "STRATO $key=$*"
}

# disk N: the Nth disk (from 1) that is not the boot disk, as /dev/NAME; fails when there is none.
disk() {
    wanted=$1
    root_device=$(awk '$2 == "/" && $1 ~ /^\/dev\// { print $1 }' /proc/mounts)
    for path in /sys/block/vd* /sys/block/sd*; do
        name=${path##*/}
        [ -e "$path/size" ] || continue
        case $root_device in "/dev/$name"*) continue ;; esac
        wanted=$((wanted - 1))
        if [ "$wanted" -eq 0 ]; then
            echo "/dev/$name"
            return 0
        fi
    done
    return 1
}

# make_partition DEVICE: make one Linux partition that covers DEVICE, print its path.
make_partition() {
    printf 'o\nn\np\n1\n2048\n\nw\n' | fdisk "$1" > /dev/null 2>&1
    sync
    tries=0
    until [ -b "${1}1" ]; do
        tries=$((tries + 1))
        [ "$tries" -gt 100 ] && return 1
        partprobe "$1" 2>/dev/null
        usleep 50000
    done
    echo "${1}1"
}
