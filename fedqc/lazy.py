"""Sequences whose items are made when they are asked for, so that there may be more than memory holds."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

Item_co = TypeVar("Item_co", covariant=True)


class Lazy(Sequence[Item_co]):
    """A sequence that makes an item each time it is asked for one; a slice of it is as lazy."""

    @abstractmethod
    def make(self, index: int) -> Item_co:
        """The item at an index from 0 on."""

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen[Item_co]": ...
    def __getitem__(self, index: int | slice) -> "Item_co | Chosen[Item_co]":
        if isinstance(index, slice):
            return Chosen(self, range(len(self))[index])
        return self.make(range(len(self))[index])


class Chosen(Lazy[Item_co]):
    """Some of a sequence's items.

    Args:
        items: All of them.
        indices: Which, in order.
    """

    def __init__(self, items: Sequence[Item_co], indices: Sequence[int]) -> None:
        self._items = items
        self._indices = tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def make(self, index: int) -> Item_co:
        """The item that was chosen as the index-th."""
        return self._items[self._indices[index]]


class Kept(Lazy[Item_co]):
    """The items of a sequence, which stay in memory once they were asked for, as long as there is room.

    Args:
        items: Makes them.
        size: Bytes of an item.
        room: Bytes of all that stay.
    """

    def __init__(self, items: Sequence[Item_co], size: Callable[[Item_co], int], room: int) -> None:
        self._items = items
        self._size = size
        self._free = room
        self._kept: dict[int, Item_co] = {}

    def __len__(self) -> int:
        return len(self._items)

    def make(self, index: int) -> Item_co:
        """The item, made anew only where it did not stay."""
        if index in self._kept:
            return self._kept[index]
        item = self._items[index]
        self._free -= self._size(item)
        if self._free >= 0:
            self._kept[index] = item
        return item
