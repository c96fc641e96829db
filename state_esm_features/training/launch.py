"""By what the processes of one training know each other, and their number among them.

Starting and ending them stands in `processes`.
"""

from __future__ import annotations

import os

LAUNCH = "TRAIN_WITH_ESM_LAUNCH"
"""Environment variable by which the processes of one training know each other."""


def rank() -> int:
    """Number of this process among those that train together, where Lightning looks for it."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def launch_id() -> str | None:
    """What the processes of one training share: ours, srun's or torchrun's."""
    for names in (
        (LAUNCH,),
        ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"),
    ):
        if os.environ.get(names[0]):
            return ".".join(os.environ.get(name, "") for name in names)
    return None
