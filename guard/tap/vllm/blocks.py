"""What fired in each block of the prefix cache, kept by the hash of all tokens up to that block's end.

vLLM computes no activations for a cached prefix, so its hits must come from when they were computed. The hash is our
own, over token ids alone: whatever salt or adapter the engine adds to its own, the same tokens through the same weights
fire the same latents. Requests whose activations depend on more (adapters, images) never come here.

Memory is bounded twice: by blocks (as many as the engine's cache has) and by bytes. A block that a running request has
read or written stays for as long as it runs, as it does in the engine's cache.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from guard.tap.vllm.fired import Fired

ROOT = b"guard.blocks.v1"
_DIGEST = 16


class Block:
    """One full block of tokens; `key` is the hash of every token up to its end."""

    __slots__ = ("__weakref__", "fired", "key")

    def __init__(self, key: bytes, fired: Fired) -> None:
        self.key = key
        self.fired = fired

    @property
    def nbytes(self) -> int:
        return self.fired.nbytes


def chain(parent: bytes, ids: NDArray[np.int32]) -> bytes:
    """The key of the block `ids [B]` behind the block `parent` (ROOT for the first)."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=_DIGEST, key=parent).digest()


class BlockStore:
    """Least recently used blocks leave first. Not thread-safe: it belongs to the engine's step."""

    def __init__(self, block_tokens: int, *, max_blocks: int, max_bytes: int) -> None:
        self.block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._recent: OrderedDict[bytes, Block] = OrderedDict()
        self._alive: WeakValueDictionary[bytes, Block] = WeakValueDictionary()  # those of running requests too
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._recent)

    def get(self, key: bytes) -> Block | None:
        return self._alive.get(key)

    def put(self, key: bytes, fired: Fired) -> Block:
        """The block of that key: the one that is there already, or a new one with what `fired` `[B]` says."""
        block = self._alive.get(key)
        if block is None:
            block = Block(key, fired)
            self._alive[key] = block
        self._use(block)
        self._shrink()
        return block

    def release(self, blocks: Sequence[Block]) -> None:
        """Blocks of a request that has ended become the most recently used, the first of its tokens last to leave."""
        for block in reversed(blocks):
            self._use(block)
        self._shrink()

    def _use(self, block: Block) -> None:
        if block.key in self._recent:
            self._recent.move_to_end(block.key)
        else:
            self._recent[block.key] = block
            self.nbytes += block.nbytes

    def _shrink(self) -> None:
        while self._recent and (len(self._recent) > self._max_blocks or self.nbytes > self._max_bytes):
            _, block = self._recent.popitem(last=False)
            self.nbytes -= block.nbytes
