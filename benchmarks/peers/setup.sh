#!/bin/sh
# Makes one environment a peer under .build/peers/: `benchmarks/peers/setup.sh [peer ...]` (default: all three).
# Each is on its own, since they pin what others of them, and Guard, cannot use. Several hundred MB in all.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

make() { # NAME, then what pip installs
  name=$1
  shift
  "$python" -m venv ".build/peers/$name"
  ".build/peers/$name/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
  touch ".build/peers/$name/.installed"
}

for peer in ${*:-alt-profanity-check profanity-protector toxic-comment-classifier}; do
  case $peer in
    alt-profanity-check)
      make "$peer" alt-profanity-check==1.9.1
      ;;
    profanity-protector)
      # sentence-transformers 2.2.2, which it pins, asks for torchvision and never uses it here, and imports a function
      # that left huggingface_hub with 0.26; both read pkg_resources, which left setuptools with 82. Its head was pickled
      # by scikit-learn 1.0.2, which has no wheel for Python 3.11; from 1.2 on the pickle no longer works.
      make "$peer" 'setuptools<81' torch 'transformers<4.47' 'huggingface_hub<0.26' 'numpy<2' 'scikit-learn==1.1.3' joblib \
        scipy nltk sentencepiece tqdm pillow
      make "$peer" --no-deps sentence-transformers==2.2.2 profanity-protector==1.0.0
      ;;
    toxic-comment-classifier)
      make "$peer" toxic-comment-classifier==0.3.0
      ;;
    *)
      echo "setup.sh: found peer '$peer', expected alt-profanity-check, profanity-protector or toxic-comment-classifier" >&2
      exit 2
      ;;
  esac
done
