"""An assessor without a model, for what the service does around scores: transport, errors, metrics, shutdown.

It reads its orders from the text: `sleep 1.5` answers after that time, `never` never. Run as a program, it serves.
"""

import dataclasses
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from guard.assessor import Observer
from guard.config import GuardConfig, load_config
from guard.errors import InvalidInput, NotFound
from guard.pack.loader import Pack
from guard.pack.manifest import (
    FORMAT,
    HeadSection,
    HookPointSection,
    LatentLine,
    Manifest,
    ModelSection,
    PoolingSection,
    SourceSection,
)
from guard.records import (
    Action,
    Attribution,
    DomainVerdict,
    Feature,
    HeadKind,
    HeadScore,
    LatentId,
    ModelInfo,
    NotAssessed,
    NotAssessedReason,
    Passage,
    Phase,
    PhaseVerdict,
    PolicyInfo,
    SpanContribution,
    TokenDetail,
    TokenExample,
    Verdict,
)

LAYERS = ("model.layers.3", "model.layers.9")
LATENTS = (  # hook point, latent, domains
    (LAYERS[0], 7, ("violence",)),
    (LAYERS[0], 40_000, ("violence", "terror")),
    (LAYERS[1], 5, ()),
)


def make_pack() -> Pack:
    point = {"latents": 2, "probes": 0, "sae_width": 65536, "sae_architecture": "batch_topk", "sae_k": 32.0}
    point |= {"sae_tokens": 5_000_000_000, "fvu": 0.25, "l0": 31.5, "dead_share": 0.125}
    manifest = Manifest(
        format=FORMAT,
        id="stand-in",
        version="1.2.3",
        description="for tests",
        calibrated=True,
        model=ModelSection(name="toy", weights="w" * 64, tokenizer="t" * 64, d_model=8, dtype="float32"),
        pooling=PoolingSection(exponent=1.0),
        hook_points=tuple(HookPointSection(name=name, **point) for name in LAYERS),
        heads=tuple(
            HeadSection(domain=domain, head=HeadKind.HARM, bias=0.0, temperature=1.0, flag_at=0.5)
            for domain in ("violence", "terror")
        ),
        sources=(SourceSection(name="texts", licence="CC0-1.0", use="fitting"),),
        files={},
    )
    lines = tuple(
        LatentLine(hook_point=point, latent=latent, domains=domains, subdomains=(), firing_rate=0.01)
        for point, latent, domains in LATENTS
    )
    nothing = np.zeros((2, 0), np.float32)
    evaluation = {"auroc": {"violence.harm": 0.9375}, "missing": float("nan"), "rows": [1, 2]}
    return Pack(Path("toy"), manifest, "h" * 64, (), lines, nothing, nothing, (), evaluation)


def make_verdict(text: str = "", request_id: str = "", *, phases: tuple[Phase, ...] = (Phase.PROMPT,)) -> Verdict:
    """Every field set; the verdict says `block` where the text does."""
    attribution = Attribution(
        latent=LatentId(*LATENTS[1][:2]),
        name="fires on: knife",
        tags=("violence",),
        contribution=1.5,
        share=0.75,
        peak_activation=2.25,
        spans=(SpanContribution(0, len(text), 1.5, message=1),),
    )
    probe = dataclasses.replace(attribution, latent=None, name="dense probe", tags=(), spans=())
    score = 0.875 if "block" in text else 0.125
    head = HeadScore(
        HeadKind.HARM, score, 1.0, -0.5, 0.25, 0.5, None, 0.5, (attribution, probe), Passage(2, 9, 0, 1, 3)
    )
    action = Action.BLOCK if "block" in text else Action.ALLOW
    tokens = (TokenDetail(0, len(text), 1, {"violence.harm": 0.5}),)
    return Verdict(
        request_id=request_id,
        action=action,
        not_assessed=(),
        phases=tuple(
            PhaseVerdict(phase, action, 3, 4, (DomainVerdict("violence", action, (head,)),), tokens) for phase in phases
        ),
        pack=make_pack().info,
        policy=PolicyInfo("p1", "f" * 64),
        model=ModelInfo("w" * 64, verified=True),
        timings={"tokenize": 0.001, "read": 0.02},
        audit_id="a-1",
    )


def not_assessed(request_id: str = "") -> Verdict:
    reason = NotAssessed(NotAssessedReason.NOTHING_READ, "no token has been read yet")
    verdict = make_verdict(request_id=request_id)
    return dataclasses.replace(verdict, action=Action.NOT_ASSESSED, phases=(), not_assessed=(reason,))


class StandIn:
    """The interface of guard.assessor.Assessor. `error`, when set, is what every call meets."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.pack = make_pack()
        self.observer = Observer()
        self.model, self.policy = make_verdict().model, make_verdict().policy
        self.encode_backend, self.reader_dtype = "reference", "float32"
        self.error: Exception | None = None
        self.futures: list[Future] = []
        self.given: list = []
        self.sessions: set[StandInSession] = set()
        self.closed = False

    @property
    def queue_depth(self) -> int:
        return sum(not future.done() for future in self.futures)

    prefix_bytes = session_bytes = 0

    @property
    def open_sessions(self) -> int:
        return len(self.sessions)

    def submit(self, given, options=None) -> "Future[Verdict]":
        self.given.append((given, options))
        text = given.prompt if isinstance(given.prompt, str) else given.prompt[0].content if given.prompt else ""
        return self.answer(text, make_verdict(text, options.request_id), "check")

    def answer(self, text: str, verdict: Verdict, method: str) -> "Future[Verdict]":
        if self.error is not None:
            raise self.error
        if text == "":
            raise InvalidInput("prompt: found an empty text, expected text", reason="EMPTY_TEXT")
        if len(text.encode()) > self.config.limits.text_bytes:
            limit = self.config.limits.text_bytes
            raise InvalidInput(f"the limit is {limit} (limits.text_bytes)", reason="TEXT_TOO_LARGE", limit=limit)
        future: Future[Verdict] = Future()
        self.futures.append(future)

        def settle() -> None:
            if future.set_running_or_notify_cancel():
                self.observer.verdict(verdict, method)
                self.observer.hits(np.array([2, 1, 0]))
                self.observer.batch(1, 3, {"read": 0.02, "encode": 0.001})
                future.set_result(verdict)

        if text.startswith("sleep "):
            timer = threading.Timer(float(text.split()[1]), settle)
            timer.daemon = True
            timer.start()
        elif text != "never":
            settle()
        return future

    def open_session(self, options=None) -> "StandInSession":
        if self.error is not None:
            raise self.error
        return StandInSession(self, options)

    def features(self, *, domain="", subdomain="", hook_point="") -> list[Feature]:
        if domain and domain not in self.pack.domains:
            raise NotFound(f"unknown domain {domain!r}, expected one of: {', '.join(self.pack.domains)}")
        return [
            make_feature(LatentId(point, latent), domains)
            for point, latent, domains in LATENTS
            if (not domain or domain in domains) and hook_point in {"", point}
        ]

    def feature(self, latent: LatentId) -> Feature:
        for feature in self.features():
            if feature.latent == latent:
                return feature
        raise NotFound(f"unknown latent {latent}")

    def close(self) -> None:
        self.closed = True


class StandInSession:
    def __init__(self, assessor: StandIn, options) -> None:
        self.assessor, self.options, self.phases, self.text = assessor, options, [], ""
        assessor.sessions.add(self)

    def feed(self, phase: Phase, text: str, *, last: bool = False) -> "Future[Verdict]":
        if phase not in self.phases:
            self.phases.append(phase)
        self.text += text
        verdict = make_verdict(self.text, self.options.request_id, phases=tuple(self.phases))
        return self.assessor.answer(text, verdict, "watch")

    def feed_chat(self, messages) -> "Future[Verdict]":
        return self.feed(Phase.PROMPT, " ".join(f"{m.role}: {m.content}" for m in messages))

    def close(self) -> None:
        self.assessor.sessions.discard(self)


def make_feature(latent: LatentId, domains: tuple[str, ...]) -> Feature:
    example = TokenExample("a sharp knife", 8, 13, 1.5)
    return Feature(
        latent=latent,
        name="fires on: knife",
        explanation="",
        domains=domains,
        subdomains=("weapons",),
        firing_rate=0.01,
        threshold=0.5,
        scale=2.0,
        scores={"specificity": 0.25},
        top_tokens=("knife", "blade"),
        examples=(example,),
        head_weights={"violence.harm": 1.5},
    )


def main() -> None:
    """Serves the stand-in: `python standin.py ADDRESS`; prints where, once it listens."""
    import uvloop

    from guard.service.server import serve

    server = {"listen": [sys.argv[1]], "metrics": "", "grace_seconds": 8}
    config = load_config(overrides={"server": server})
    assessor = StandIn(config)
    uvloop.run(serve(config, assessor, ready=lambda bound: say(*bound.grpc)))
    say("closed" if assessor.closed else "open")


def say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
