#!/usr/bin/env bash
# Makes an image for cibuildwheel of Debian 11 and imports it into podman, for machines that reach
# no image registry: glibc 2.31, g++ 10, Python 3.9. Runs as root, from any folder.
#
#     tools/bullseye_image.sh DIR    the image and podman's own folders stand below DIR
#
# DIR/environment says how to run cibuildwheel with it: source that.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
image=localhost/flash-attn-bullseye:1
pythons=/opt/python
tree=$dir/tree

for program in debootstrap podman runc; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install $program" >&2; exit 1; }
done

# runc, low limits and the host's network work in containers too, where crun and bridges do not.
cat >"$dir/containers.conf" <<END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
END
cat >"$dir/storage.conf" <<END
[storage]
driver = "vfs"
graphroot = "$dir/storage"
runroot = "$dir/run"
END
certificates=/etc/ssl/certs/ca-certificates.crt
cat >"$dir/environment" <<END
export CONTAINERS_CONF=$dir/containers.conf CONTAINERS_STORAGE_CONF=$dir/storage.conf
export CIBW_BUILD=cp39-manylinux_x86_64 CIBW_MANYLINUX_X86_64_IMAGE=$image
export CIBW_ENVIRONMENT="PIP_CERT=$certificates"
END

if [ ! -e "$tree.done" ]; then
    rm -rf "$tree"
    debootstrap --variant=minbase \
        --include=ca-certificates,g++,libc6-dev,python3,python3-pip,python3-venv bullseye "$tree"
    # The certificates of this machine, whose proxy may have its own.
    cp -L "${SSL_CERT_FILE:-$certificates}" "$tree$certificates"
    cp -L /etc/resolv.conf /etc/hosts "$tree/etc/"
    chroot "$tree" python3 -m venv "$pythons/cp39-cp39"
    chroot "$tree" env -u PIP_FIND_LINKS "$pythons/cp39-cp39/bin/python" -m pip install --quiet \
        --cert "$certificates" --upgrade pip build
    touch "$tree.done"
fi
# shellcheck source=/dev/null
source "$dir/environment"
podman image exists "$image" || tar -C "$tree" -cf - . | podman import - "$image"
