"""Which process of how many this is, from the variables of launchers."""

import pytest

from gpurnn.train import parallel
from gpurnn.train.parallel import Place, find_place


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
         Place("torchrun", 3, 8, 1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
         Place("MPICH", 1, 2, 1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, Place("Open MPI", 0, 4, 0, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1",
          "SLURM_NTASKS_PER_NODE": "2"}, Place("Slurm", 5, 6, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, Place()),  # the shell of an allocation
        ({"RANK": "3"}, Place()),
    ],
)  # fmt: skip
def test_the_place_of_a_process(variables, place):
    assert find_place(variables) == place


@pytest.mark.parametrize("rank, size", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_numbers_that_make_no_sense_are_refused(rank, size):
    with pytest.raises(ValueError, match="RANK|WORLD_SIZE"):
        find_place({"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf"])
def test_a_limit_that_makes_no_sense_is_refused(text, monkeypatch):
    monkeypatch.setenv("GPURNN_GROUP_TIMEOUT", text)
    with pytest.raises(ValueError, match="GPURNN_GROUP_TIMEOUT should be seconds above 0"):
        parallel.init("mpi")


def test_a_process_on_its_own_has_a_group_of_one():
    with parallel.init() as group:
        assert (group.kind, group.size, group.is_first) == ("none", 1, True)
        assert group.first(lambda: 3) == 3 and group.add_numbers(1, 2) == [1, 2]
    with pytest.raises(ValueError, match="kind"):
        parallel.init("gloo")
