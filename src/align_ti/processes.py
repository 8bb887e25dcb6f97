"""The processes of one launch, and how they part. Imports torch only when there is something to part from."""

from __future__ import annotations

import sys


def part_in_order() -> None:
    """Waits for the other processes of the launch, and leaves their group; nothing where there is only one process.

    A process that ends while the threads of its group still run is aborted by the C++ runtime ("terminate called without an active
    exception", seen with gloo), and the launcher then reports a run that failed after it was finished. So the command line, and a
    script of one's own, calls this at the end, after a success: after an error the others may never arrive.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
