"""One message for a failure of many ranks. Under torchrun every rank's stderr is the user's terminal.

A mistake in the configuration fails every rank with the same text. A file missing on one node fails one rank alone, and the
ranks that wait for it then fail because it has exited. Ranks therefore coordinate through a store outside the process group
(torchrun's agent hosts one, which outlives them): each distinct text is printed once, with its rank unless all ranks have the
same, and ranks that only lost their connection to another print nothing.

torchrun adds a summary of its own when a process fails; it cannot be turned off from here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from datetime import timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_TOGETHER_SECONDS = 2.0
"""How long the first rank waits for others with the same message."""
_PRINTED_SECONDS = 5.0
"""How long the other ranks wait for the first one to print: torchrun kills it as soon as one of them has exited."""
_CONNECT_SECONDS = 5.0
_ANNOUNCED = "announced"
_NOTICED = "noticed"
_PRINTED = "printed"
_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Socket Timeout|gloo/transport|NCCL|rank \d+ failed|Failed to recv",
    re.IGNORECASE,
)


def report(message: str) -> None:
    """Print a user error on stderr, once for all ranks that have it.

    Args:
        message: the text after "error: ".
    """
    rank, ranks = _rank_and_world_size()
    if ranks == 1:
        print(f"error: {message}", file=sys.stderr)
        return
    store = _connect()
    if store is None:
        _print_alone(message, rank, ranks)
        return
    try:
        _report_together(message, rank, ranks, store)
    except RuntimeError:  # the process that hosts the store has exited
        _print_alone(message, rank, ranks)


def is_consequence(error: Exception) -> bool:
    """Whether an error only says that another rank failed, and that rank has printed or will print why.

    Waits a few seconds for the other rank's announcement. If the error originates on this rank, it is announced here, so that
    the other ranks stay quiet about its consequences.
    """
    _, ranks = _rank_and_world_size()
    if ranks == 1:
        return False
    store = _connect()
    if store is None:
        return False
    try:
        if not isinstance(error, RuntimeError) or not _CONSEQUENCE.search(str(error)):
            store.add(_ANNOUNCED, 1)
            store.add(_PRINTED, 1)  # Python prints the traceback; no rank has to wait for it
            return False
        if not _wait_for(store, _ANNOUNCED, _PRINTED_SECONDS):
            return False
        store.add(_NOTICED, 1)
        _wait_for(store, _PRINTED, _PRINTED_SECONDS)
        return True
    except RuntimeError:  # the failed rank hosted the store
        return True


def is_main_process() -> bool:
    """Whether this process is the one that prints, by the environment alone: no process group is needed."""
    return _rank_and_world_size()[0] == 0


_SAYS_NOTHING = {
    "sentence_transformers.base.model": "Default prompt name is set to",  # that of every export of ours
    "DeepSpeed": "Setting accelerator to CPU",  # also where another library imports it, in runs without ZeRO
}
"""By logger the beginning of a message that a user can do nothing with."""


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SAYS_NOTHING[record.name])


def quieten_libraries() -> None:
    """Leave out what libraries log that says nothing; on every rank but the first also their progress bars and warnings.

    Call it before importing them.
    """
    for name in _SAYS_NOTHING:
        logging.getLogger(name).addFilter(_says_something)
    if is_main_process():
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


def _rank_and_world_size() -> tuple[int, int]:
    # from the environment: a configuration error is reported before torch is imported
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _print_alone(message: str, rank: int, ranks: int) -> None:
    print(f"error on rank {rank} of {ranks}: {message}", file=sys.stderr, flush=True)


def _report_together(message: str, rank: int, ranks: int, store: Store) -> None:
    store.add(_ANNOUNCED, 1)
    same = blake2b(message.encode(), digest_size=8).hexdigest()
    if store.add(same, 1) > 1:
        _wait_for(store, _PRINTED, _PRINTED_SECONDS)
        return
    deadline = time.monotonic() + _TOGETHER_SECONDS
    while store.add(same, 0) + store.add(_NOTICED, 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.05)
    if store.add(same, 0) == ranks:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        _print_alone(message, rank, ranks)
    store.add(_PRINTED, 1)
    if rank == 0 and not _agent_keeps_store():
        time.sleep(0.5)  # this process hosts the store: let the others read first that they need not print


def _wait_for(store: Store, key: str, seconds: float) -> bool:
    """Whether a counter became positive within `seconds`."""
    deadline = time.monotonic() + seconds
    while not store.add(key, 0):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect() -> Store | None:
    """A new connection to the store of this (re)start of the run; None if there is no store."""
    from torch import distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    prefix = f"unified_lm/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    timeout = timedelta(seconds=_CONNECT_SECONDS)
    hosts_store = _rank_and_world_size()[0] == 0 and not _agent_keeps_store() and not dist.is_initialized()
    try:
        store = dist.TCPStore(address, int(port), is_master=hosts_store, timeout=timeout, wait_for_workers=False)
    except RuntimeError:  # also DistError: no answer, or the port is taken
        return None
    return dist.PrefixStore(prefix, store)
