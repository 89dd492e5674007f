"""A rank that is dead, frozen or stuck is named and ends the job; one that is only busy does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dpo.runtime import distributed, heartbeat
from dpo.runtime.heartbeat import Note, Watch
from dpo.runtime.status import read_status, write_status
from tests import ranks

AFAR = Note(host="far", pid=7, launcher="another", beat=1, doing="in step 5, micro-batch 1", in_step=True)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Of rank 0 over ranks 1 and 2 on other hosts, after its first step, at second 100; time-out 10 s."""
    monkeypatch.setattr(heartbeat, "_note", Note(count=4, in_step=True, doing="at the end of step 5"))
    monkeypatch.setattr(heartbeat, "_pace", heartbeat._Pace(since=100.0, longest=0.5, steps=1, in_step=True))
    made = Watch(store=None, rank=0, world_size=3, run=Path("run"), timeout=10, speaks=True)
    for rank in (1, 2):
        made.take(rank, replace(AFAR, count=4), 100.0)
    assert made.look(100.0) is None
    return made


def pass_time(watch: Watch, seconds: int, **notes: Note) -> tuple[str, list[int]] | None:
    """Let seconds pass with these notes of r1 and r2, their beats going on, one not given unchanged; the verdict."""
    for second in range(1, seconds + 1):
        now = 100.0 + second
        for rank, old in list(watch.notes.items()):
            note = notes.get(f"r{rank}")
            watch.take(rank, old if note is None else replace(note, beat=1 + second), now)
        if found := watch.look(now):
            return f"{second}: {found[0]}", found[1]
    return None


def test_a_rank_whose_note_does_not_change_is_silent_and_named_whatever_it_was_doing(watch):
    heartbeat._note.in_step = False
    watch.take(2, replace(AFAR, beat=2, in_step=False, doing="tokenising"), 100.0)
    verdict = pass_time(watch, 30, r1=AFAR)
    assert verdict == ("11: rank 2 on far (process 7, last known tokenising) gave no sign of life for 10 s", [2])


def test_ranks_that_beat_but_stand_still_within_a_step_are_stuck_and_the_one_behind_is_named(watch):
    watch.take(2, replace(AFAR, beat=2, count=3), 100.0)
    verdict = pass_time(watch, 30, r1=replace(AFAR, count=4), r2=replace(AFAR, count=3))
    named = "no rank gets on; furthest behind: rank 2 on far (process 7, last known in step 5, micro-batch 1)"
    assert verdict == (f"11: {named}", [2])


def test_a_step_may_take_ten_times_its_longest_pause(watch):
    heartbeat._pace.longest = 2.0
    verdict = pass_time(watch, 30, r1=replace(AFAR, count=4), r2=replace(AFAR, count=4))
    assert verdict is not None and verdict[0].startswith("21: ")


def test_nobody_is_stuck_while_a_rank_is_in_a_long_phase_or_gets_on(watch):
    still, busy = replace(AFAR, count=4), replace(AFAR, count=4, in_step=False)
    assert pass_time(watch, 30, r1=still, r2=busy) is None
    for second in range(31, 60):
        for rank in (1, 2):
            watch.take(rank, replace(AFAR, beat=second, count=4 + second // 9 * (rank == 2)), 100.0 + second)
        assert watch.look(100.0 + second) is None


def test_the_first_step_may_take_any_time(monkeypatch):
    monkeypatch.setattr(heartbeat, "_note", Note())
    monkeypatch.setattr(heartbeat, "_pace", heartbeat._Pace())
    seen = []
    for step in (1, 2):
        for place in ("micro-batch 1", "micro-batch 2"):
            heartbeat.at(f"in step {step}, {place}", in_step=True)
            seen.append(heartbeat._note.in_step)
        heartbeat.at(f"after step {step}")
        seen.append(heartbeat._note.in_step)
    assert seen == [False, False, False, True, True, False]
    assert heartbeat._note.count == 6 and heartbeat._pace.longest > 0
    heartbeat.at_first_step()  # of DPO, after SFT
    heartbeat.at("in step 1, micro-batch 1", in_step=True)
    assert not heartbeat._note.in_step and heartbeat._pace.longest == 0
    heartbeat.at("in step 1, micro-batch 2", in_step=True)
    heartbeat.at("after step 1")
    heartbeat.at("in step 2, micro-batch 1", in_step=True)
    assert heartbeat._note.in_step


def test_a_watcher_that_was_stopped_itself_gives_the_others_their_time_anew(watch):
    assert watch.look(1000.0) is None
    watch.take(1, replace(AFAR, beat=2), 1001.0)
    watch.take(2, replace(AFAR, beat=2, in_step=False), 1001.0)
    assert watch.look(1009.0) is None


def test_a_child_of_the_same_launcher_that_ended_is_dead_before_it_is_waited_for(watch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        watch.take(1, replace(Note(), pid=child.pid, host="here"), 100.0)
        assert watch.look(101.0) is None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert watch.look(102.0) == (f"rank 1 on here (process {child.pid}, last known preparing the run) died", [1])
    finally:
        child.kill()
        child.wait()
    assert watch.look(103.0) is not None  # nor when it is


def check_end(run: Path, says: str, printed: str) -> None:
    """The job failed after step 3, for a reason that names the rank and is printed too."""
    status = json.loads((run / "status.json").read_text())
    said, (before, after) = status["reason"], says.split("{pid}")
    assert said.startswith(before.format(host=status["host"])) and after in said, said
    assert (status["state"], status["step"]) == ("failed", 3)
    assert f"train_dpo.py: {said}\n" in printed


def test_a_rank_that_is_stopped_ends_the_job_and_one_that_was_busy_before_did_not(tmp_path):
    script = ["tests/runtime/heartbeat_rank.py", str(tmp_path), "2", "stopped", "0"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    begun = time.monotonic()
    done = subprocess.run(
        start, env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - begun < 30  # torchrun alone waits 30 s for a stopped process
    named = "rank 0 on {host} (process {pid}, last known in step 3, micro-batch 1) gave no sign of life"
    check_end(tmp_path, named, done.stderr)


def test_a_rank_that_is_stuck_ends_the_job_and_one_that_was_busy_before_did_not(tmp_path):
    done = ranks.run(["tests/runtime/heartbeat_rank.py", str(tmp_path), "2", "stuck", "1"], ranks=2, timeout=30)
    assert all(done.codes)
    named = "no rank gets on; furthest behind: rank 1 on {host} (process {pid}, last known in step 3,"
    check_end(tmp_path, named, done.output)


def test_nobody_begins_before_all_notes_are_there_or_leaves_before_all_are_through(monkeypatch):
    notes = torch.distributed.HashStore()
    events = []

    def agree(_error):
        events.append("agreed")
        notes.set(heartbeat._key(1), json.dumps(asdict(AFAR)))

    monkeypatch.setattr(distributed, "store", lambda: notes)
    monkeypatch.setattr(distributed, "agree", agree)
    with heartbeat.watching(replace(distributed.start(), world_size=2), Path("nowhere"), 600):
        events.append("within")
    assert events == ["agreed", "within", "agreed"]


@pytest.mark.parametrize(
    ("state", "reason", "kept"),
    [
        ("failed", "checkpoint x cannot be written: no room; make room", True),
        ("failed", "RuntimeError: [gloo] connection closed by peer", False),
        ("running", "", False),
        ("finished", "", True),
    ],
)
def test_what_a_rank_that_gave_up_has_written_is_not_replaced_by_its_death(state, reason, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.os, "_exit", lambda code: None)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    write_status(tmp_path, state, 3, reason=reason, place="in step 4")
    Watch(None, 0, 2, tmp_path, 600, speaks=True).end("rank 1 died", [])
    found = read_status(tmp_path)
    assert (found["reason"] == reason) is kept and (found["state"] == "failed" or kept)
    assert (found["step"], found["place"]) == (3, "in step 4")


def test_the_first_notes_come_soon_and_the_later_ones_seldom(monkeypatch):
    """Else a rank that dies in its first half minute would be said to be preparing the run."""
    notes, pauses = torch.distributed.HashStore(), []
    enough = threading.Event()

    class Waits(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            if pauses.count(30.0) > 1:
                enough.set()
            return self.is_set() or super().wait(0.001)

    monkeypatch.setattr(distributed, "store", lambda: notes)
    monkeypatch.setattr(distributed, "agree", lambda _: notes.set(heartbeat._key(1), json.dumps(asdict(AFAR))))
    monkeypatch.setattr(heartbeat.threading, "Event", Waits)
    with heartbeat.watching(replace(distributed.start(), world_size=2), Path("nowhere"), 600):
        assert enough.wait(20)
    assert [pause for pause in pauses if pause not in (None, 1.0, 20)][:5] == [2.0, 4.0, 8.0, 16.0, 30.0]


def test_a_single_process_watches_nobody_and_so_does_a_timeout_of_0(monkeypatch):
    monkeypatch.setattr(distributed, "store", lambda: pytest.fail("no store is needed"))
    alone = distributed.start()
    for world, timeout in ((alone, 600), (replace(alone, world_size=2), 0)):
        with heartbeat.watching(world, Path("nowhere"), timeout):
            pass
