"""A queue of bounded length in which every client has its turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFull(Exception):
    pass


class FairQueue(Generic[Item]):
    """First in, first out for each client; clients take turns. One that sends a hundred delays another by one."""

    def __init__(self, size: int) -> None:
        self._size, self._length = size, 0
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return self._length

    def put(self, client: str, item: Item) -> None:
        """Raises: QueueFull."""
        if self._length >= self._size:
            raise QueueFull
        self._waiting.setdefault(client, deque()).append(item)
        self._length += 1
        self._arrived.set()

    async def get(self) -> Item:
        while not self._length:
            self._arrived.clear()
            await self._arrived.wait()
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        self._length -= 1
        if items:
            self._waiting[client] = items  # to the end of the line of clients
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out that has not had its turn; whether it was there."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        self._length -= 1
        if not items:
            del self._waiting[client]
        return True

    def drain(self) -> list[Item]:
        """Everything that waits, taken out."""
        items = [item for waiting in self._waiting.values() for item in waiting]
        self._waiting.clear()
        self._length = 0
        return items
