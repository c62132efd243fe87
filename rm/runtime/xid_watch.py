"""Hears what NVIDIA's driver reports as errors (Xid events) of the GPUs that a runner has, while it has them.

The driver keeps no list of past events: whoever does not listen when one comes never learns of it.
"""

from __future__ import annotations

import logging
from collections import deque
from threading import Event, Thread
from typing import Any

from rm.core.gpu_errors import Xid
from rm.runtime import gpu_probe

log = logging.getLogger("rm.runner")

WAIT_MS = 60_000
MOST_KEPT = 100


class XidWatch:
    """`gpu_ids`: as Ray and CUDA_VISIBLE_DEVICES have them, numbers or UUIDs. Silent where there is no NVML."""

    def __init__(self, gpu_ids: tuple[str, ...]) -> None:
        self._gpu_ids = gpu_ids
        self._heard: deque[Xid] = deque(maxlen=MOST_KEPT)
        self._news = Event()
        self._thread: Thread | None = None
        if gpu_ids and gpu_probe.can_look():
            import pynvml

            self.listen(pynvml)

    def listen(self, nvml: Any) -> None:
        """Begin. `nvml`: the module `pynvml`, or what looks like it."""
        # A daemon: it sleeps inside the driver's library, and ends with the process.
        self._thread = Thread(target=self._run, args=(nvml,), name="rm-xids", daemon=True)
        self._thread.start()

    def take(self, patience_s: float = 0.0) -> tuple[Xid, ...]:
        """What was heard since the last call, each once. Blocks for up to `patience_s` until there is something."""
        if self._thread is not None and self._thread.is_alive():
            self._news.wait(patience_s)
        self._news.clear()
        heard: dict[Xid, None] = {}
        while self._heard:
            heard[self._heard.popleft()] = None
        return tuple(heard)

    def _run(self, nvml: Any) -> None:
        try:
            nvml.nvmlInit()
            events = nvml.nvmlEventSetCreate()
            names = {}
            for gpu_id in self._gpu_ids:
                device = gpu_probe.device(nvml, gpu_id)
                nvml.nvmlDeviceRegisterEvents(device, nvml.nvmlEventTypeXidCriticalError, events)
                names[nvml.nvmlDeviceGetIndex(device)] = gpu_id
        except nvml.NVMLError as error:
            log.info("the errors of GPUs %s can't be watched: %s", ", ".join(self._gpu_ids), error)
            return
        while True:
            try:
                event = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
                index = nvml.nvmlDeviceGetIndex(event.device)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) == nvml.NVML_ERROR_TIMEOUT:
                    continue
                log.warning(
                    "the errors of GPUs %s are no longer watched: %s", ", ".join(self._gpu_ids), error
                )
                return
            self._heard.append(Xid(names.get(index, str(index)), int(event.eventData)))
            self._news.set()
