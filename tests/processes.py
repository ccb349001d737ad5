"""Several processes that a test starts at once, and that end in one way only."""

import atexit
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

import pytest
import torch
import torch.multiprocessing as mp


def _call(rank: int, function: Callable, arguments: tuple, timeout: float, everyone: Barrier) -> None:
    torch.set_num_threads(1)
    code = 1
    try:
        function(rank, *arguments)
        # One that left earlier would close connections from which another may still read.
        everyone.wait(timeout)
        code = 0
    finally:
        # Threads of gloo may still have to free tensors, for which they need the interpreter. One that asks for it
        # while the interpreter finishes can abort the process although all is done (pytorch/pytorch#190489). So the
        # process leaves just before that; by then an exception has been written for the parent.
        atexit.register(os._exit, code)


def run_processes(function: Callable, *arguments, num_processes: int = 2, timeout: float = 300) -> None:
    """Calls `function(rank, *arguments)` in several new processes, and returns when all are done.

    The function leaves a group that it has joined as it is: destroying it may hang, and the processes end without.
    The first exception in a process is raised here with its traceback; after `timeout` seconds the test fails.
    """
    deadline = time.monotonic() + timeout
    everyone = multiprocessing.get_context("spawn").Barrier(num_processes)
    context = mp.spawn(
        _call, args=(function, arguments, timeout, everyone), nprocs=num_processes, join=False, daemon=True
    )
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"The processes were not done after {timeout} s.")
