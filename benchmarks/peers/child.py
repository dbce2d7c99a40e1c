"""A peer in its own environment: `child.py NAME` reads texts as JSON, one a line, and answers each with a JSON object.

`score`, from 0 to 1, and `seconds`, which the peer took for that text by its own clock. The first line that it writes
says `ready`. Imports nothing of Guard: its interpreter knows none of it.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable


def alt_profanity_check() -> Callable[[str], float]:
    from profanity_check import predict_prob

    return lambda text: predict_prob([text])[0]


def profanity_protector() -> Callable[[str], float]:
    from profanity_protector import predict_prob

    return lambda text: predict_prob([text])[0]


def toxic_comment_classifier() -> Callable[[str], float]:
    from toxic_classifier.model import ToxicCommentClassifier

    classifier = ToxicCommentClassifier()
    return lambda text: max(classifier.classify(text).values())


PEERS = {
    "alt-profanity-check": alt_profanity_check,
    "profanity-protector": profanity_protector,
    "toxic-comment-classifier": toxic_comment_classifier,
}


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        score = PEERS[sys.argv[1]]()
        answers.write('{"ready": true}\n')
        answers.flush()
        for line in sys.stdin:
            text = json.loads(line)
            started = time.perf_counter()
            value = float(score(text))
            answers.write(json.dumps({"score": value, "seconds": time.perf_counter() - started}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
