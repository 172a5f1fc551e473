"""Where a figure comes from: the processor, its cores, the GPU."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import torch

from data_tools.common import files


def machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if files.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
        processor = named[1] if named else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"processor": processor, "cores": os.cpu_count(), "gpu": gpu}
