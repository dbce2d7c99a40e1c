"""The Triton kernel: one pass from activations to hits, probe values and the pooled sums of streams.

A program takes a tile of tokens and a tile of columns. Columns are the rows of all hook points and their probe rows,
laid side by side (`guard.kernels.columns`), so a probe costs what a row costs. The pre-activations of a tile live in
registers and are never written. Importing this module imports triton: `guard.kernels.choice` does so when asked.
"""

import triton
import triton.language as tl

UNIT = 1 << 23  # a gate strength of 1, in pooled sums: 128 of them still fit an int32 within a tile
GRAIN = 128  # columns of one hook point come in multiples of this, so no tile sees two hook points
HITS, NOT_FINITE, STRAY, STATUS = 0, 1, 2, 3  # places in `status`, and how many there are

_UNIT = tl.constexpr(UNIT)
_GRAIN = tl.constexpr(GRAIN)
_HITS, _NOT_FINITE, _STRAY = tl.constexpr(HITS), tl.constexpr(NOT_FINITE), tl.constexpr(STRAY)
_FAR = tl.constexpr(2**31 - 1)  # above every slot

INTERPRETED = bool(triton.knobs.runtime.interpret)  # as it was when the kernel was made, which is what counts


@triton.jit
def _product(
    x, rows, token, column, x_token, rows_column,
    D: tl.constexpr, SQUARES: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products `[BLOCK_T, BLOCK_K]` and, where asked for, each token's sum of squares `[BLOCK_T]`."""
    depth = tl.arange(0, BLOCK_D)
    left = x + token.to(tl.int64)[:, None] * x_token + depth[None, :]  # [BLOCK_T, BLOCK_D]
    right = rows + column.to(tl.int64)[None, :] * rows_column + depth[:, None]  # [BLOCK_D, BLOCK_K]
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for begin in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(left + begin)
        else:  # rows are padded with zeros and need no mask
            a = tl.load(left + begin, mask=(begin + depth < D)[None, :], other=0.0)
        b = tl.load(right + begin)
        if SQUARES:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        if WIDEN:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b.to(a.dtype), acc)  # rows of 8 bits: exact in either half
    return acc, squares


@triton.jit
def _write_hits(fired, value, token, number, latents, hit_cell, hit_value, status, capacity):
    """Gives the tile's hits their places with one atomic add; those beyond `capacity` are counted, not written."""
    one = fired.to(tl.int32)
    of_token = tl.sum(one, axis=1)  # [BLOCK_T]
    total = tl.sum(of_token, axis=0)
    if total > 0:
        start = tl.atomic_add(status + _HITS, total, sem="relaxed")
        before = start + tl.cumsum(of_token, axis=0) - of_token  # [BLOCK_T]
        place = before[:, None] + tl.cumsum(one, axis=1) - 1  # [BLOCK_T, BLOCK_K]
        kept = fired & (place < capacity)
        tl.store(hit_cell + place, token[:, None] * latents + number[None, :], mask=kept)
        tl.store(hit_value + place, value, mask=kept)


@triton.jit
def _pool(fired, strength, stream, low, high, number, sums, counts, latents):
    """Adds strengths as whole numbers: their sum depends neither on the order of atomics nor on the tiling."""
    unit = (tl.where(fired, strength, 0.0) * _UNIT + 0.5).to(tl.int32)  # [BLOCK_T, BLOCK_K]
    if low == high:  # one stream, as in a prefill: summed here first, so that tiles do not queue for an address
        many = tl.sum(fired.to(tl.int32), axis=0)  # [BLOCK_K]
        place = low.to(tl.int64) * latents + number
        tl.atomic_add(sums + place, tl.sum(unit, axis=0).to(tl.int64), mask=many > 0, sem="relaxed")
        tl.atomic_add(counts + place, many, mask=many > 0, sem="relaxed")
    else:
        places = stream.to(tl.int64)[:, None] * latents + number[None, :]
        tl.atomic_add(sums + places, unit.to(tl.int64), mask=fired, sem="relaxed")
        tl.atomic_add(counts + places, tl.where(fired, 1, 0), mask=fired, sem="relaxed")


# A number that changes from call to call must not compile anew: under graph capture nothing may be compiled.
@triton.jit(do_not_specialize=["T", "bucket", "columns", "capacity", "latents", "probes", "slots"])
def kernel(
    x, rows, gain, bias, threshold, rise, index, blocks, status,  # what is read, and what happened
    hit_cell, hit_value, probe,  # HITS
    slot, sums, counts, probe_sums, seen, spoiled,  # POOL
    T, bucket, columns, x_hook, x_token, rows_column, capacity, latents, probes, slots,
    D: tl.constexpr, HITS: tl.constexpr, POOL: tl.constexpr, SCALED: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_K  # column tiles run fastest: those of one token tile find x in the L2 cache
    about = blocks + (first // _GRAIN) * 4
    hook, probes_from = tl.load(about), tl.load(about + 1)
    ends, covered = tl.load(about + 2), tl.load(about + 3)
    if first >= covered:  # nothing but padding
        return
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = first + tl.arange(0, BLOCK_K)
    held = tl.minimum(token, T - 1)  # tokens past the end read the last one, and are not live
    live = token < T  # [BLOCK_T]
    if POOL:
        stream = tl.load(slot + held)
        stray = live & (stream >= slots)
        live = live & (stream >= 0) & (stream < slots)
        low = tl.min(tl.where(live, stream, _FAR), axis=0)
        high = tl.max(tl.where(live, stream, -1), axis=0)

    # Squares are needed by tiles with probe columns; where there are none, the last tile looks for infinity and NaN.
    squaring = first + BLOCK_K > tl.minimum(probes_from, covered - 1)
    source = x + hook.to(tl.int64) * x_hook
    if squaring:
        acc, squares = _product(
            source, rows, held, column, x_token, rows_column, D, True, WIDEN, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D
        )
    else:
        acc, squares = _product(
            source, rows, held, column, x_token, rows_column, D, False, WIDEN, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D
        )
    if SCALED:
        acc = acc * tl.load(gain + column)[None, :]

    number = tl.load(index + column)  # [BLOCK_K] the row's number in the pack, or the probe's
    shift = tl.load(bias + column)
    limit = tl.load(threshold + column)  # infinite for probes and padding, which so never fire
    value = acc + shift[None, :]
    fired = (value > limit[None, :]) & live[:, None]
    if HITS:
        _write_hits(fired, value, token, number, latents, hit_cell, hit_value, status, capacity)
    if POOL:
        strength = (value - limit[None, :]) / tl.load(rise + column)[None, :]
        strength = tl.minimum(tl.maximum(strength, 0.0), 1.0)
        _pool(fired, strength, stream, low, high, number, sums, counts, latents)

    if squaring:
        finite = squares < float("inf")  # false for NaN too
        broken = tl.where(finite, 0, 1)
        broken = tl.where(live, broken, 0)
        tl.store(status + _NOT_FINITE, 1, mask=tl.max(broken, axis=0) > 0)
        mean = squares / D
        inverse = tl.where(mean > 0, tl.rsqrt(tl.maximum(mean, 1e-12)), 0.0)
        reading = acc * inverse[:, None] + shift[None, :]
        wanted = (column >= probes_from) & (column < ends)
        mask = live[:, None] & wanted[None, :]
        if HITS:
            tl.store(probe + held.to(tl.int64)[:, None] * probes + number[None, :], reading, mask=mask)
        if POOL:
            tl.store(spoiled + stream, tl.full((BLOCK_T,), 1, tl.int32), mask=broken > 0)
            mask = mask & finite[:, None]
            reading = tl.where(mask, reading, 0.0)
            counting = (hook == 0) & (first + BLOCK_K >= covered)  # one tile a token, whatever the number of tiles
            ones = tl.where(live & counting, 1, 0)
            if low == high:
                place = low.to(tl.int64) * probes + number
                tl.atomic_add(probe_sums + place, tl.sum(reading, axis=0).to(tl.float64), mask=wanted, sem="relaxed")
                total = tl.sum(ones, axis=0)
                tl.atomic_add(seen + low, total.to(tl.int64), mask=total > 0, sem="relaxed")
            else:
                places = stream.to(tl.int64)[:, None] * probes + number[None, :]
                tl.atomic_add(probe_sums + places, reading.to(tl.float64), mask=mask, sem="relaxed")
                tl.atomic_add(seen + stream, ones.to(tl.int64), mask=ones > 0, sem="relaxed")
            lost = tl.sum(tl.where(stray & counting, 1, 0), axis=0)
            tl.atomic_add(status + _STRAY, lost, mask=lost > 0, sem="relaxed")


def _config(block_t: int, block_k: int, block_d: int, warps: int, stages: int) -> triton.Config:
    sizes = {"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_D": block_d}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


# Tiles of tokens stay at 128 or below, and of columns within GRAIN: see UNIT and GRAIN.
PREFILL = [  # eight warps where four would spill: ptxas for Hopper says so, docs/decisions/0005-triton.md
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 32, 8, 4),
    _config(128, 64, 128, 8, 3),
    _config(128, 64, 64, 8, 4),
    _config(64, 128, 64, 8, 4),
    _config(64, 64, 64, 4, 4),
    _config(64, 64, 32, 4, 3),
]
DECODE = [  # narrow tiles of columns: the time is that of reading the rows, which takes many programs at once
    _config(16, 16, 128, 2, 5),
    _config(16, 16, 256, 4, 4),
    _config(16, 32, 128, 4, 5),
    _config(16, 32, 256, 4, 3),
    _config(16, 64, 128, 4, 4),
    _config(32, 32, 128, 4, 4),
    _config(64, 32, 128, 4, 4),
    _config(64, 64, 64, 4, 4),
]
if INTERPRETED:  # one each, small enough that tests of a few dozen tokens see several tiles
    PREFILL, DECODE = [_config(32, 64, 128, 4, 1)], [_config(16, 32, 128, 4, 1)]

_KEY = ["bucket", "columns", "D", "HITS", "POOL", "WIDEN"]
prefill = triton.autotune(PREFILL, _KEY, cache_results=True)(kernel)
decode = triton.autotune(DECODE, _KEY, cache_results=True)(kernel)
