"""A set of small integers as a bitmask that stays O(1) at a million members."""

from __future__ import annotations

from collections.abc import Iterator

WORD_BITS = 64
_SHIFT = 6
_LOW = WORD_BITS - 1


class BitMask:
    """The free members of `range(size)`, lowest first; 1 = free.

    One Python integer of a million bits would make every operation O(n), so the mask is a 64-ary
    tree: bit `b` of summary word `w` says that word `64 * w + b` of the level below is not zero.

        level 1 (summary)            [ ...0101 ]            bit b set  <=>  words[0][b] != 0
        level 0 (members)   [ 1100 ] [ 0000 ] [ 0010 ]      bit b of word w  <=>  member 64 * w + b
        is free

    `_lowest` is the first member word that may hold a free bit, so the tree is climbed only when a
    word runs empty. Owns the bits; does not own what a member stands for.
    """

    __slots__ = ("_count", "_levels", "_lowest", "size")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"{size = }, expected at least 1")
        self.size = size
        self._count = size
        self._lowest = 0
        self._levels: list[list[int]] = []
        bits = size
        while True:
            full, rest = divmod(bits, WORD_BITS)
            words = [(1 << WORD_BITS) - 1] * full + ([(1 << rest) - 1] if rest else [])
            self._levels.append(words)
            if len(words) == 1:
                break
            bits = len(words)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.size and bool(
            self._levels[0][index >> _SHIFT] >> (index & _LOW) & 1
        )

    def __iter__(self) -> Iterator[int]:
        for w, word in enumerate(self._levels[0]):
            while word:
                lsb = word & -word
                yield (w << _SHIFT) + lsb.bit_length() - 1
                word ^= lsb

    def take(self) -> int:
        """Remove and return the lowest member, or -1 when there is none."""
        if not self._count:
            return -1
        words = self._levels[0]
        w = self._lowest
        word = words[w]
        if not word:
            w = self._lowest = self._first_word()
            word = words[w]
        lsb = word & -word
        words[w] = word ^ lsb
        self._count -= 1
        if word == lsb:
            self._clear_summaries(w)
        return (w << _SHIFT) + lsb.bit_length() - 1

    def put(self, index: int) -> None:
        """Return `index` to the set. Raises ValueError if it is there already or out of range."""
        if not 0 <= index < self.size:
            raise ValueError(f"{index = }, expected 0 <= index < {self.size}")
        w = index >> _SHIFT
        bit = 1 << (index & _LOW)
        word = self._levels[0][w]
        if word & bit:
            raise ValueError(f"{index = } is free already")
        self._levels[0][w] = word | bit
        self._count += 1
        if w < self._lowest:
            self._lowest = w
        if not word:
            self._set_summaries(w)

    def to_int(self) -> int:
        """The whole mask as one integer, for pictures and tests (O(size))."""
        mask = 0
        for w, word in enumerate(self._levels[0]):
            mask |= word << (w << _SHIFT)
        return mask

    def _first_word(self) -> int:
        w = 0
        for words in reversed(self._levels[1:]):
            word = words[w]
            w = (w << _SHIFT) + (word & -word).bit_length() - 1
        return w

    def _clear_summaries(self, w: int) -> None:
        for words in self._levels[1:]:
            words[w >> _SHIFT] &= ~(1 << (w & _LOW))
            w >>= _SHIFT
            if words[w]:
                return

    def _set_summaries(self, w: int) -> None:
        for words in self._levels[1:]:
            before = words[w >> _SHIFT]
            words[w >> _SHIFT] = before | 1 << (w & _LOW)
            w >>= _SHIFT
            if before:
                return
