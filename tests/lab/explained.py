"""Latents whose truth is plain: each fires on one word, and its explanation names the word."""

import json

from guard.lab.explain.records import Evidence, Explanation, Window, write


def window(text, values=None, *, kind="top", part="test"):
    """Words are tokens; `values` by word, the rest silent."""
    tokens = tuple(text.replace(" ", "\0 ").split("\0"))
    strengths = tuple((values or {}).get(token.strip(" .,"), 0.0) for token in tokens)
    return Window(kind=kind, part=part, source="own", tokens=tokens, values=strengths)


def evidence(latent, windows, sae="small"):
    return Evidence(latent=latent, sae=sae, firing_rate=0.001, output_tokens=(), windows=tuple(windows))


def explanation(latent, text, sae="small"):
    return Explanation(
        latent=latent,
        sae=sae,
        explanation=text,
        domains=(),
        subdomains=(),
        confidence=0.9,
        surface_form=False,
        annotator="ann",
        prompt="explain-1",
    )


def written(folder, known, explained):
    write(folder / "evidence.jsonl", known)
    write(folder / "explanations.jsonl", explained)
    return folder


def tasks(folder):
    return [json.loads(line) for file in sorted((folder / "tasks").glob("*.jsonl")) for line in file.open()]


def answer_all(folder, reply, name="ann"):
    """Answers every open task of a folder as `reply(task)` says."""
    answers = folder / "answers"
    done = {json.loads(line)["id"] for file in answers.glob("*.jsonl") for line in file.open()}
    lines = [
        json.dumps({"id": t["id"], "prompt": t["prompt"], "annotator": name, "answer": reply(t)})
        for t in tasks(folder)
        if t["id"] not in done
    ]
    (answers / f"{len(done)}.jsonl").write_text("\n".join(lines))
