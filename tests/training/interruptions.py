"""Processes to interrupt: forked from one that has imported everything and computed nothing, so they start at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist


TIMEOUT = 120
"""Seconds after which a process is taken to hang."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.training.interruptions", "diffusers_moviegen.training", "diffusers.training_utils"]
)


def _call(function: Callable, log: Path, arguments: tuple) -> None:
    # Line by line, since a process that is killed flushes nothing.
    sys.stdout, sys.stderr = log.open("a", buffering=1), log.with_suffix(".errors").open("a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    # What a process that a shell started would have; this one inherits the way it was started itself.
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)


def start(function: Callable, log: Path, *arguments) -> BaseProcess:
    """Calls a function of a module in a process of its own.

    Its output is appended to `log`, and its errors to a file beside it.
    """
    process = CONTEXT.Process(target=_call, args=(function, log, arguments))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """The exit code of a process: negative numbers are signals."""
    process.join(TIMEOUT)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
        process.join()
    assert not hangs, f"the process was not done after {TIMEOUT} s."
    return process.exitcode


def join_group(rank: int, num_processes: int, rendezvous: Path) -> None:
    """Makes this process one of several on the CPU, as the launcher would."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ.update({name: str(value) for name, value in places.items()}, ACCELERATE_USE_CPU="true")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
