"""The report's blocks on the candidates: how many there are where, what they carry, and where they point."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np

from guard.lab.heads.features import Floats
from guard.lab.report import plots
from guard.lab.report.analysis import place
from guard.lab.report.blocks import Block, Table, comparable, counted, domains_in_order, hook_points, percent
from guard.lab.report.data import CandidateCount, MapPoint, PlotData, TagCount
from guard.lab.report.landscape import LEAST, flat_map, like_neighbours
from guard.lab.search.candidates import Candidate
from guard.lab.suite.measure import SaeReport

_MAP_POINTS = 600  # of one map, the surest: more cannot be told apart, and make the page heavy


def candidate_blocks(candidates: Sequence[Candidate], searched: Sequence[SaeReport]) -> list[Block]:
    """`searched`: the SAEs that candidates were looked for in, those without any among them."""
    saes = {report.name: report.hook_point for report in searched}
    return [_domain_block(candidates, saes, comparable(searched)), _tag_block(candidates, saes)]


def _domain_block(candidates: Sequence[Candidate], saes: Mapping[str, str], compared: Collection[str]) -> Block:
    counts: Counter[tuple[str, str, str]] = Counter()
    for c in candidates:
        counts[c.sae, "*", "*"] += 1
        counts.update((c.sae, domain, "*") for domain in c.domains)
        counts.update((c.sae, domain, subdomain) for domain, subdomain in c.subdomains)
    names = {(domain, subdomain) for _, domain, subdomain in counts}
    ordered = [
        (domain, subdomain)
        for domain in ["*", *domains_in_order([d for d, _ in names if d != "*"])]
        for subdomain in ["*", *sorted(s for d, s in names if d == domain and s != "*")]
        if (domain, subdomain) in names
    ]
    rows = [
        CandidateCount(sae=sae, hook_point=point, domain=d, subdomain=s, candidates=counts[sae, d, s])
        for sae, point in saes.items()
        for d, s in ordered
    ]
    points = hook_points([row for row in rows if row.sae in compared])
    there = [[sae for sae in compared if saes[sae] == point] for point in points]
    mean = {key: [fmean(counts[sae, *key] for sae in at) for at in there] for key in ordered}
    labels = {key: "all" if key[0] == "*" else key[0] if key[1] == "*" else key[1].replace("_", " ") for key in ordered}
    columns = [place(point).short for point in points]
    drawn = []
    for part, name in enumerate(("By domain", "By sub-domain")):
        shown = {k: labels[k] if part == 0 else f"{k[0]}: {labels[k]}" for k in ordered if (k[1] == "*") == (part == 0)}
        if shown:
            cells = np.array([mean[k] for k in shown])
            about = f"Candidates, {name.lower()}"
            svg = plots.heat(list(shown.values()), columns, cells, x="output", key=f"candidates{part}", about=about)
            drawn.append((name, svg))
    peak = {d: columns[int(np.argmax(mean[d, s]))] for d, s in ordered if s == "*" and d != "*"}
    data = PlotData[CandidateCount](
        id="candidates",
        title="Features by domain, layer and sub-domain",
        caption="Latents that hold a domain's or a sub-domain's concept: mean count over the SAEs of an output, of the "
        "configurations that stand at every layer. A latent with several tags counts in each of their rows, and once "
        "in the row of all.",
        n={"candidates": len(candidates), "SAEs": len(saes), "SAEs compared": len(compared)},
        finding="Most candidates stand at " + ", ".join(f"{where} for {d}" for d, where in peak.items()) + ".",
        rows=rows,
    )
    cells_of = [[labels[k] if k[1] == "*" else f"{k[0]}: {labels[k]}", *(f"{v:.1f}" for v in mean[k])] for k in ordered]
    return Block(data, drawn, [("The same as a table", Table(["", *columns], cells_of))])


def _tag_block(candidates: Sequence[Candidate], saes: Mapping[str, str]) -> Block:
    rows = []
    for sae, point in saes.items():
        there = [c for c in candidates if c.sae == sae]
        rows.append(
            TagCount(
                sae=sae,
                hook_point=point,
                candidates=len(there),
                domains=dict(sorted(Counter(len(c.domains) for c in there).items())),
                subdomains=dict(sorted(Counter(len(c.subdomains) for c in there).items())),
                surface=sum(c.surface is True for c in there),
                not_surface=sum(c.surface is False for c in there),
                surface_unknown=sum(c.surface is None for c in there),
            )
        )
    points = hook_points(rows)
    most = max(n for row in rows for n in row.domains)
    by_point = {point: [row for row in rows if row.hook_point == point] for point in points}
    tags = {
        counted(n, "domain"): [float(sum(r.domains.get(n, 0) for r in by_point[p])) for p in points]
        for n in range(1, most + 1)
    }
    forms = {
        "meaning": [float(sum(r.not_surface for r in by_point[p])) for p in points],
        "surface form": [float(sum(r.surface for r in by_point[p])) for p in points],
        "not known": [float(sum(r.surface_unknown for r in by_point[p])) for p in points],
    }
    labels = [place(p).short for p in points]
    several = sum(len(c.domains) > 1 for c in candidates)
    judged = [
        (p, s / (s + m)) for p, s, m in zip(labels, forms["surface form"], forms["meaning"], strict=True) if s + m
    ]
    shares = (
        f"surface forms are from {min(judged, key=lambda x: x[1])[1]:.0%} ({min(judged, key=lambda x: x[1])[0]}) to "
        f"{max(judged, key=lambda x: x[1])[1]:.0%} ({max(judged, key=lambda x: x[1])[0]}) of an output's candidates"
        if judged
        else "which are surface forms is not known"
    )
    data = PlotData[TagCount](
        id="tags",
        title="How many domains a candidate carries, and how many are surface forms",
        caption="Candidates of all SAEs of an output, by how many domains they carry, and by whether they fire on one "
        "character or token whatever it means.",
        n={"candidates": len(candidates), "SAEs": len(saes)},
        finding=f"{several:,} of {len(candidates):,} candidates ({percent(several, len(candidates))}) carry several "
        f"domains; {shares}.",
        rows=rows,
    )
    drawn = [
        ("Domains carried", plots.bars(labels, tags, x="candidates", key="tags0", about="Domains a candidate carries")),
        ("Surface forms", plots.bars(labels, forms, x="candidates", key="tags1", about="Surface forms")),
    ]
    return Block(data, drawn)


def landscape_block(chosen: Sequence[tuple[str, Sequence[Candidate], Floats]]) -> Block:
    """`chosen`: for each hook point its SAE, the SAE's candidates and their decoder rows `[n, d_model]`."""
    rows: list[MapPoint] = []
    drawn: list[tuple[str, str]] = []
    said: list[tuple[float, str]] = []
    order = domains_in_order([c.domains[0] for _, found, _ in chosen for c in found])
    for sae, found, directions in chosen:
        if len(found) < LEAST:
            continue
        labels = [c.domains[0] for c in found]
        points = flat_map(directions)
        tags = [[f"{d}: {s.replace('_', ' ')}" for d, s in c.subdomains] or c.domains for c in found]
        titles = [f"{c.hook_point} {c.latent}: {', '.join(t)}" for c, t in zip(found, tags, strict=True)]
        about = f"Decoder directions of {len(found)} candidates of {sae}"
        key = f"map{len(drawn)}"
        drawn.append(
            (
                f"{place(found[0].hook_point).short}: {sae}",
                plots.scatter(points, labels, titles, order, key=key, about=about),
            )
        )
        near, chance = like_neighbours(directions, labels)
        where = place(found[0].hook_point).short
        told = f"{where}: there {near:.0%} of a candidate's five nearest directions are of its own domain"
        said.append((near - chance, f"{told} (by chance {chance:.0%})"))
        rows += [
            MapPoint(sae=sae, hook_point=c.hook_point, latent=c.latent, x=x, y=y, domain=c.domains[0], tags=t)
            for c, t, (x, y) in zip(found, tags, points.tolist(), strict=True)
        ]
    data = PlotData[MapPoint](
        id="landscape",
        title="Landscape: where the candidates point",
        caption="Decoder directions of one SAE an output (the one with the most candidates), in two dimensions by "
        f"PCA and t-SNE (seed 0), coloured by the surest domain; at most {_MAP_POINTS} an output, the surest. Near "
        "means alike; far means little. Hovering shows a latent and its tags.",
        n={"candidates": len(rows), "maps": len(drawn)},
        finding=f"Domains stand apart the most at {max(said)[1]}."
        if said
        else f"No SAE has {LEAST} candidates, so there is no map.",
        rows=rows,
    )
    return Block(data, drawn)


def most_candidates(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """For each hook point the SAE with the most candidates, and the surest of them."""
    result = {}
    for point in hook_points(candidates):
        sae = Counter(c.sae for c in candidates if c.hook_point == point).most_common(1)[0][0]
        found = [c for c in candidates if c.sae == sae]
        result[sae] = sorted(found, key=lambda c: min((t.latent_q, t.p) for t in c.tags))[:_MAP_POINTS]
    return result
