"""The tree against RFC 6962 as it is written, and its proofs against whoever changes them."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from hashlib import sha256

import pytest

from appliance.audit.tree import (
    EMPTY_ROOT,
    HASH_BYTES,
    MAX_SIZE,
    TILE_WIDTH,
    Frontier,
    OutsideTree,
    ProofInvalid,
    TileHashes,
    TileInvalid,
    consistency_proof,
    inclusion_proof,
    index_path,
    leaf_hash,
    node_hash,
    range_proof,
    root_of,
    root_of_row,
    tile_path,
    verify_consistency,
    verify_inclusion,
    verify_range,
)

_SIZES = 70
_LEAVES = [leaf_hash(b"entry %d" % index) for index in range(_SIZES)]

# The tree of certificate-transparency's own tests (RFC 6962's reference implementation).
_KNOWN_LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
_KNOWN_ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


# RFC 6962, section 2.1, word for word.


def _mth(leaves: Sequence[bytes]) -> bytes:
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = _k(len(leaves))
    return sha256(b"\x01" + _mth(leaves[:k]) + _mth(leaves[k:])).digest()


def _path(m: int, leaves: Sequence[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = _k(len(leaves))
    if m < k:
        return [*_path(m, leaves[:k]), _mth(leaves[k:])]
    return [*_path(m - k, leaves[k:]), _mth(leaves[:k])]


def _subproof(m: int, leaves: Sequence[bytes], whole: bool) -> list[bytes]:
    if m == len(leaves):
        return [] if whole else [_mth(leaves)]
    k = _k(len(leaves))
    if m <= k:
        return [*_subproof(m, leaves[:k], whole), _mth(leaves[k:])]
    return [*_subproof(m - k, leaves[k:], False), _mth(leaves[:k])]


def _k(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


@functools.cache
def _root(size: int) -> bytes:
    return _mth(_LEAVES[:size])


class _Memory:
    """All the hashes of some leaves."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._levels = [list(leaves)]
        while len(self._levels[-1]) > 1:
            row = self._levels[-1]
            self._levels.append([node_hash(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)])

    def hash_at(self, level: int, index: int) -> bytes:
        return self._levels[level][index]


class _Uniform:
    """A tree of any size whose leaves are all alike, but for some: its hashes follow without the leaves."""

    def __init__(self, *marked: int) -> None:
        self._marked = marked
        self._alike = [leaf_hash(b"alike")]
        for _ in range(63):
            self._alike.append(node_hash(self._alike[-1], self._alike[-1]))

    def hash_at(self, level: int, index: int) -> bytes:
        if not any(leaf >> level == index for leaf in self._marked):
            return self._alike[level]
        if level == 0:
            return leaf_hash(b"marked %d" % index)
        return node_hash(self.hash_at(level - 1, 2 * index), self.hash_at(level - 1, 2 * index + 1))


class _Tiles:
    """The tiles of a tree, made when they are asked for; what was read is written down."""

    def __init__(self, reader: _Memory | _Uniform) -> None:
        self._reader = reader
        self.read: list[str] = []

    def __call__(self, level: int, index: int, width: int) -> bytes:
        self.read.append(tile_path(level, index, width))
        first = index * TILE_WIDTH
        return b"".join(self._reader.hash_at(8 * level, node) for node in range(first, first + width))


_MEMORY = _Memory(_LEAVES)


@pytest.mark.parametrize(("size", "root"), _KNOWN_ROOTS.items())
def test_the_known_tree_has_its_known_roots(size: int, root: str) -> None:
    leaves = [leaf_hash(entry) for entry in _KNOWN_LEAVES[:size]]
    edge = Frontier()
    for leaf in leaves:
        edge.append(leaf)
    assert edge.root().hex() == root_of(_Memory(leaves), size).hex() == root


def test_the_known_tree_has_its_known_proofs() -> None:
    reader = _Memory([leaf_hash(entry) for entry in _KNOWN_LEAVES])
    assert [node.hex() for node in inclusion_proof(reader, 0, 8)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [node.hex() for node in consistency_proof(reader, 6, 8)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


def test_a_tree_without_leaves_has_the_root_of_rfc_6962() -> None:
    assert Frontier().root() == EMPTY_ROOT == _mth([])
    assert root_of(_MEMORY, 0) == EMPTY_ROOT


def test_a_frontier_has_the_roots_of_every_size_on_its_way() -> None:
    edge = Frontier()
    for size, leaf in enumerate(_LEAVES):
        assert (edge.size, edge.root()) == (size, _root(size))
        edge.append(leaf)


def test_a_row_of_a_power_of_two_has_the_root_of_the_tree_over_it() -> None:
    for size in (1, 2, 4, 8, 16, 32, 64):
        assert root_of_row(b"".join(_LEAVES[:size])) == _root(size)
    for odd in (b"", b"".join(_LEAVES[:3]), _LEAVES[0] + b"0"):
        with pytest.raises(ValueError, match="no power of two"):
            root_of_row(odd)


def test_a_frontier_goes_on_from_its_peaks() -> None:
    for size in range(_SIZES):
        edge = Frontier.read(_MEMORY, size)
        again = Frontier(edge.size, edge.peaks)
        for leaf in _LEAVES[size:]:
            again.append(leaf)
        assert again.root() == _root(_SIZES)


def test_a_frontier_takes_complete_subtrees_where_they_begin() -> None:
    edge = Frontier.read(_MEMORY, 48)
    edge.append_subtree(4, _MEMORY.hash_at(4, 3))
    assert (edge.size, edge.root()) == (64, _root(64))
    with pytest.raises(ValueError, match="no complete subtree of level 1 begins at leaf 1"):
        Frontier(1, [_LEAVES[0]]).append_subtree(1, _LEAVES[1])


@pytest.mark.parametrize(
    ("size", "peaks"), [(-1, []), (3, [b"x" * 32]), (1, [b"short"]), (0, [b"x" * 32]), (1 << 63, [])]
)
def test_a_frontier_is_not_made_of_other_peaks_than_its_size_has(size: int, peaks: list[bytes]) -> None:
    with pytest.raises(ValueError, match="a tree"):
        Frontier(size, peaks)


def test_what_is_appended_has_the_length_of_a_hash() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Frontier().append(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        Frontier().append_subtree(3, b"short")


def test_every_inclusion_proof_is_that_of_the_rfc_and_verifies() -> None:
    for size in range(1, _SIZES + 1):
        for index in range(size):
            proof = inclusion_proof(_MEMORY, index, size)
            assert proof == _path(index, _LEAVES[:size])
            verify_inclusion(_LEAVES[index], index, size, proof, _root(size))


def test_every_consistency_proof_is_that_of_the_rfc_and_verifies() -> None:
    for new in range(1, _SIZES + 1):
        for old in range(1, new + 1):
            proof = consistency_proof(_MEMORY, old, new)
            assert proof == _subproof(old, _LEAVES[:new], True)
            verify_consistency(old, _root(old), new, _root(new), proof)


def test_every_tree_goes_on_from_none() -> None:
    for size in range(_SIZES + 1):
        assert consistency_proof(_MEMORY, 0, size) == []
        verify_consistency(0, EMPTY_ROOT, size, _root(size), [])


def test_every_range_proof_verifies() -> None:
    for size in range(1, _SIZES + 1):
        for start, end in itertools.combinations(range(0, size + 1, 1 if size < 40 else 3), 2):
            proof = range_proof(_MEMORY, start, end, size)
            verify_range(_LEAVES[start:end], start, size, proof, _root(size))


def test_a_range_proof_is_in_its_documented_order() -> None:
    assert range_proof(_MEMORY, 13, 14, 27) == [
        _mth(_LEAVES[0:8]),
        _mth(_LEAVES[8:12]),
        _LEAVES[12],
        _mth(_LEAVES[14:16]),
        _mth(_LEAVES[16:24]),
        _mth(_LEAVES[24:26]),
        _LEAVES[26],
    ]
    assert range_proof(_MEMORY, 0, 8, 8) == []


_TAMPERED_SIZES = [*range(1, 12), 31, 33, 64, 70]


def _tamperings(proof: Sequence[bytes]) -> Iterator[list[bytes]]:
    """A proof with each of its bytes changed; with each hash left out, doubled, cut, or swapped with the next."""
    for at, node in enumerate(proof):
        for byte in range(HASH_BYTES):
            changed = bytearray(node)
            changed[byte] ^= 1 << (at + byte) % 8
            yield [*proof[:at], bytes(changed), *proof[at + 1 :]]
        yield [*proof[:at], *proof[at + 1 :]]
        yield [*proof[: at + 1], *proof[at:]]
        yield [*proof[:at], node[:-1], *proof[at + 1 :]]
        if at + 1 < len(proof):
            yield [*proof[:at], proof[at + 1], node, *proof[at + 2 :]]
    yield [*proof, EMPTY_ROOT]
    yield [EMPTY_ROOT, *proof]


@pytest.mark.parametrize("size", _TAMPERED_SIZES)
def test_every_change_to_an_inclusion_proof_is_found(size: int) -> None:
    for index in range(0, size, 1 if size < 12 else 5):
        for changed in _tamperings(inclusion_proof(_MEMORY, index, size)):
            with pytest.raises(ProofInvalid):
                verify_inclusion(_LEAVES[index], index, size, changed, _root(size))


@pytest.mark.parametrize("size", _TAMPERED_SIZES)
def test_every_change_to_a_consistency_proof_is_found(size: int) -> None:
    for old in range(0, size + 1, 1 if size < 12 else 5):
        for changed in _tamperings(consistency_proof(_MEMORY, old, size)):
            with pytest.raises(ProofInvalid):
                verify_consistency(old, _root(old), size, _root(size), changed)


@pytest.mark.parametrize("size", _TAMPERED_SIZES)
def test_every_change_to_a_range_proof_is_found(size: int) -> None:
    for start, end in itertools.combinations(range(0, size + 1, 1 if size < 12 else 13), 2):
        for changed in _tamperings(range_proof(_MEMORY, start, end, size)):
            with pytest.raises(ProofInvalid):
                verify_range(_LEAVES[start:end], start, size, changed, _root(size))


def test_every_change_to_the_leaves_of_a_range_is_found() -> None:
    leaves, proof, root = _LEAVES[10:23], range_proof(_MEMORY, 10, 23, 50), _root(50)
    verify_range(iter(leaves), 10, 50, proof, root)
    for changed in (*_tamperings(leaves), leaves[1:], leaves[:-1], []):
        with pytest.raises(ProofInvalid):
            verify_range(changed, 10, 50, proof, root)
    for start in (9, 11, 0):
        with pytest.raises(ProofInvalid):
            verify_range(leaves, start, 50, proof, root)


def test_a_range_does_not_go_beyond_the_tree() -> None:
    with pytest.raises(ProofInvalid, match="more than the 5 leaves"):
        verify_range(itertools.repeat(_LEAVES[0]), 5, 10, range_proof(_MEMORY, 5, 10, 10), _root(10))


def test_another_leaf_index_size_or_root_is_refused() -> None:
    for size in range(2, 20):
        for index in range(size):
            proof = inclusion_proof(_MEMORY, index, size)
            for other in range(size):
                if other != index:
                    with pytest.raises(ProofInvalid):
                        verify_inclusion(_LEAVES[index], other, size, proof, _root(size))
                    with pytest.raises(ProofInvalid):
                        verify_inclusion(_LEAVES[other], index, size, proof, _root(size))
            with pytest.raises(ProofInvalid):
                verify_inclusion(_LEAVES[index], index, size, proof, _root(size + 1))


def test_a_rewritten_history_has_no_consistency_proof() -> None:
    rewritten = _Memory([_LEAVES[0], leaf_hash(b"another"), *_LEAVES[2:]])
    for new in range(3, 20):
        for old in range(2, new):
            proof = consistency_proof(rewritten, old, new)
            with pytest.raises(ProofInvalid):
                verify_consistency(old, _root(old), new, root_of(rewritten, new), proof)


@pytest.mark.parametrize(
    ("index", "size"), [(-1, 5), (5, 5), (6, 5), (0, 0), (0, -1), (0, MAX_SIZE + 1), (MAX_SIZE + 1, MAX_SIZE + 2)]
)
def test_a_leaf_that_the_tree_does_not_have_is_neither_proved_nor_verified(index: int, size: int) -> None:
    with pytest.raises(OutsideTree):
        inclusion_proof(_MEMORY, index, size)
    with pytest.raises(ProofInvalid):
        verify_inclusion(_LEAVES[0], index, size, [], _LEAVES[0])


@pytest.mark.parametrize(("old", "new"), [(-1, 5), (6, 5), (1, 0), (0, -1), (-2, -1), (1, MAX_SIZE + 1)])
def test_sizes_that_no_two_trees_have_are_neither_proved_nor_verified(old: int, new: int) -> None:
    with pytest.raises(OutsideTree):
        consistency_proof(_MEMORY, old, new)
    with pytest.raises(ProofInvalid):
        verify_consistency(old, EMPTY_ROOT, new, EMPTY_ROOT, [])


@pytest.mark.parametrize(("start", "end", "size"), [(-1, 2, 5), (2, 2, 5), (3, 2, 5), (0, 6, 5), (0, 1, MAX_SIZE + 1)])
def test_a_range_that_the_tree_does_not_have_is_not_proved(start: int, end: int, size: int) -> None:
    with pytest.raises(OutsideTree):
        range_proof(_MEMORY, start, end, size)


@pytest.mark.parametrize(("start", "size"), [(-1, 5), (5, 5), (0, 0), (0, MAX_SIZE + 1)])
def test_a_range_that_the_tree_does_not_have_is_not_verified(start: int, size: int) -> None:
    with pytest.raises(ProofInvalid):
        verify_range([_LEAVES[0]], start, size, [], _LEAVES[0])


def test_an_empty_tree_has_one_root() -> None:
    verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    for old, old_root, new, new_root in ((0, _root(1), 3, _root(3)), (0, EMPTY_ROOT, 0, _root(1))):
        with pytest.raises(ProofInvalid, match="without leaves"):
            verify_consistency(old, old_root, new, new_root, [])


def test_a_proof_without_hashes_does_not_stand_in_for_one() -> None:
    with pytest.raises(ProofInvalid, match="it must have 3"):
        verify_consistency(3, _root(3), 4, _root(4), [])


def test_a_range_without_leaves_proves_nothing() -> None:
    with pytest.raises(ProofInvalid, match="not one leaf"):
        verify_range([], 0, 8, [_root(8)], _root(8))


def test_two_roots_of_one_size_are_a_fork() -> None:
    with pytest.raises(ProofInvalid, match="two trees of 5 leaves"):
        verify_consistency(5, _root(5), 5, _root(6), [])


@pytest.mark.parametrize(
    ("level", "index", "width", "path"),
    [
        (0, 0, 256, "tile/0/000"),
        (0, 1234, 256, "tile/0/x001/234"),
        (1, 1234067, 256, "tile/1/x001/x234/067"),
        (63, 999, 255, "tile/63/999.p/255"),
        (0, 1000, 1, "tile/0/x001/000.p/1"),
        ("entries", 273, 112, "tile/entries/273.p/112"),
    ],
)
def test_tiles_lie_where_tlog_tiles_says(level: int | str, index: int, width: int, path: str) -> None:
    assert tile_path("entries" if isinstance(level, str) else level, index, width) == path


def test_there_is_no_path_for_what_is_no_tile() -> None:
    for level, index, width in ((-1, 0, 256), (64, 0, 256), (0, -1, 256), (0, 0, 0), (0, 0, 257)):
        with pytest.raises(ValueError, match=r"a tile|an index"):
            tile_path(level, index, width)
    with pytest.raises(ValueError, match="not negative"):
        index_path(-1)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 513, 1000])
def test_tiles_give_the_hashes_of_the_tree(size: int) -> None:
    memory = _Memory([leaf_hash(b"%d" % index) for index in range(size)])
    hashes = TileHashes(_Tiles(memory), size)
    for level in range(size.bit_length()):
        for index in range(size >> level):
            assert hashes.hash_at(level, index) == memory.hash_at(level, index)


def test_a_tree_of_70000_leaves_has_the_tiles_of_the_specification() -> None:
    tiles = _Tiles(_Uniform())
    hashes = TileHashes(tiles, 70_000)
    for level, index in ((0, 69_999), (0, 0), (8, 272), (8, 255), (16, 0)):
        hashes.hash_at(level, index)
    assert tiles.read == ["tile/0/273.p/112", "tile/0/000", "tile/1/001.p/17", "tile/1/000", "tile/2/000.p/1"]


@pytest.mark.parametrize("size", [256, 257, 65_535, 65_536, 65_536 + 3, 2 * 65_536 + 256 + 1])
def test_proofs_hold_across_the_edges_of_tiles(size: int) -> None:
    marked = sorted({leaf for leaf in (0, 255, 256, 65_534, 65_535, 65_536, 65_538, size - 1) if leaf < size})
    leaves, plain = _Uniform(*marked), TileHashes(_Tiles(_Uniform(*marked)), size, cached_tiles=4)
    root = root_of(plain, size)
    assert root == root_of(leaves, size)
    for leaf in marked:
        verify_inclusion(leaves.hash_at(0, leaf), leaf, size, inclusion_proof(plain, leaf, size), root)
        verify_consistency(leaf, root_of(leaves, leaf), size, root, consistency_proof(plain, leaf, size))
        end = min(leaf + 3, size)
        proof = range_proof(plain, leaf, end, size)
        verify_range((leaves.hash_at(0, at) for at in range(leaf, end)), leaf, size, proof, root)
        with pytest.raises(ProofInvalid):
            verify_inclusion(leaf_hash(b"alike"), leaf, size, inclusion_proof(plain, leaf, size), root)


def test_the_cache_of_tiles_is_bounded_and_keeps_what_was_used_last() -> None:
    tiles = _Tiles(_Uniform())
    hashes = TileHashes(tiles, 256 * 10, cached_tiles=2)
    for tile in (0, 1, 0, 2, 0, 1):
        hashes.hash_at(0, 256 * tile)
    assert tiles.read == ["tile/0/000", "tile/0/001", "tile/0/002", "tile/0/001"]


@pytest.mark.parametrize(("level", "index"), [(0, 300), (0, -1), (-1, 0), (8, 1), (9, 0), (3, 37), (64, 0)])
def test_a_node_that_is_not_complete_has_no_hash(level: int, index: int) -> None:
    with pytest.raises(OutsideTree):
        TileHashes(_Tiles(_Uniform()), 300).hash_at(level, index)


@pytest.mark.parametrize("length", [0, 44 * 32 - 1, 44 * 32 + 1, 256 * 32])
def test_a_tile_of_another_length_is_named(length: int) -> None:
    with pytest.raises(TileInvalid, match=r"tile/0/001\.p/44 is damaged"):
        TileHashes(lambda *_: bytes(length), 300).hash_at(0, 299)


def test_a_proof_in_80_million_entries_has_at_most_3_kb() -> None:
    size = 80_000_000
    for leaf in (0, 1, 12_345_678, 67_108_863, 67_108_864, size - 1):
        leaves = _Uniform(leaf)
        root = root_of(leaves, size)
        for proof in (inclusion_proof(leaves, leaf, size), consistency_proof(leaves, leaf, size)):
            assert sum(map(len, proof)) <= 3_000
        verify_inclusion(leaves.hash_at(0, leaf), leaf, size, inclusion_proof(leaves, leaf, size), root)
        verify_consistency(leaf, root_of(leaves, leaf), size, root, consistency_proof(leaves, leaf, size))


def test_a_proof_in_the_largest_tree_is_made_and_verified() -> None:
    leaves = _Uniform(MAX_SIZE // 3)
    root = root_of(leaves, MAX_SIZE)
    index = MAX_SIZE // 3
    verify_inclusion(leaves.hash_at(0, index), index, MAX_SIZE, inclusion_proof(leaves, index, MAX_SIZE), root)


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(ProofInvalid) as caught:
        verify_inclusion(_LEAVES[3], 3, 8, [], _root(8))
    assert caught.value.cause == "it has 0 hashes, and for these sizes it must have 3"
    assert "again" in caught.value.remedy
