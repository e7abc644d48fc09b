from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from scaletrain.engine.rendezvous import fresh


def client(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))


def attempt(server: dist.TCPStore, size: int, late: int, name: str) -> list[list[str]]:
    """Have all ranks meet, each on a connection of its own, and leave an address. Returns what each reads, by rank."""
    read: list[list[str]] = [[] for _ in range(size)]

    def work(rank: int) -> None:
        time.sleep(0.2 * (rank == late))
        store = fresh(client(server), rank, size, seconds=20)
        store.set(f"address/{rank}", f"{name}-{rank}")
        read[rank] = [store.get(f"address/{r}").decode() for r in range(size)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return read


@pytest.mark.parametrize("late", [0, 1, 2])
def test_an_attempt_reads_nothing_of_those_before_whoever_is_late(late):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, size in (("a", 3), ("b", 3), ("c", 2), ("d", 3)):  # a rank may be gone for an attempt, and come back
        assert attempt(server, size, late, name) == [[f"{name}-{r}" for r in range(size)]] * size


def test_one_that_stays_away_is_told():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TimeoutError, match="rank 1 has not met the 2 others"):
        fresh(client(server), 1, 3, seconds=0.1)
