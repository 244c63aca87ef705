"""A rank that has stopped is found by what it does, and named; one at work or waiting is not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from command import until

from raykd.errors import DataError, InfraError
from raykd.orchestration import stalls
from raykd.orchestration.stalls import Beat, Heard, Heart, OwnVoice, Watch, stall_of

LIMIT_S = 10.0
BEAT = Beat("alone", 0, 2, "here, 10.0.0.1", "", 1, "")


class Kept:
    """A voice that keeps the last beat."""

    def __init__(self) -> None:
        self.beat = BEAT
        self.is_over = False

    def say(self, beat: Beat) -> None:
        self.beat = beat

    def end(self, beat: Beat) -> None:
        self.is_over = True


@contextmanager
def beating(work: Callable[[threading.Event], None]) -> Iterator[Heart]:
    """The heart of a thread at some work; it has looked twice, a second apart by its clock."""
    made: list[Heart] = []
    over = threading.Event()

    def run() -> None:
        made.append(Heart(BEAT, Kept(), LIMIT_S))
        work(over)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: made)
    heart = made[0]
    time.sleep(0.3)
    heart._look(heart.worked + 0.2, 0.2)
    time.sleep(0.3)
    heart._look(heart.worked + 1, 1.0)
    yield heart
    over.set()
    thread.join()


def wait_in_user_code(over: threading.Event) -> None:
    over.wait()


def test_a_thread_that_hangs_does_nothing_and_its_line_is_told():
    with beating(wait_in_user_code) as heart:
        beat = heart.beat
    assert beat.idle_s == pytest.approx(1.0, abs=1e-6)
    assert not beat.is_waiting
    assert beat.where.startswith("test_stalls.py:")
    assert beat.where.endswith(" in wait_in_user_code")


def test_a_thread_that_computes_is_at_work_without_a_step():
    def compute(over: threading.Event) -> None:
        while not over.is_set():
            sum(range(1000))

    with beating(compute) as heart:
        assert heart.beat.idle_s == 0


def test_a_tick_is_work_once():
    with beating(wait_in_user_code) as heart:
        heart.tick()
        heart._look(heart.worked + 50, 1.0)
        assert heart.beat.idle_s == 0
        heart._look(heart.worked + 1, 1.0)
        assert heart.beat.idle_s == 1


def test_a_gap_of_the_hearts_own_is_nobodys_standstill():
    """As of a process that was stopped, and goes on."""
    with beating(wait_in_user_code) as heart:
        heart._look(heart.worked + 500, 500.0)
        assert heart.beat.idle_s == 0


def test_a_thread_in_a_lock_waits_for_another_process(tmp_path):
    import fcntl

    from raykd.files import waiting

    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def lock(over: threading.Event) -> None:
        with waiting.locked(tmp_path, wait=True):
            pass

    with beating(lock) as heart:
        assert heart.beat.is_waiting
        os.close(holder)


def test_a_heart_beats_until_it_is_closed():
    voice = Kept()
    with Heart(BEAT, voice, 0.2):
        until(lambda: voice.beat.number > 1)
        assert not voice.is_over
    assert voice.is_over


def test_one_process_says_by_itself_that_it_stands_still_once(capsys):
    voice = OwnVoice(LIMIT_S)
    idle = replace(BEAT, idle_s=LIMIT_S, where="mine.py:3 in read")
    for beat in (BEAT, idle, idle):
        voice.say(beat)
    told = capsys.readouterr().err
    assert told.count("no step and no work for 10 s, at mine.py:3 in read") == 1
    for beat in (BEAT, idle):
        voice.say(beat)
    assert "no step" in capsys.readouterr().err


def heard(rank: int, *, at: float = 100.0, **told: object) -> Heard:
    return Heard(replace(BEAT, rank=rank, **told), at)


@pytest.mark.parametrize(
    ("ranks", "stopped"),
    [
        pytest.param([heard(0), heard(1)], (), id="all work"),
        pytest.param([heard(0, idle_s=9), heard(1, idle_s=9)], (), id="not yet"),
        pytest.param(
            [heard(0, idle_s=11, is_waiting=True), heard(1)], (), id="one waits for one at work"
        ),
        pytest.param(
            [heard(0, idle_s=11, is_waiting=True), heard(1, at=89)], (1,), id="one is silent"
        ),
        pytest.param(
            [heard(0, idle_s=11, is_waiting=True), heard(1, idle_s=11)], (1,), id="one hangs"
        ),
        pytest.param(
            [heard(0, idle_s=11, is_waiting=True), heard(1, idle_s=12, is_waiting=True)],
            (0, 1),
            id="all wait for each other",
        ),
    ],
)
def test_who_has_stopped(ranks, stopped):
    stall = stall_of(ranks, 100.0, LIMIT_S)
    assert tuple(beat.rank for beat in stall.ranks) == stopped if stall else stopped == ()


def test_a_stall_names_rank_node_and_line():
    hangs = heard(1, idle_s=11, where="mine.py:3 in read", group="3f2a")
    stall = stall_of([hangs], 100.0, LIMIT_S)
    assert stall
    assert stall.text == (
        "rank 1 on node here, 10.0.0.1 of trial 3f2a has stopped: no step and no work for 11 s at "
        "mine.py:3 in read"
    )


def test_silence_while_the_command_itself_was_stopped_is_not_counted(tmp_path):
    watch = Watch("train", LIMIT_S, "again", tmp_path)
    watch._hear([BEAT], 100.0, 1.0)
    watch._hear([BEAT], 101.0, 1.0)
    assert [one.at for one in watch.heard.values()] == [100.0]
    watch._hear([BEAT], 700.0, 599.0)
    assert [one.at for one in watch.heard.values()] == [699.0]
    watch._hear([replace(BEAT, number=1)], 701.0, 1.0)
    assert [one.at for one in watch.heard.values()] == [701.0]


def test_a_board_has_the_last_beat_of_each_rank_and_leaves_nothing(tmp_path):
    folder = tmp_path / "beats"
    (folder / "of a command that was killed").mkdir(parents=True)
    with Watch("train", LIMIT_S, "again", folder) as watch:
        board = watch.board
        assert [path.name for path in folder.iterdir()] == [board.folder.name]
        for beat in (BEAT, replace(BEAT, number=1), replace(BEAT, rank=1)):
            board.say(beat)
        board.say(replace(BEAT, group="3f2a"))
        assert board.read() == [
            replace(BEAT, group="3f2a"),
            replace(BEAT, number=1),
            replace(BEAT, rank=1),
        ]
        board.end(replace(BEAT, rank=1))
        board.forget("3f2a")
        assert board.read() == [replace(BEAT, number=1)]
    assert not folder.exists()
    board.say(BEAT)  # of a rank that outlives the command
    assert not folder.exists()


def test_stops_in_every_attempt_are_the_reason_and_a_users_fault_comes_first(tmp_path):
    watch = Watch("train", LIMIT_S, "again", tmp_path)
    lost = InfraError("train failed after its retries: ActorDiedError")
    watch.told = ["rank 1 on node n1 has stopped"]
    assert watch.fault(1, lost) is lost
    watch.told *= 2
    found = watch.fault(1, lost)
    assert "rank 1 on node n1 has stopped" in str(found)
    assert "scale.stall_timeout_s" in str(found)
    mine = DataError("row 7 is bad")
    assert watch.fault(1, mine) is mine


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks the system of processes")
def test_only_the_very_process_that_stands_still_is_ended():
    busy = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as process:
        begun = stalls.process_of(process.pid)[0]
        assert stalls.end_process(process.pid, "1", is_silent=True) == "gone"
        assert stalls.end_process(process.pid, begun, is_silent=True) == "busy"
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        until(lambda: stalls.process_of(process.pid)[2])
        assert stalls.end_process(process.pid, begun, is_silent=True) == "ended"
        assert process.wait() == -signal.SIGKILL
    assert stalls.end_process(process.pid, begun, is_silent=False) == "gone"
