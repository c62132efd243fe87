"""A client for the fault machine to kill: `python fault_client.py ADDRESS lease|attached NAME GPUS SECONDS [COMMAND…]`.

Prints "job ID" once the submission is acknowledged and "node ID", the node of Ray that it hangs on.
"""

from __future__ import annotations

import sys
import time

import ray

import rm


def main() -> None:
    address, kind, name, gpus, seconds, *command = sys.argv[1:]
    client = rm.connect(address, start=False)
    print("node", ray.get_runtime_context().get_node_id(), flush=True)
    if kind == "lease":
        lease = client.lease(name=name, num_gpus=int(gpus))
        print("job", lease.id, flush=True)
        with lease:
            time.sleep(float(seconds))
        return
    job = client.submit(command, name=name, num_gpus=int(gpus), attach=True, grace=1, max_infra_retries=1000)
    print("job", job.id, flush=True)
    job.wait()


if __name__ == "__main__":
    main()
