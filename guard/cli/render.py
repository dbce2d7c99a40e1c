"""A verdict for people: action, scores as bars, the text with its tokens coloured, and the features behind it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from guard.cli.colouring import coloured
from guard.cli.terminal import visible
from guard.records import (
    Action,
    Attribution,
    CheckInput,
    DomainVerdict,
    HeadScore,
    Passage,
    Phase,
    PhaseVerdict,
    SpanContribution,
    Verdict,
)

STYLES = {
    Action.ALLOW: "bold green",
    Action.FLAG: "bold yellow",
    Action.BLOCK: "bold white on red",
    Action.NOT_ASSESSED: "bold magenta",
}
BAR = 24  # with the longest of the usual domain names, a line fits 80 columns
_FLAG_MARK, _BLOCK_MARK = "╎", "┃"


@dataclass(frozen=True, slots=True)
class Leading:
    """The head that says most about a phase."""

    domain: str
    head: HeadScore

    @property
    def name(self) -> str:
        return f"{self.domain}.{self.head.head.value}"


def leading(domains: Iterable[DomainVerdict]) -> Leading | None:
    """The head with the highest score relative to its lowest threshold; heads without one come last."""

    def rank(one: Leading) -> tuple[bool, float]:
        threshold = lowest_threshold(one.head)
        return (False, one.head.score) if threshold is None else (True, one.head.score / max(threshold, 1e-9))

    return max((Leading(d.domain, h) for d in domains for h in d.heads), key=rank, default=None)


def lowest_threshold(head: HeadScore) -> float | None:
    return min((t for t in (head.flag_at, head.block_at) if t is not None), default=None)


def head_action(head: HeadScore) -> Action:
    if head.block_at is not None and head.score >= head.block_at:
        return Action.BLOCK
    return Action.FLAG if head.flag_at is not None and head.score >= head.flag_at else Action.ALLOW


def verdict(given: Verdict, asked: CheckInput) -> RenderableType:
    parts: list[RenderableType] = [headline(given)]
    for missing in given.not_assessed:
        where = f" ({missing.phase.value})" if missing.phase else ""
        parts.append(Text(visible(f"  {missing.reason.value}{where}: {missing.detail}"), "magenta"))
    for phase in given.phases:
        parts += [Text(), *_phase(phase, asked)]
    parts += [Text(), _footer(given)]
    return Group(*parts)


def headline(given: Verdict) -> Text:
    line = Text()
    line.append(f" {given.action.value.upper().replace('_', ' ')} ", STYLES[given.action])
    acted = {d.domain: d.action for p in given.phases for d in p.domains if d.action is not Action.ALLOW}
    line.append("  " + ", ".join(visible(domain) for domain in acted) if acted else "")
    if given.request_id:
        line.append(f"  {visible(given.request_id)}", "dim")
    return line


def _phase(phase: PhaseVerdict, asked: CheckInput) -> Iterator[RenderableType]:
    held = phase.tokens_total - phase.tokens_read
    waiting = f", {held} held for the next chunk" if held else ""
    yield Text.assemble((phase.phase.value, "bold"), (f"  {phase.tokens_read} tokens{waiting}", "dim"))
    if not phase.domains:
        return
    yield Padding(bars(phase.domains), (0, 0, 0, 2), expand=False)
    top = leading(phase.domains)
    if top is None:
        return
    parts = _parts(phase, top)
    yield Text()
    yield Text(f"  tokens coloured by their part in {visible(top.name)}: red adds, blue takes away", "dim")
    for label, body, spans in _texts(phase.phase, asked, parts):
        if label:
            yield Text(f"  {label}", "bold dim")
        yield Padding(coloured(body, spans), (0, 0, 0, 4), expand=False)
    for one in _explained(phase.domains, top):
        yield Text()
        yield from _features(one, phase.phase, asked)


def _explained(domains: Sequence[DomainVerdict], top: Leading) -> list[Leading]:
    """The leading head of each domain that acted, the strongest first; the leading head of all where none did."""
    acted = [one for d in domains if d.action is not Action.ALLOW and (one := leading([d])) is not None]
    acted.sort(key=lambda one: -one.head.score / max(lowest_threshold(one.head) or 1.0, 1e-9))
    return acted or [top]


def bars(domains: Iterable[DomainVerdict]) -> Table:
    table = Table.grid(padding=(0, 2))
    for domain in domains:
        for index, head in enumerate(domain.heads):
            action = head_action(head)
            style = STYLES[action] if action is not Action.ALLOW else ""
            limits = [
                f"{word} {value:.2f}"
                for word, value in (("flag", head.flag_at), ("block", head.block_at))
                if value is not None
            ]
            table.add_row(
                Text("" if index else visible(domain.domain)),
                Text(head.head.value, "dim"),
                bar(head.score, head.flag_at, head.block_at),
                Text(f"{head.score:.3f}", style),
                Text("  ".join(limits), "dim"),
            )
    return table


def bar(score: float, flag_at: float | None = None, block_at: float | None = None, width: int = BAR) -> Text:
    """`score` from 0 to 1 as a bar of `width` cells, with the thresholds marked."""
    filled = round(min(max(score, 0.0), 1.0) * width)
    over_block = block_at is not None and score >= block_at
    over_flag = flag_at is not None and score >= flag_at
    colour = "red" if over_block else "yellow" if over_flag else "green"
    cells = [("█", colour) if i < filled else ("·", "dim") for i in range(width)]
    for at, mark, style in ((flag_at, _FLAG_MARK, "bold yellow"), (block_at, _BLOCK_MARK, "bold red")):
        if at is not None:
            cells[min(int(at * width), width - 1)] = (mark, style)
    return Text.assemble(*cells)


def _parts(phase: PhaseVerdict, top: Leading) -> tuple[SpanContribution, ...]:
    """What each token adds to the head; where the verdict has no token detail, what the named spans add."""
    if phase.tokens:
        return tuple(
            SpanContribution(t.start, t.end, t.contributions[top.name], t.message)
            for t in phase.tokens
            if top.name in t.contributions
        )
    return tuple(span for a in top.head.attributions for span in a.spans)


def _texts(
    phase: Phase, asked: CheckInput, parts: Sequence[SpanContribution]
) -> Iterator[tuple[str, str, list[SpanContribution]]]:
    """The phase's texts with a label and the contributions of each."""
    if phase is Phase.COMPLETION:
        yield "", asked.completion or "", list(parts)
    elif isinstance(asked.prompt, tuple):
        for index, message in enumerate(asked.prompt):
            yield message.role.value, message.content, [p for p in parts if p.message == index]
    else:
        yield "", asked.prompt or "", list(parts)


def _features(one: Leading, phase: Phase, asked: CheckInput) -> Iterator[RenderableType]:
    head = one.head
    yield Text(
        f"  why {visible(one.name)}  score {head.score:.3f}, logit {head.logit:+.2f}, "
        f"{head.explained_share:.0%} explained by named features"
    )
    if head.passage is not None:
        yield Text(f"  of {_passage(head.passage, phase, asked)}", "dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 1))
    table.add_column("share", justify="right")
    table.add_column("adds", justify="right")
    table.add_column("feature", overflow="fold")
    table.add_column("on", overflow="fold")
    for a in head.attributions:
        table.add_row(
            f"{a.share:.0%}",
            Text(f"{a.contribution:+.3f}", "red" if a.contribution > 0 else "blue"),
            _feature_name(a),
            Text(_quotes(a, phase, asked)),
        )
    table.add_row("", Text(f"{head.rest:+.3f}", "dim"), Text("everything else", "dim"), "")
    table.add_row(
        "",
        Text(f"{head.bias:+.3f}", "dim"),
        Text("bias" if head.passage is None else "bias, less what one of many passages is held back by", "dim"),
        "",
    )
    yield Padding(table, (0, 0, 0, 2), expand=False)


def _passage(given: Passage, phase: Phase, asked: CheckInput, shown: int = 24) -> str:
    """Where the passage stands: how it begins and ends."""
    within = given.message == given.end_message
    begins = _source(phase, asked, given.message)[given.start : given.end if within else None]
    ends = _source(phase, asked, given.end_message)[given.start if within else 0 : given.end]
    return (
        f"the passage of {given.tokens} tokens from “{visible(begins[:shown].strip())}…” "
        f"to “…{visible(ends[-shown:].strip())}”, which scores above the whole"
    )


def _feature_name(given: Attribution) -> Text:
    name = Text(visible(given.name) if given.name else "(no name)")
    where = [str(given.latent) if given.latent else "probe rows", *given.tags]
    if given.explanation_score is not None:
        where.append(f"r {given.explanation_score:.2f}")
    name.append(f"\n{visible('  '.join(where))}", "dim")
    return name


def _quotes(given: Attribution, phase: Phase, asked: CheckInput, most: int = 3) -> str:
    """The words that a feature spoke on, the strongest first."""
    words: list[str] = []
    for span in sorted(given.spans, key=lambda span: -abs(span.contribution)):
        text = _source(phase, asked, span.message)[span.start : span.end].strip()
        if text and text not in words:
            words.append(text)
    return " ".join(f"“{visible(word)}”" for word in words[:most])


def _source(phase: Phase, asked: CheckInput, message: int) -> str:
    if phase is Phase.COMPLETION:
        return asked.completion or ""
    if isinstance(asked.prompt, tuple):
        return asked.prompt[message].content if message < len(asked.prompt) else ""
    return asked.prompt or ""


def _footer(given: Verdict) -> Text:
    total = sum(given.timings.values())
    line = Text(style="dim")
    line.append(visible(f"pack {given.pack.id} {given.pack.version}  policy {given.policy.version}"))
    line.append(f"  {total * 1000:.0f} ms" if total else "")
    if not given.model.verified:
        line.append("  UNVERIFIED MODEL: the pack was not made for it", "bold yellow")
    return line
