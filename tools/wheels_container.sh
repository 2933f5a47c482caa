#!/usr/bin/env bash
# The universal wheel by cibuildwheel, which compiles host library and shims in a container; the
# kernels need none and are taken from build/wheel-parts where they stand. The wheel comes to
# build/container, its parts to build/container-parts, the log to build/wheels-container.log.
#
#     tools/wheels_container.sh PYTHON            in docker, by the image that pyproject.toml names
#     tools/wheels_container.sh PYTHON bullseye   in podman, by tools/bullseye_image.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
engine=docker
if [ "${2:-}" = bullseye ]; then
    tools/bullseye_image.sh build/bullseye
    # shellcheck source=/dev/null
    source build/bullseye/environment
    engine=podman
fi

rm -rf build/container
mkdir -p build/container-parts build/fetched
for kernels in build/wheel-parts/kernels-cu*; do
    if [ -e "$kernels" ] && [ ! -e "build/container-parts/${kernels##*/}" ]; then
        cp -R "$kernels" build/container-parts/
    fi
done
# What stands below build/ here is to be there too; cibuildwheel carries the archive in, no more.
volumes="--volume=$PWD/build/container-parts:/project/build/wheel-parts"
volumes+=" --volume=$PWD/build/fetched:/project/build/fetched"
{
    "$python" -m build --sdist --no-isolation --outdir build/container .
    CIBW_CONTAINER_ENGINE="$engine; create_args: $volumes" "$python" -m cibuildwheel \
        --platform linux --archs native --output-dir build/container build/container/*.tar.gz
    "$python" -m build_tools audit --parts build/container-parts build/container/*.whl
} 2>&1 | sed -u -e "s#$PWD#.#g" -e "s#$HOME#HOME#" -e 's#/opt/python\b#PYTHONS#g' \
    -e 's#/tmp/cibuildwheel\b#SCRATCH#g' -e 's#/tmp/cibw-[^/]*#SCRATCH#' \
    -e '/linux_images:/,/^  pyodide_version/d' | tee build/wheels-container.log
