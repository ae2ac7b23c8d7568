#!/bin/sh
# Runs while images are built, as `packages.sh uv` (the installer, into /build/uv) and `packages.sh LOCK` (an environment
# with exactly what the lock names, into /opt/rankbridge).
#
# Two secrets of the build may say how the package index is reached: `certificates`, a PEM bundle, and `index`, a URL.
set -eu
if [ -s /run/secrets/certificates ]; then
  export SSL_CERT_FILE=/run/secrets/certificates PIP_CERT=/run/secrets/certificates
fi
if [ -s /run/secrets/index ]; then
  UV_DEFAULT_INDEX=$(cat /run/secrets/index)
  export UV_DEFAULT_INDEX PIP_INDEX_URL="$UV_DEFAULT_INDEX"
fi
if [ "$1" = uv ]; then
  python3 -m venv /build/uv
  exec /build/uv/bin/pip install --quiet --no-cache-dir --require-hashes --no-deps --only-binary :all: -r /build/tools.txt
fi
place=/opt/rankbridge
export UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_NO_CONFIG=1 UV_HTTP_TIMEOUT=300
/build/uv/bin/uv venv --quiet --python "$(command -v python3)" "$place"
# Wheels only: nothing of others is run here.
/build/uv/bin/uv pip install --quiet --python "$place/bin/python" \
  --require-hashes --no-deps --only-binary :all: -r "$1"
# Tests and headers of others are never run or compiled against.
find "$place/lib" -type d \( -name tests -o -path '*/site-packages/pyarrow/include' \) -prune -exec rm -rf {} +
# By hash and unchecked: the same bytes each time, and the code never changes under its image.
find "$place" -name __pycache__ -type d -prune -exec rm -rf {} +
PYTHONHASHSEED=0 "$place/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$place/lib" ||
  echo "packages: some files of others are not Python of this version; they stay as they are" >&2
chmod -R a+rX,go-w "$place"
