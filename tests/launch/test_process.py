"""A command and all that it started end together, whatever ends the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.errors import EXIT_AGAIN, LaunchError
from launch import process
from launch.process import python, run

# A launcher with one rank: it writes both of their numbers and waits.
LAUNCHER = """
import os, signal, subprocess, sys, time
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)"
sleep = [sys.executable, "-c", DEAF + "; time.sleep(60)"] if {is_deaf} else ["sleep", "60"]
rank = subprocess.Popen(sleep, stdout=subprocess.PIPE)
if {is_deaf}:
    rank.stdout.readline()
with open({file!r} + ".tmp", "w") as file:
    file.write(str(os.getpid()) + " " + str(rank.pid))
os.rename({file!r} + ".tmp", {file!r})
{then}
"""
PARENT = """
import sys
from launch import process
process.GRACE_S = 1
process.run([sys.executable, "-c", sys.argv[1]])
"""


def launcher(file: Path, *, is_deaf: bool = False, then: str = "time.sleep(60)") -> str:
    return LAUNCHER.format(file=str(file), is_deaf=is_deaf, then=then)


def wait_for(file: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.02)
    return [int(number) for number in file.read_text().split()]


def is_alive(number: int) -> bool:
    """Return whether a process runs; one that is dead but not waited for does not."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def start_parent(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, code], cwd=process.ROOT, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_the_parent_ends_the_whole_group(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    parent = start_parent(launcher(tmp_path / "pids"))
    group = wait_for(tmp_path / "pids")
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=20)
    assert parent.returncode == 128 + number
    assert f"{name}: ending" in stderr and "type the command again to go on" in stderr
    assert not any(is_alive(pid) for pid in group)


def test_who_does_not_listen_is_killed_after_the_leader_has_gone(tmp_path: Path) -> None:
    parent = start_parent(launcher(tmp_path / "pids", is_deaf=True))
    leader, deaf = wait_for(tmp_path / "pids")
    parent.terminate()
    parent.communicate(timeout=20)
    assert parent.returncode == 128 + signal.SIGTERM
    assert not is_alive(leader) and not is_alive(deaf)


def test_ranks_whose_launcher_dies_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 1)
    code = launcher(tmp_path / "pids", is_deaf=True, then="os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(LaunchError, match="was ended by SIGKILL") as caught:
        run(python("-c", code))
    assert caught.value.exit_code == 70
    assert not any(is_alive(pid) for pid in wait_for(tmp_path / "pids"))


def test_ignored_signals_stay_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup` ignores HUP so that a closed terminal does not end the run."""
    before = {number: signal.getsignal(number) for number in process.ENDING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run(python("-c", f"import os, signal; os.kill({os.getpid()}, signal.SIGHUP)"))
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in process.ENDING} == before


def test_failures_say_what_to_do_next() -> None:
    with pytest.raises(LaunchError, match="exit.3.* ended with code 3. Read x.log; what is") as it:
        run(python("-c", "exit(3)"), advice="Read x.log")
    assert it.value.exit_code == 3
    with pytest.raises(LaunchError, match="code 2. Its own message stands above; what is done"):
        run(python("-c", "exit(2)"))
    with pytest.raises(LaunchError, match="has saved: type the command again to go on") as it:
        run(python("-c", f"exit({EXIT_AGAIN})"), advice="Read x.log")
    assert it.value.exit_code == EXIT_AGAIN


def test_a_command_that_succeeds_leaves_the_handlers_as_they_were(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in process.ENDING]
    run(python("-c", f"open({str(tmp_path / 'x')!r}, 'w')"))
    assert (tmp_path / "x").exists()
    assert [signal.getsignal(number) for number in process.ENDING] == before
