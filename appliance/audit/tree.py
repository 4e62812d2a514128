"""The Merkle tree of the audit log: hashes, tiles, and the proofs that are made from them.

Rules:

- Pure: nothing here reads or writes. Hashes come from a `HashReader`; `TileHashes` gets them through a callable.
- Verification raises `ProofInvalid`; no function answers with a bool.
- A proof has exactly one length for its sizes and indices: one hash more or fewer is refused.
- Whoever verifies needs the stdlib and this file only.

Hashes: RFC 6962, section 2.1. Tiles: C2SP tlog-tiles. Sizes are counted in leaves, indices from 0; a node of `level` l
and index i covers the leaves [i * 2^l, (i + 1) * 2^l).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import ClassVar, Final, Literal, Protocol

from appliance.errors import Fault, HoldfastError

HASH_BYTES: Final = 32
TILE_HEIGHT: Final = 8
TILE_WIDTH: Final = 1 << TILE_HEIGHT
MAX_SIZE: Final = (1 << 63) - 1
EMPTY_ROOT: Final = sha256(b"").digest()

_LEAF: Final = b"\x00"
_NODE: Final = b"\x01"
_MAX_TILE_LEVEL: Final = 63


class ProofInvalid(HoldfastError, ValueError):
    """What a proof claims does not follow from it."""

    code: ClassVar[str] = "audit_proof_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class OutsideTree(HoldfastError, IndexError):
    """A proof was asked for about leaves, or a size, that the tree does not have."""

    code: ClassVar[str] = "audit_outside_tree"
    fault: ClassVar[Fault] = Fault.MISSING


class TileInvalid(HoldfastError, ValueError):
    """A tile does not have the length that the size of the tree gives it."""

    code: ClassVar[str] = "audit_tile_invalid"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class HashReader(Protocol):
    """Where the hashes of a tree come from."""

    def hash_at(self, level: int, index: int) -> bytes:
        """The hash of the complete subtree at `level` (0 = leaf), `index` counted in nodes of that level."""


def leaf_hash(entry: bytes) -> bytes:
    """The hash of a leaf: SHA-256(0x00 ‖ entry)."""
    return sha256(_LEAF + entry).digest()


def leaf_hashes(entries: Iterable[bytes]) -> list[bytes]:
    """`leaf_hash` of each."""
    return [sha256(_LEAF + entry).digest() for entry in entries]


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node: SHA-256(0x01 ‖ left ‖ right)."""
    return sha256(_NODE + left + right).digest()


class Frontier:
    """The right edge of a growing tree: the roots of its complete subtrees, O(log size) of them.

    `peaks` go from left (largest) to right: one for each bit that is set in `size`, highest first.
    """

    __slots__ = ("_peaks", "_size")

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        if not 0 <= size <= MAX_SIZE:
            raise ValueError(f"a tree has 0 to 2^63-1 leaves, not {size}")
        if len(peaks) != size.bit_count() or any(len(peak) != HASH_BYTES for peak in peaks):
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} peaks of {HASH_BYTES} bytes")
        self._size = size
        self._peaks = list(peaks)

    @classmethod
    def read(cls, reader: HashReader, size: int) -> "Frontier":
        """The edge of the tree of `size` leaves, from its hashes."""
        return cls(size, [reader.hash_at(level, index) for level, index in cover(0, size)])

    @property
    def size(self) -> int:
        """How many leaves there are."""
        return self._size

    @property
    def peaks(self) -> tuple[bytes, ...]:
        """The roots of the complete subtrees, the largest first."""
        return tuple(self._peaks)

    def append(self, leaf_hash: bytes) -> None:
        """Add a leaf at the right."""
        if len(leaf_hash) != HASH_BYTES:
            raise ValueError(f"a leaf hash has {HASH_BYTES} bytes, not {len(leaf_hash)}")
        peaks, rest, node = self._peaks, self._size, leaf_hash
        while rest & 1:
            node = sha256(_NODE + peaks.pop() + node).digest()
            rest >>= 1
        peaks.append(node)
        self._size += 1

    def append_subtree(self, level: int, root: bytes) -> None:
        """Add the 2^level leaves of a complete subtree by its root.

        Raises:
            ValueError: such a subtree does not begin at this size.
        """
        if level < 0 or self._size & ((1 << level) - 1):
            raise ValueError(f"no complete subtree of level {level} begins at leaf {self._size}")
        if len(root) != HASH_BYTES:
            raise ValueError(f"a root has {HASH_BYTES} bytes, not {len(root)}")
        rest, node = self._size >> level, root
        while rest & 1:
            node = node_hash(self._peaks.pop(), node)
            rest >>= 1
        self._peaks.append(node)
        self._size += 1 << level

    def root(self) -> bytes:
        """The root of the tree as it is now; that of no leaves is SHA-256 of nothing."""
        return _fold(self._peaks) if self._peaks else EMPTY_ROOT


def root_of_row(row: bytes) -> bytes:
    """The root over a power of two of hashes that lie side by side, as those of a full tile do."""
    hashes, rest = divmod(len(row), HASH_BYTES)
    if rest or hashes.bit_count() != 1:
        raise ValueError(f"{len(row)} bytes are no power of two of hashes")
    while len(row) > HASH_BYTES:
        row = _parents(row)
    return row


def index_path(index: int) -> str:
    """A number in groups of three digits, all but the last behind an x: 1234067 is `x001/x234/067`."""
    if index < 0:
        raise ValueError(f"an index is not negative: {index}")
    path = f"{index % 1000:03d}"
    while index := index // 1000:
        path = f"x{index % 1000:03d}/{path}"
    return path


def tile_path(level: int | Literal["entries"], index: int, width: int = TILE_WIDTH) -> str:
    """Where a tile, or a bundle of entries, lies under a log: `tile/0/x001/234`, `tile/entries/007.p/12`."""
    if level != "entries" and not 0 <= level <= _MAX_TILE_LEVEL:
        raise ValueError(f"a tile level is 0 to {_MAX_TILE_LEVEL}, not {level}")
    if not 1 <= width <= TILE_WIDTH:
        raise ValueError(f"a tile holds 1 to {TILE_WIDTH} hashes, not {width}")
    return f"tile/{level}/{index_path(index)}{'' if width == TILE_WIDTH else f'.p/{width}'}"


class TileHashes:
    """The hashes of the tree of `size` leaves, out of its tiles.

    `read_tile(tile_level, index, width)` returns the `width` * 32 bytes of a tile: `width` is 256, or what the last
    tile of its level holds at this size. A reader that finds only the full tile there cuts it to `width`.
    """

    def __init__(self, read_tile: Callable[[int, int, int], bytes], size: int, *, cached_tiles: int = 64) -> None:
        if not 0 <= size <= MAX_SIZE or cached_tiles < 1:
            raise ValueError(f"a tree of 0 to 2^63-1 leaves and a cache of 1 tile or more, not {size}, {cached_tiles}")
        self._read_tile = read_tile
        self._size = size
        self._cached_tiles = cached_tiles  # each up to 16 KiB
        self._rows: OrderedDict[tuple[int, int], list[bytes]] = OrderedDict()

    @property
    def size(self) -> int:
        """How many leaves the tree has."""
        return self._size

    def hash_at(self, level: int, index: int) -> bytes:
        """See `HashReader`.

        Raises:
            OutsideTree: the tree has no such complete subtree.
            TileInvalid: the tile is longer or shorter than the size of the tree says.
        """
        if level < 0 or not 0 <= index < self._size >> level:
            raise OutsideTree(
                f"the tree has no node {index} at level {level}",
                cause=f"it has {self._size} leaves",
                remedy="Ask for a node inside it",
            )
        tile_level, row = divmod(level, TILE_HEIGHT)
        tile, offset = divmod(index << row, TILE_WIDTH)
        rows = self._tile(tile_level, tile)
        while len(rows) <= row:
            rows.append(_parents(rows[-1]))
        start = (offset >> row) * HASH_BYTES
        return rows[row][start : start + HASH_BYTES]

    def _tile(self, tile_level: int, tile: int) -> list[bytes]:
        """The rows of a tile that are known so far, from the bottom."""
        rows = self._rows.get((tile_level, tile))
        if rows is not None:
            self._rows.move_to_end((tile_level, tile))
            return rows
        width = min(TILE_WIDTH, (self._size >> tile_level * TILE_HEIGHT) - tile * TILE_WIDTH)
        bottom = self._read_tile(tile_level, tile, width)
        if len(bottom) != width * HASH_BYTES:
            raise TileInvalid(
                f"{tile_path(tile_level, tile, width)} is damaged",
                cause=f"it has {len(bottom)} bytes, and {width} hashes have {width * HASH_BYTES}",
                remedy="Put it back from a copy of the log; `holdfast audit verify` checks the rest",
            )
        self._rows[tile_level, tile] = rows = [bottom]
        if len(self._rows) > self._cached_tiles:
            self._rows.popitem(last=False)
        return rows


def root_of(reader: HashReader, size: int) -> bytes:
    """The root of the tree of the first `size` leaves."""
    return Frontier.read(reader, size).root()


def inclusion_proof(reader: HashReader, index: int, size: int) -> list[bytes]:
    """The audit path of a leaf, from the leaf up (RFC 6962, section 2.1.1).

    Raises:
        OutsideTree: the tree of `size` leaves has no such leaf.
    """
    _must_be_inside(0 <= index < size <= MAX_SIZE, f"leaf {index}", size)
    path, start, end = [], 0, size
    while end - start > 1:
        middle = start + _left_leaves(end - start)
        if index < middle:
            path.append(_range_root(reader, middle, end))
            end = middle
        else:
            path.append(_range_root(reader, start, middle))
            start = middle
    return path[::-1]


def verify_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that a leaf is at `index` in the tree of `size` leaves under `root`.

    Raises:
        ProofInvalid: it does not follow.
    """
    _check_sizes(0 <= index < size <= MAX_SIZE, f"there is no leaf {index} in a tree of {size}")
    _check_hashes((leaf_hash, root, *proof))
    inner, border = _path_shape(index, size)
    _check_length(proof, inner + border)
    node = _up_the_border(_up_inside(leaf_hash, proof[:inner], index), proof[inner:])
    _check_root(node, root, f"leaf {index} with this hash is not in the tree of {size} leaves")


def consistency_proof(reader: HashReader, old_size: int, new_size: int) -> list[bytes]:
    """The proof that the tree of `new_size` leaves begins with that of `old_size` (RFC 6962, section 2.1.2).

    It is empty from size 0 and between equal sizes.

    Raises:
        OutsideTree: `old_size` is not within `new_size`.
    """
    _must_be_inside(0 <= old_size <= new_size <= MAX_SIZE, f"a prefix of {old_size} leaves", new_size)
    if old_size == 0:
        return []
    path, start, end = [], 0, new_size
    while old_size != end:
        middle = start + _left_leaves(end - start)
        if old_size <= middle:
            path.append(_range_root(reader, middle, end))
            end = middle
        else:
            path.append(_range_root(reader, start, middle))
            start = middle
    if start > 0:
        path.append(_range_root(reader, start, end))
    return path[::-1]


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Check that the tree of `new_size` leaves begins with that of `old_size`.

    Raises:
        ProofInvalid: it does not follow.
    """
    _check_sizes(0 <= old_size <= new_size <= MAX_SIZE, f"a tree of {new_size} does not begin with {old_size} leaves")
    _check_hashes((old_root, new_root, *proof))
    for size, root in ((old_size, old_root), (new_size, new_root)):
        if size == 0:
            _check_root(EMPTY_ROOT, root, "this is not the root of a tree without leaves")
    if old_size in (0, new_size):
        _check_length(proof, 0)
        if old_size == new_size:
            _check_root(old_root, new_root, f"there are two trees of {old_size} leaves")
        return
    # The largest complete subtree at the right edge of the old tree: the path begins at it.
    level = (old_size & -old_size).bit_length() - 1
    inner, border = _path_shape(old_size - 1, new_size)
    inner -= level
    given = old_size != 1 << level  # a lone subtree is the old tree itself, whose root is known
    _check_length(proof, given + inner + border)
    edge, path = (proof[0], proof[1:]) if given else (old_root, proof)
    index = (old_size - 1) >> level
    old = _up_the_border(_up_inside_left_only(edge, path[:inner], index), path[inner:])
    _check_root(old, old_root, f"it does not begin at the tree of {old_size} leaves with this root")
    new = _up_the_border(_up_inside(edge, path[:inner], index), path[inner:])
    _check_root(new, new_root, f"the tree of {new_size} leaves does not go on from that of {old_size}")


def range_proof(reader: HashReader, start: int, end: int, size: int) -> list[bytes]:
    """The proof that the leaves of [start, end) are those of the tree of `size` leaves.

    The roots of the complete subtrees beside the range, from left to right: first those that cover [0, start), as large
    as they can be (one for each bit set in `start`, highest first), then those that cover [end, size), which grow as
    far as the alignment of their start lets them and then shrink.

    Raises:
        OutsideTree: the range is empty, or not in the tree.
    """
    _must_be_inside(0 <= start < end <= size <= MAX_SIZE, f"the range [{start}, {end})", size)
    return [reader.hash_at(*node) for span in ((0, start), (end, size)) for node in cover(*span)]


def verify_range(leaf_hashes: Iterable[bytes], start: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that `leaf_hashes` are those from `start` on, without a gap, in the tree of `size` leaves under `root`.

    They are taken one by one; memory does not grow with them.

    Raises:
        ProofInvalid: it does not follow, or there is not one leaf.
    """
    _check_sizes(0 <= start < size <= MAX_SIZE, f"no range begins at leaf {start} of {size}")
    _check_hashes((root, *proof))
    left = start.bit_count()
    if len(proof) < left:
        raise _invalid(f"it has {len(proof)} hashes, and {left} or more belong to a range from {start}")
    edge = Frontier(start, proof[:left])
    for leaf in leaf_hashes:
        if edge.size == size:
            raise _invalid(f"there are more than the {size - start} leaves from {start} to the end of the tree")
        _check_hashes((leaf,))
        edge.append(leaf)
    end = edge.size
    if end == start:
        raise _invalid("there is not one leaf that it could be about")
    right = list(cover(end, size))
    _check_length(proof, left + len(right))
    for (level, _), node in zip(right, proof[left:], strict=True):
        edge.append_subtree(level, node)
    _check_root(edge.root(), root, f"these are not the leaves [{start}, {end}) of the tree of {size} leaves")


def cover(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The (level, index) of the largest complete subtrees that cover [start, end), from left to right."""
    while start < end:
        level = (end - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        yield level, start >> level
        start += 1 << level


def _left_leaves(leaves: int) -> int:
    """How many leaves go to the left of a node over `leaves`: the largest power of two below that number."""
    return 1 << ((leaves - 1).bit_length() - 1)


def _range_root(reader: HashReader, start: int, end: int) -> bytes:
    """MTH(D[start:end]) of RFC 6962, for a range that is one node of the tree."""
    return _fold([reader.hash_at(*node) for node in cover(start, end)])


def _fold(peaks: Sequence[bytes]) -> bytes:
    root = peaks[-1]
    for peak in reversed(peaks[:-1]):
        root = node_hash(peak, root)
    return root


def _parents(row: bytes) -> bytes:
    """The row above a row of hashes; one without a partner has no complete parent."""
    pair = 2 * HASH_BYTES
    return b"".join(sha256(_NODE + row[at : at + pair]).digest() for at in range(0, len(row) - pair + 1, pair))


def _path_shape(index: int, size: int) -> tuple[int, int]:
    """How long the path of a leaf is: below where it meets the right edge of the tree, and on that edge."""
    inner = (index ^ (size - 1)).bit_length()
    return inner, (index >> inner).bit_count()


def _up_inside(node: bytes, path: Sequence[bytes], index: int) -> bytes:
    for level, sibling in enumerate(path):
        node = node_hash(sibling, node) if index >> level & 1 else node_hash(node, sibling)
    return node


def _up_inside_left_only(node: bytes, path: Sequence[bytes], index: int) -> bytes:
    """As `_up_inside`, in the tree that ends at this node: what is to the right is not there yet."""
    for level, sibling in enumerate(path):
        if index >> level & 1:
            node = node_hash(sibling, node)
    return node


def _up_the_border(node: bytes, path: Sequence[bytes]) -> bytes:
    for sibling in path:
        node = node_hash(sibling, node)
    return node


def _must_be_inside(inside: bool, what: str, size: int) -> None:
    if not inside:
        raise OutsideTree(
            f"{what} cannot be proved", cause=f"a tree of {size} leaves has no such thing", remedy="Ask for less"
        )


def _check_sizes(sound: bool, cause: str) -> None:
    if not sound:
        raise _invalid(cause)


def _check_hashes(hashes: Iterable[bytes]) -> None:
    for node in hashes:
        if len(node) != HASH_BYTES:
            raise _invalid(f"a hash has {HASH_BYTES} bytes, and one of these has {len(node)}")


def _check_length(proof: Sequence[bytes], hashes: int) -> None:
    if len(proof) != hashes:
        raise _invalid(f"it has {len(proof)} hashes, and for these sizes it must have {hashes}")


def _check_root(computed: bytes, root: bytes, cause: str) -> None:
    if computed != root:
        raise _invalid(cause)


def _invalid(cause: str) -> ProofInvalid:
    return ProofInvalid(
        "the proof does not hold",
        cause=cause,
        remedy="Get the proof and the checkpoint again; if it fails again, one of the two, or the log, was altered",
    )
