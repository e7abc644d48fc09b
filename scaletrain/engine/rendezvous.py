"""Meeting the other processes over a store that may hold what earlier attempts of the same job left in it.

torchrun's agents keep one store through all restarts of their workers. What a worker of an earlier attempt wrote there,
such as its address, may be read for that of the worker in its place, which then waits for one that is dead (PyTorch
issue 135712). TORCHELASTIC_RESTART_COUNT does not tell attempts apart, since each agent counts for itself.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import torch.distributed as dist

_PAUSE = 0.02


def fresh(store: Any, rank: int, size: int, seconds: float = 1800.0) -> Any:
    """Return a part of the store that no earlier attempt has written to, the same on all ranks.

    Each rank leaves a token of its own; rank 0 gives a name to the set of tokens that it sees, and a new one when it
    sees others, until every rank has found its own token in the set. Raises TimeoutError when they do not meet.
    """
    own, name, seen = uuid.uuid4().hex, "", [""]
    store.set(f"token/{rank}", own)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if rank == 0:
            if not store.check([f"token/{r}" for r in range(size)]):  # asking for what is not there waits in the store
                time.sleep(_PAUSE)
                continue
            tokens = [token.decode() for token in store.multi_get([f"token/{r}" for r in range(size)])]
            if tokens != seen:
                name, seen = uuid.uuid4().hex, tokens
                store.set("named", json.dumps([name, tokens]))
            if store.check([f"{name}/{token}" for token in tokens[1:]]):
                store.set(f"{name}/all", "")
                return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        elif store.check(["named"]):
            name, tokens = json.loads(store.get("named"))
            if own in tokens:
                store.set(f"{name}/{own}", "")
                if store.check([f"{name}/all"]):
                    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        time.sleep(_PAUSE)
    raise TimeoutError(f"rank {rank} has not met the {size - 1} others in {seconds:.0f} seconds.")
