"""What becomes of a job, over the table of docs/slurm.md."""

import itertools

import pytest

from launch.task import judge
from launch.verdict import Ended, Ending, decide, ending_of


@pytest.mark.parametrize(
    ("ended", "action", "exit_code", "is_failure"),
    [
        (Ended(0, is_done=True), "done", 0, False),
        (Ended(139, is_done=True), "done", 0, False),  # a library that crashes while it leaves
        (Ended(0), "requeue", 70, True),  # ranks that leave early have not finished the stage
        (Ended(2), "stop", 2, True),
        (Ended(65), "stop", 65, True),
        (Ended(75), "requeue", 75, False),
        (Ended(75, must_save=True), "requeue", 75, False),
        (Ended(137, must_save=True), "requeue", 75, False),  # KILL came before the save
        (Ended(70), "requeue", 70, True),
        (Ended(137), "requeue", 137, True),
        (Ended(75, ending="cancelled"), "leave", 75, False),
        (Ended(143, ending="cancelled", must_save=True), "leave", 75, False),
        (Ended(75, ending="time limit"), "requeue", 75, False),
        (Ended(137, ending="time limit"), "requeue", 75, False),
        (Ended(75, ending="requeued"), "leave", 75, False),
        (Ended(75, is_stopped=True), "stop", 75, False),
        (Ended(0, is_done=True, is_stopped=True), "done", 0, False),
        (Ended(2, problem="bad nodes: n1"), "requeue", 2, True),
        (Ended(137, problem="hang, rank 1"), "requeue", 137, True),
        (Ended(75, has_progress=False), "requeue", 75, True),
        (Ended(137, ending="time limit", has_progress=False), "requeue", 137, True),
        (Ended(70, ending="preemption", has_progress=False), "requeue", 75, False),
        (Ended(2, ending="preemption"), "stop", 2, True),
        (Ended(75, ending="requeued", has_progress=False), "leave", 75, False),
    ],
)
def test_the_table(ended: Ended, action: str, exit_code: int, is_failure: bool) -> None:
    verdict = decide(ended, num_failures=0, max_failures=3)
    assert (verdict.action, verdict.exit_code, verdict.is_failure) == (
        action,
        exit_code,
        is_failure,
    )
    assert verdict.reason


def test_failures_without_progress_are_capped_with_the_reason() -> None:
    ended = Ended(137)
    actions = [decide(ended, failures, 3).action for failures in range(4)]
    assert actions == ["requeue", "requeue", "stop", "stop"]
    last = decide(ended, 2, 3)
    assert last.exit_code == 137
    assert "3 starts failed without a newer checkpoint" in last.reason
    assert "a rank was killed" in last.reason


def test_interruptions_that_made_progress_are_never_capped() -> None:
    assert decide(Ended(75), num_failures=99, max_failures=3).action == "requeue"
    preempted = Ended(75, ending="preemption", has_progress=False)
    assert decide(preempted, num_failures=99, max_failures=3).action == "requeue"


def test_a_time_limit_that_never_leaves_time_for_a_checkpoint_ends_the_job() -> None:
    fruitless = Ended(75, must_save=True, has_progress=False)
    assert [decide(fruitless, n, 3).action for n in range(3)] == ["requeue", "requeue", "stop"]
    assert "more time is needed (sbatch --time)" in decide(fruitless, 2, 3).reason


@pytest.mark.parametrize(
    ("job", "was_told", "ending"),
    [
        ({"JobState": "RUNNING", "Restarts": "1"}, False, ""),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "None"}, True, "cancelled"),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "None"}, False, "cancelled"),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "TimeLimit"}, True, "time limit"),
        ({"JobState": "COMPLETING", "Restarts": "2", "Reason": "None"}, True, "requeued"),
        ({"JobState": "PENDING", "Restarts": "2", "Reason": "BeginTime"}, True, "requeued"),
        # scancel --batch --signal=TERM: the job goes on
        ({"JobState": "RUNNING", "Restarts": "1", "Reason": "None"}, True, ""),
        # this start was cut off, and the next one runs
        ({"JobState": "RUNNING", "Restarts": "2", "Reason": "None"}, False, "requeued"),
        ({"JobState": "RUNNING", "Restarts": "1", "PreemptTime": "None"}, False, ""),
        (
            {"JobState": "RUNNING", "Restarts": "1", "PreemptTime": "2026-01-02T03:04:05"},
            False,
            "preemption",
        ),
        ({}, True, "cancelled"),  # a controller that lost its jobs ends those that it finds
    ],
)
def test_what_slurm_is_at_is_told_by_restarts_and_reason(
    job: dict[str, str], was_told: bool, ending: str
) -> None:
    assert ending_of(job, restart=1, was_told=was_told) == ending


def test_nothing_but_a_done_stage_ends_with_code_0() -> None:
    endings: tuple[Ending, ...] = ("", "cancelled", "time limit", "requeued")
    codes = (0, 2, 65, 70, 75, 137)
    for code, ending, *flags in itertools.product(codes, endings, *[(False, True)] * 2):
        ended = Ended(code, False, flags[0], ending, flags[1])
        verdict = decide(ended, 0, 3)
        assert verdict.exit_code != 0, ended
        assert verdict.action != "done", ended


@pytest.mark.parametrize(
    ("code", "ending", "restart", "action"),
    [
        (75, "time limit", 9, "requeue"),  # saved: goes on as often as it takes
        (143, "time limit", 0, "requeue"),  # one that goes on with what is missing
        (143, "time limit", 2, "stop"),  # one that never gets through
        (143, "", 0, "requeue"),  # preemption tells the steps first
        (75, "requeued", 0, "leave"),
        (143, "cancelled", 0, "leave"),
    ],
)
def test_what_becomes_of_other_commands(
    code: int, ending: Ending, restart: int, action: str
) -> None:
    assert judge(code, ending, restart).action == action
