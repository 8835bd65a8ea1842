"""How processes agree, in two and three of them."""

import pytest

from tests.train.distributed.conftest import Ended, answers


@pytest.fixture
def call(server, tmp_path):
    def start(function: str, processes: int = 2, *, environment: dict | None = None, **arguments) -> list[Ended]:
        job = {"call": function, "arguments": arguments, "environment": environment or {}}
        return answers(server, [job] * processes, tmp_path / "logs", 60.0)

    return start


@pytest.mark.parametrize("machines", [1, 2])
def test_ways_to_agree(call, tmp_path, machines):
    (tmp_path / "notes").mkdir()
    environment = {"LOCAL_RANK": "0"} if machines == 2 else {}
    ended = call("agree", environment=environment, folder=str(tmp_path / "notes"), machines=machines)
    first, second = (one.result for one in ended)
    assert first and second, ended[0].log + ended[1].log
    assert first["world"] == [0, 2, 0, True, "cpu"]
    assert second["world"] == [1, 2, 1 if machines == 1 else 0, False, "cpu"]
    assert first["again"] and second["again"]
    assert (first["slots"], second["slots"]) == ([0, 1, 2], [3, 4, 5])
    assert (first["micro_batches"], second["micro_batches"]) == ([[0, 1], [2]], [[3, 4], [5]])
    assert first["everywhere"] == second["everywhere"] == [{"rank": 0}, {"rank": 1}]
    assert first["on_main"] == second["on_main"] == 0
    at_fault = [f"FileNotFoundError: nothing for {who}" for who in (0, 1)]
    told = [f"PeerError: rank {who}: FileNotFoundError: nothing for {who}" for who in (0, 1)]
    assert first["errors"] == [at_fault[0], told[1], at_fault[0], "nothing", at_fault[0], told[1]]
    assert second["errors"] == [told[0], at_fault[1], told[0], "nothing", told[0], at_fault[1]]
    # On one machine the second waits for the first.
    wanted = ([], ["0"]) if machines == 1 else (["1"], [])
    assert (first["on_each_machine"], second["on_each_machine"]) == wanted
    assert first["mean"] == second["mean"] == [1.5, pytest.approx(1e-9, rel=1e-6)]
    assert first["smallest"] == second["smallest"] == [4, 3]


def test_a_vote_is_heard_one_step_later_by_all(call):
    ended = call("vote", 3, ballots=[[0, 0, 0, 0, 1], [0, 2, 0, 0, 0], [0, 1, 0, 3, 0]])
    assert [one.result for one in ended] == [[0, 0, 2, 0, 3, 1, 0]] * 3, ended[0].log


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_ends_is_noticed(call, who):
    ended = call("lose", who=who)
    assert ended[who].code == 3
    assert ended[1 - who].result.startswith("LostPeerError: lost contact with another process, which has ended")
    assert ended[1 - who].seconds - ended[who].seconds < 30


def test_nobody_there(call):
    """A process that waits for others who never come is told where it looked for them."""
    (alone,) = call(
        "meet", 1, environment={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    )
    assert alone.result.startswith("LostPeerError: cannot connect the processes at 127.0.0.1:"), alone.log
