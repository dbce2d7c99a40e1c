#!/bin/sh
# Writes guard/service/pb from proto/. Usage: proto/generate.sh [OUTPUT_ROOT]; PYTHON names the interpreter with grpcio-tools.
# OUTPUT_ROOT (the repository by default) lets a check write elsewhere and compare.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root}
package=guard/service/pb
for version in v1; do
    mkdir -p "$out/$package/guard/$version"
    # The include path is mapped onto the package's own path, so that the generated imports are right as they stand.
    "${PYTHON:-python}" -m grpc_tools.protoc \
        "-I$package/guard/$version=$root/proto/guard/$version" \
        "--python_out=$out" "--pyi_out=$out" "--grpc_python_out=$out" \
        "$package/guard/$version/guard.proto" "$package/guard/$version/tap.proto"
    touch "$out/$package/__init__.py" "$out/$package/guard/__init__.py" "$out/$package/guard/$version/__init__.py"
done
