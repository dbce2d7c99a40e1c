"""What travels between the floors: inputs, verdicts and their parts. Plain data; no torch, no grpc, no numpy.

Offsets count Unicode code points of the caller's own text, end exclusive; `message` is the index of the chat message
that they count in (0 for plain text).
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Phase(StrEnum):
    PROMPT = "prompt"
    COMPLETION = "completion"


class HeadKind(StrEnum):
    """`harm`: the text is harmful in this domain. `presence`: the text is about it."""

    HARM = "harm"
    PRESENCE = "presence"


class Action(StrEnum):
    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"
    NOT_ASSESSED = "not_assessed"

    @property
    def severity(self) -> int:
        """Which action wins where several parts speak: a block always blocks, and unknown is never `allow`."""
        return (Action.ALLOW, Action.FLAG, Action.NOT_ASSESSED, Action.BLOCK).index(self)


def worst(actions: "list[Action]") -> Action:
    return max(actions, key=lambda action: action.severity, default=Action.NOT_ASSESSED)


class NotAssessedReason(StrEnum):
    NON_FINITE = "non_finite"  # NaN or infinity in the model's activations
    NOTHING_READ = "nothing_read"  # no token of the caller's text has been read yet
    READER_FAILED = "reader_failed"  # the model or the encoder raised an error
    BAD_INPUT = "bad_input"  # a row of a file that could not be checked
    NO_ROWS = "no_rows"  # a request was announced, and no tap has brought rows of it, or there was no room for them
    ROWS_MISSING = "rows_missing"  # rows of a tapped request never came: of a cached prefix, or dropped on the way
    TAP_LOST = "tap_lost"  # the tap went away while the request was open, or fell silent
    TOO_FEW_READ = "too_few_read"  # a tapped prompt that is not whole, or a completion of too few tokens, to be judged


@dataclass(frozen=True, slots=True)
class NotAssessed:
    reason: NotAssessedReason
    detail: str
    phase: Phase | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class CheckInput:
    """`prompt` is plain text or a chat; `completion` is read behind it. At least one of the two is given."""

    prompt: str | tuple[Message, ...] | None = None
    completion: str | None = None


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """Empty `domains` means all of the pack's."""

    domains: tuple[str, ...] = ()
    max_attributions: int = 5
    token_detail: bool = False
    request_id: str = ""


class SpanContribution(NamedTuple):  # a verdict holds hundreds: made in a third of a dataclass's time
    start: int
    end: int
    contribution: float
    message: int = 0


@dataclass(frozen=True, slots=True)
class LatentId:
    hook_point: str
    index: int

    def __str__(self) -> str:
        return f"{self.hook_point}/{self.index}"


@dataclass(frozen=True, slots=True)
class Attribution:
    """An exact part of a head's logit: of one latent, or of the dense probe rows (`latent` is None)."""

    latent: LatentId | None
    name: str  # the explanation; where there is none yet, the latent's top tokens; "dense probe" for the probe
    tags: tuple[str, ...]
    contribution: float
    share: float  # |contribution| over the sum of all |contributions| of this head
    peak_activation: float  # in units of the latent's scale; 0 for the probe
    spans: tuple[SpanContribution, ...]
    explanation_score: float | None = None  # how well the name tells where it fires, -1 to 1; None where untested


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of a phase's tokens, from `start` in one message to `end` in the same or a later one."""

    start: int
    end: int
    message: int
    end_message: int
    tokens: int


@dataclass(frozen=True, slots=True)
class HeadScore:
    """`logit == bias + sum(a.contribution for a in attributions) + rest`; `score == sigmoid(logit)`.

    All of it is of `passage`, where one passage of the phase scores higher than the whole.
    """

    head: HeadKind
    score: float
    logit: float
    bias: float  # less, for a passage, what it is held back by as one of many
    rest: float  # contributions of everything that `attributions` leaves out
    flag_at: float | None  # scores; None where this head never causes that action
    block_at: float | None
    explained_share: float  # share of all |contributions| that comes from named latents, 0 to 1
    attributions: tuple[Attribution, ...]
    passage: Passage | None = None  # None: the whole phase


@dataclass(frozen=True, slots=True)
class DomainVerdict:
    domain: str
    action: Action
    heads: tuple[HeadScore, ...]


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """One token of the caller's text and what it adds to each head's logit (`"<domain>.<head>"`)."""

    start: int
    end: int
    message: int
    contributions: dict[str, float]


@dataclass(frozen=True, slots=True)
class PhaseVerdict:
    phase: Phase
    action: Action
    tokens_read: int
    tokens_total: int  # tokens_read, and in a stream those held until the next chunk settles them
    domains: tuple[DomainVerdict, ...]
    tokens: tuple[TokenDetail, ...] = ()


@dataclass(frozen=True, slots=True)
class PackInfo:
    id: str
    version: str
    hash: str


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    version: str
    hash: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    fingerprint: str
    verified: bool  # False where the model is not the one that the pack was made for


@dataclass(frozen=True, slots=True)
class Verdict:
    request_id: str
    action: Action
    not_assessed: tuple[NotAssessed, ...]
    phases: tuple[PhaseVerdict, ...]
    pack: PackInfo
    policy: PolicyInfo
    model: ModelInfo
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage: tokenize, queue, read, encode, score
    audit_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenExample:
    """A token on which a latent fires, in a text written for the project."""

    text: str
    start: int
    end: int
    activation: float  # in units of the latent's scale


@dataclass(frozen=True, slots=True)
class Feature:
    """What a pack says about one latent. `name` as in Attribution."""

    latent: LatentId
    name: str
    explanation: str
    domains: tuple[str, ...]
    subdomains: tuple[str, ...]
    firing_rate: float
    threshold: float
    scale: float
    scores: dict[str, float]
    top_tokens: tuple[str, ...]
    examples: tuple[TokenExample, ...]
    head_weights: dict[str, float]  # "<domain>.<head>" -> weight
    surface_form: bool = False  # fires on a character or a token, whatever it means
    explanation_score: float | None = None  # as in Attribution
