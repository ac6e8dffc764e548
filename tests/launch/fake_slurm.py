"""Slurm's commands as programs in a folder: jobs are entries of a JSON file that tests change."""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAM = f"""#!{sys.executable} -IS
import getpass, json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
path = os.path.join(folder, "jobs.json")
with open(path) as file:
    jobs = json.load(file)
with open(os.path.join(folder, "calls.jsonl"), "a") as file:
    site = {{k: v for k, v in os.environ.items() if k.startswith("SBATCH_")}}
    file.write(json.dumps({{"words": [name, *words], "site": site}}) + "\\n")
options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))

if name == "sbatch":
    if os.path.exists(os.path.join(folder, "refuse")):
        sys.exit("sbatch: error: Batch job submission failed: Invalid account")
    number = str(1 + max(map(int, jobs), default=99))
    if not os.path.exists(os.path.join(folder, "forget")):
        state = {{"JobState": "PENDING", "Reason": "Dependency", "ExitCode": "0:0"}}
        user = f"{{getpass.getuser()}}(0)"
        jobs[number] = {{"JobName": options["job-name"], "UserId": user, **state}}
    print(number)
elif name == "squeue":
    wanted = words[words.index("-n") + 1]
    for number, job in jobs.items():
        if job["JobName"] == wanted and job["JobState"] in ("PENDING", "RUNNING"):
            print(job.get("ArrayJobId", number))
elif name == "scontrol":
    tasks = [j for n, j in jobs.items() if words[-1] in (n, j.get("ArrayJobId"))]
    if not tasks:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    for task in tasks:
        print("JobId=%s %s" % (words[-1], " ".join(f"{{k}}={{v}}" for k, v in task.items())))
elif name == "scancel" and "signal" not in options:
    jobs[words[-1]]["JobState"] = "CANCELLED"
with open(path, "w") as file:
    json.dump(jobs, file)
"""


class FakeSlurm:
    """The programs in PATH and their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.jobs: dict[str, dict[str, str]] = {}
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
        (folder / "jobs.json").write_text("{}")

    @property
    def path(self) -> str:
        """PATH with the programs first."""
        return f"{self.folder}:{os.environ['PATH']}"

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of every call of a program so far."""
        return [call["words"][1:] for call in self._calls() if call["words"][0] == name]

    def site_of_calls(self) -> list[dict[str, str]]:
        """Return the SBATCH_ variables that each sbatch saw."""
        return [call["site"] for call in self._calls() if call["words"][0] == "sbatch"]

    def _calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def read(self) -> dict[str, dict[str, str]]:
        """Return job id -> what `scontrol show job` says."""
        return json.loads((self.folder / "jobs.json").read_text())

    def set(self, job_id: str, **changes: str) -> None:
        """Change or add a job."""
        jobs = self.read()
        jobs[job_id] = jobs.get(job_id, {}) | changes
        (self.folder / "jobs.json").write_text(json.dumps(jobs))

    def switch(self, name: str) -> None:
        """Let sbatch `refuse` every job, or `forget` it."""
        (self.folder / name).touch()
