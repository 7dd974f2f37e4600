"""Long tasks in processes of their own, which outlive the terminal that began them.

A job is a folder: `job.json` (what was asked), `state.json` (process ids, written by the supervisor), `events.jsonl`
(progress), `made.json` (what it makes), `paused.json` (while it is stopped), `stdout`, `stderr`, and at the end
`exit.json`. Whether it runs is told by a lock that its processes hold and the kernel lets go of when they end, so
neither a reboot nor a process id that is used again can deceive a reader.
"""

from edgeft.jobs.events import Event, JobEvents, last_progress, parts, read_events
from edgeft.jobs.store import Job, State, find_job, jobs_dir, list_jobs, remove_job
from edgeft.jobs.work import cancel, finish, pause, resume, retry_command, start, wait

__all__ = [
    "Event",
    "Job",
    "JobEvents",
    "State",
    "cancel",
    "find_job",
    "finish",
    "jobs_dir",
    "last_progress",
    "list_jobs",
    "parts",
    "pause",
    "read_events",
    "remove_job",
    "resume",
    "retry_command",
    "start",
    "wait",
]
