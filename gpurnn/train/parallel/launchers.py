"""Which of how many processes this is, from what launchers put into the environment. Nothing is started here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import one_line

# launcher -> its variables of rank, size, rank on this machine, ranks on this machine
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}  # fmt: skip


joined: list[Any] = []  # the groups that this process has joined


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were started together.

    launcher: a name of ``LAUNCHERS``, or "" for a process on its own. rank, size: of all. local_rank, local_size: of
    those on this machine.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def words_of(place: Place) -> list[str]:
    """What begins a command line that starts as many processes in the same way; nothing for a process on its own."""
    words = {"": [], "Slurm": ["srun", "-n", str(place.size)], "torchrun": ["torchrun", "...", "--no-python"]}
    return words.get(place.launcher, ["mpirun", "-n", str(place.size)]) if place.size > 1 else []


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The ``Place`` that the environment says, of the first launcher whose rank and size are both there.

    Slurm's variables are also there in the shell of an allocation, which starts no ranks: they count inside a step
    alone. Raises ValueError for numbers that make no sense.
    """
    for launcher, names in LAUNCHERS.items():
        if not all(environment.get(name) for name in names[:2]):
            continue
        if launcher == "Slurm" and "SLURM_STEP_ID" not in environment:
            continue
        rank, size = (_number(environment, name) for name in names[:2])
        local_rank = _number(environment, names[2]) if environment.get(names[2]) else 0
        local_size = _number(environment, names[3]) if environment.get(names[3], "").isdigit() else 1
        if not 0 <= rank < size:
            raise ValueError(f"{names[0]} should be below {names[1]}, got {rank} and {size}")
        return Place(launcher, rank, size, local_rank, max(1, local_size))
    return Place()


def _number(environment, name):
    text = environment[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{name} should be a whole number, got {one_line(repr(text), 60)}")
    return int(text)
