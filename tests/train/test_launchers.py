"""Which process of how many this is, from the variables of launchers."""

import subprocess
import sys

import pytest

from gpurnn.cli.followers import joins
from gpurnn.cli.root import main
from gpurnn.train import parallel
from gpurnn.train.parallel import Place, find_place, launchers


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


@pytest.mark.parametrize(
    "place, words",
    [
        (Place(), ""), (Place("MPICH", 0, 4), "mpirun -n 4"), (Place("Open MPI", 1, 2), "mpirun -n 2"),
        (Place("Slurm", 0, 8), "srun -n 8"), (Place("MPICH", 0, 1), ""),
    ],
)  # fmt: skip
def test_how_as_many_processes_are_started_again(place, words):
    assert " ".join(launchers.words_of(place)) == words


@pytest.mark.parametrize("rank, size", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_numbers_that_make_no_sense_are_refused(rank, size):
    with pytest.raises(ValueError, match="RANK|WORLD_SIZE"):
        find_place({"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf"])
def test_a_limit_that_makes_no_sense_is_refused(text, monkeypatch):
    monkeypatch.setenv("GPURNN_GROUP_TIMEOUT", text)
    with pytest.raises(ValueError, match="GPURNN_GROUP_TIMEOUT should be seconds above 0"):
        parallel.init("mpi")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("train text book.txt", True), ("--debug train text --group mpi", True), ("train text --group none", False),
        ("train text --group=none", False), ("sample runs/text-1", False), ("", False), ("--help", False),
        ("export train", False),
    ],
)  # fmt: skip
def test_which_commands_join_a_group(words, expected):
    assert joins(words.split()) == expected


def test_commands_that_join_no_group_say_their_own_errors(monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(parallel, "join", lambda *_: pytest.fail("asks the others"))
    with pytest.raises(SystemExit):
        main(["info", "no-such-folder"])
    assert "no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize("alone", [True, False])
def test_a_command_that_fails_asks_whether_all_do(alone, monkeypatch, capsys):
    asked, ended = [], []

    class Others(parallel.Group):
        rank, size = 1, 2

        def all_fail(self, seconds):
            return not alone

        def abort(self, code):
            ended.append(code)

    def join(kind, place, limit, patience, said):
        asked.append((kind, place.rank, said))
        launchers.joined.append(Others())
        return launchers.joined[0]

    monkeypatch.setattr(launchers, "joined", [])
    monkeypatch.setattr(parallel, "join", join)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["train", "text", "--hiden", "8"])
    assert asked[0][:2] == ("mpi", 1) and "process 1 of 2: " in asked[0][2] and "No such option" in asked[0][2]
    assert ended == [2] * alone and capsys.readouterr().err == asked[0][2] * alone


def test_a_process_that_waits_too_long_is_ended():
    program = (
        "import sys, time\nfrom gpurnn.train.parallel.deadline import ended_after\n"
        "with ended_after(60, 'never'): pass\n"
        "print('on', flush=True)\nwith ended_after(0.1, 'too long'): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode != 0 and (done.stdout.strip(), done.stderr) == ("on", "too long")


def test_a_process_on_its_own_has_a_group_of_one():
    with parallel.init() as group:
        assert (group.kind, group.size, group.is_first) == ("none", 1, True)
        assert group.first(lambda: 3) == 3 and group.add_numbers(1, 2) == [1, 2]
    with pytest.raises(ValueError, match="kind"):
        parallel.init("gloo")
