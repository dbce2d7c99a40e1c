"""What a figure was measured on; no names of hosts or people."""

import os
import platform
from pathlib import Path

import torch

WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides the rate of matrix products


def describe() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    flags = told.get("flags", "").split()
    return {
        "cpu": told.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [flag for flag in WIDE if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),  # near the number of cores, others work here too: measure again
    }
