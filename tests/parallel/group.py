"""Groups of processes on this machine, as torchrun would start them: gloo, one thread each.

They are forked from a server that has imported everything once: importing takes longer than all the checks.
"""

import faulthandler
import json
import multiprocessing
import os
import socket

import torch
import torch.multiprocessing

PRELOADED = [
    "opensala",
    "opensala.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "tests.parallel.checkpoints",
    "tests.convert.ranks",
]


def _member(rank, world, port, function, args):
    faulthandler.enable()  # a process that crashes says where
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from opensala.parallel import close_parallel

    function(*args)
    close_parallel()


def run_group(world, function, *args):
    """Run function(*args) in `world` processes; the first exception of any of them is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(
        _member, (world, port, function, args), nprocs=world, start_method="forkserver"
    )


def report(folder, name, values):
    """Leave numbers for the test process; called by rank 0."""
    (folder / f"{name}.json").write_text(json.dumps(values))
