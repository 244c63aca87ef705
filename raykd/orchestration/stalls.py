"""Ranks that have stopped: found by what they do, named with their node, and ended.

A training knows nothing of this. Beside the thread that trains, each rank has a Heart. Every few
seconds it says whether that thread has made a step or used its CPU, and where it stands otherwise.
So a slow first step, an evaluation or an export is work, however long it takes. A rank that waits
for others is not what has stopped; and a wait for the teacher has an end of its own.

The command has a Watch. A rank that says nothing for `scale.stall_timeout_s` (its process is
stopped), or that does nothing (a call hangs), is named and ended, and Ray starts its group again.
"""

import json
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

from raykd.console import say
from raykd.errors import InfraError, RaykdError
from raykd.orchestration.session import node_name

BEATS = 10  # in the time that a rank may stand still
LONGEST_S = 5.0  # between beats
AT_WORK = 0.005  # of a CPU: a thread that uses less does nothing
ASKED_S = 60.0  # that a node may take to look at a process; a busy one starts one for it
SAMPLE_S = 1.0  # over which a silent process is looked at
BUSY = 0.05  # of a CPU: a silent process that uses more computes, in a call that lets no thread run
# below the folders of their packages; a frame of these waits for another process
WAITS = {
    "ray": ("",),
    # the backward pass sums gradients over all ranks
    "torch": ("distributed/", "nn/parallel/", "autograd/graph.py"),
    "raykd": ("files/waiting.py",),
}
LIBRARIES = ("ray", "torch")
STDLIB = f"{sysconfig.get_path('stdlib')}/"
ALONE = "alone"  # of one process, which needs no group


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    group: str
    rank: int
    size: int
    node: str
    node_id: str
    pid: int
    begun: str  # when its process was, as the system tells it
    number: int = 0
    idle_s: float = 0.0  # since it has made a step or used its CPU
    is_waiting: bool = False  # for another process
    where: str = ""


class Voice(Protocol):
    """Where beats go."""

    def say(self, beat: Beat) -> None: ...

    def end(self, beat: Beat) -> None: ...


class Heart:
    """Says, from a thread of its own, how the thread that makes it does, until it is closed.

    `tick` says that a step is made. Gaps of this thread's own are nobody's standstill.
    """

    def __init__(self, beat: Beat, voice: Voice, limit_s: float):
        self.beat = beat
        self.voice = voice
        self.every_s = min(limit_s / BEATS, LONGEST_S)
        self.thread = threading.get_ident()
        self.has_ticked = False
        self.over = threading.Event()
        self.worked = time.monotonic()
        self.spent = _cpu_seconds(self.thread)
        self.own = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self.voice.say(self.beat)
        self.own.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.own.join()
        self.voice.end(self.beat)

    def tick(self) -> None:
        """A step is made, or an answer is waited for by a clock of its own."""
        self.has_ticked = True

    def _beat(self) -> None:
        looked = time.monotonic()
        while not self.over.wait(self.every_s):
            now = time.monotonic()
            self._look(now, now - looked)
            looked = now
            self.voice.say(self.beat)

    def _look(self, now: float, since: float) -> None:
        spent = _cpu_seconds(self.thread)
        is_at_work = spent - self.spent >= AT_WORK * since
        if self.has_ticked or is_at_work or since > 2 * self.every_s:
            self.worked = now
        self.has_ticked = False
        self.spent = spent
        frame = sys._current_frames().get(self.thread)
        place = standing(frame) if frame else Standing(False, "")
        self.beat = replace(
            self.beat,
            number=self.beat.number + 1,
            idle_s=now - self.worked,
            is_waiting=place.is_waiting,
            where=place.where,
        )


def _cpu_seconds(thread: int) -> float:
    """The CPU time of a thread; of the whole process where the system does not tell."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.process_time()


class Standing(NamedTuple):
    """Where a thread stands: whether it waits for another process, and at which line of code."""

    is_waiting: bool
    where: str


def standing(frame: FrameType) -> Standing:
    """Where the thread of a frame stands.

    The line is the innermost that is not of Python's own modules, torch or Ray.
    """
    libraries = tuple(filter(None, map(_folder_of, LIBRARIES)))
    waits = tuple(
        f"{_folder_of(name)}{part}"
        for name, parts in WAITS.items()
        if _folder_of(name)
        for part in parts
    )
    stack = [frame]
    while stack[-1].f_back and _is_library(stack[-1].f_code.co_filename, libraries):
        stack.append(stack[-1].f_back)
    code = stack[-1].f_code
    is_waiting = any(one.f_code.co_filename.startswith(waits) for one in stack)
    place = f"{Path(code.co_filename).name}:{stack[-1].f_lineno} in {code.co_name}"
    return Standing(is_waiting, place)


def _folder_of(package: str) -> str | None:
    """The folder of a package that is imported."""
    file = getattr(sys.modules.get(package), "__file__", None)
    return f"{Path(file).parent}/" if file else None


def _is_library(file: str, folders: tuple[str, ...]) -> bool:
    """Whether a file is of Python itself, or lies in one of these folders."""
    of_python = file.startswith((STDLIB, "<")) and "-packages/" not in file
    return of_python or file.startswith(folders)


@dataclass
class Board:
    """Beats as files of a folder that all processes of a run see; each watch has its own."""

    folder: Path

    def say(self, beat: Beat) -> None:
        path = self._path(beat)
        with suppress(
            OSError
        ):  # a disk that fails is told of by what needs it; the next beat may do
            staged = path.with_suffix(".new")
            staged.write_text(json.dumps(asdict(beat)))
            staged.replace(path)

    def end(self, beat: Beat) -> None:
        with suppress(OSError):
            self._path(beat).unlink()

    def read(self) -> list[Beat]:
        """The last beat of each rank."""
        told = []
        for path in sorted(self.folder.glob("*.json")):
            with suppress(FileNotFoundError):  # it has just ended
                told.append(Beat(**json.loads(path.read_text())))
        return told

    def forget(self, group: str) -> None:
        """Drop the beats of a group."""
        for path in self.folder.glob(f"{group}-*.json"):
            with suppress(OSError):
                path.unlink()

    def _path(self, beat: Beat) -> Path:
        return self.folder / f"{beat.group}-{beat.rank}.json"


@dataclass
class OwnVoice:
    """Beats of a process that no other watches: it says itself, once, that it stands still."""

    limit_s: float
    is_said: bool = False

    def say(self, beat: Beat) -> None:
        if beat.idle_s < self.limit_s:
            self.is_said = False
        elif not self.is_said:
            self.is_said = True
            say(
                "train",
                f"! no step and no work for {beat.idle_s:.0f} s, at {beat.where}; "
                "scale.stall_timeout_s says when this is told",
            )

    def end(self, beat: Beat) -> None:
        """Nothing is kept of it."""


def heart(board: str | None, group: str, *, rank: int, size: int, limit_s: float) -> Heart:
    """The heart of this thread's training; it writes to the folder `board` in an actor of Ray."""
    import ray

    beat = Beat(group, rank, size, "", "", os.getpid(), process_of(os.getpid())[0])
    if board is None or not ray.is_initialized():
        return Heart(beat, OwnVoice(limit_s), limit_s)
    context = ray.get_runtime_context()
    if not context.get_actor_id():
        return Heart(beat, OwnVoice(limit_s), limit_s)
    beat = replace(beat, node=node_name(), node_id=context.get_node_id())
    return Heart(beat, Board(Path(board)), limit_s)


def process_of(pid: int) -> tuple[str, float, bool]:
    """(when it began, seconds of CPU, whether it is stopped) of a process, where the system tells;
    all empty where it does not.

    ProcessLookupError where it tells, and there is no such process.
    """
    if not Path("/proc/self/stat").exists():
        return "", 0.0, False
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    state = told[0]
    if state in "ZX":
        raise ProcessLookupError(pid)
    ticks = int(told[11]) + int(told[12])
    return told[19], ticks / os.sysconf("SC_CLK_TCK"), state in "Tt"


def end_process(pid: int, begun: str, is_silent: bool) -> str:
    """End a process of this node: "ended"; "gone" where it is over, "busy" where it computes.

    One that is only silent may be in a call that lets no other of its threads run.
    """
    try:
        found, before, is_stopped = process_of(pid)
        if found != begun:
            return "gone"
        if is_silent and begun and not is_stopped:
            time.sleep(SAMPLE_S)
            if process_of(pid)[1] - before >= BUSY * SAMPLE_S:
                return "busy"
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return "gone"
    return "ended"


@dataclass(frozen=True)
class Stall:
    """Ranks of one group that have stopped."""

    ranks: tuple[Beat, ...]
    reason: str
    is_silent: bool = False

    @property
    def text(self) -> str:
        """What is told of it."""
        names = " and ".join(f"rank {beat.rank} on node {beat.node}" for beat in self.ranks)
        group = self.ranks[0].group
        return f"{names}{f' of trial {group}' if group != ALONE else ''} {self.reason}"


@dataclass
class Heard:
    """The last beat of a rank, and when it came by the clock of who heard it."""

    beat: Beat
    at: float

    def idle_s(self, now: float) -> float:
        """For how long it has done nothing."""
        return self.beat.idle_s + now - self.at


def stall_of(heard: Iterable[Heard], now: float, limit_s: float) -> Stall | None:
    """Who of one group has stopped, if anyone.

    Whose process is silent; else who does nothing and waits for nobody; else all of them, where
    all wait.
    """
    known = sorted(heard, key=lambda one: one.beat.rank)
    silent = [one for one in known if now - one.at >= limit_s]
    if silent:
        seconds = min(now - one.at for one in silent)
        ranks = tuple(one.beat for one in silent)
        reason = f"has stopped: its process says nothing for {seconds:.0f} s"
        return Stall(ranks, reason, is_silent=True)
    idle = [one for one in known if one.idle_s(now) >= limit_s]
    hanging = [one for one in idle if not one.beat.is_waiting]
    stuck = hanging or (idle if idle and len(idle) == idle[0].beat.size else [])
    if not stuck:
        return None
    seconds = min(one.idle_s(now) for one in stuck)
    first = stuck[0].beat
    kind = "" if hanging else ", and all wait"
    reason = f"has stopped: no step and no work for {seconds:.0f} s at {first.where}{kind}"
    return Stall(tuple(one.beat for one in stuck), reason)


@dataclass
class Watch:
    """Ends ranks that have stopped, as long as it is open. Needs a Ray session to be of use.

    `again` is what a group does then, as it is told. Beats lie in a folder below `folder`, which
    is this command's alone.
    """

    stage: str
    limit_s: float
    again: str
    folder: Path
    heard: dict[tuple[str, int], Heard] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.board = Board(self.folder / uuid.uuid4().hex)
        self.every_s = min(self.limit_s / BEATS, LONGEST_S / 2)
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a command that was killed
        self.board.folder.mkdir(parents=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(LONGEST_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def fault(self, retries: int, other: RaykdError) -> RaykdError:
        """What ended a stage: ranks that stopped in each of its attempts, or another fault."""
        if len(self.told) <= retries or not isinstance(other, InfraError):
            return other
        return InfraError(
            f"{self.stage}: {self.told[-1]}; it was the {len(self.told)}th of scale.retries = "
            f"{retries}; mend what hangs, or raise scale.stall_timeout_s where a step takes longer"
        )

    def _watch(self) -> None:
        import ray

        looked = time.monotonic()
        while not self.over.wait(self.every_s):
            now = time.monotonic()
            if not ray.is_initialized():
                continue
            with suppress(Exception):  # a head that does not answer is asked again
                self._hear(self.board.read(), now, now - looked)
                for group in {group for group, _ in self.heard}:
                    stall = stall_of(self._of(group), now, self.limit_s)
                    if stall:
                        self._end(stall)
            looked = time.monotonic()

    def _of(self, group: str) -> list[Heard]:
        return [one for (name, _), one in self.heard.items() if name == group]

    def _hear(self, beats: list[Beat], now: float, since: float) -> None:
        """Take the newest beats. A gap of this process's own is nobody's silence."""
        before = self.heard
        self.heard = {}
        for beat in beats:
            key = (beat.group, beat.rank)
            last = before.get(key)
            is_old = last is not None and last.beat == beat
            at = last.at if last and is_old else now
            late = since if is_old and since > 2 * self.every_s else 0.0
            self.heard[key] = Heard(beat, min(at + late, now))

    def _end(self, stall: Stall) -> None:
        """Say who has stopped, and end its processes.

        Of a silent one its node is asked first: it may be over, or compute.
        """
        if not stall.is_silent:
            self._tell(stall)
        calls = [_at(beat, stall.is_silent) for beat in stall.ranks]
        answers = list(map(_answer, calls))
        ended = [
            beat for beat, answer in zip(stall.ranks, answers, strict=True) if answer == "ended"
        ]
        if stall.is_silent and ended:
            self._tell(replace(stall, ranks=tuple(ended)))
        if {"busy", "late"} & set(answers):
            for beat in stall.ranks:
                self.heard[beat.group, beat.rank].at = time.monotonic()
        else:
            # Those that are alive will say more; what the dead ones said is not looked at again.
            self.board.forget(stall.ranks[0].group)

    def _tell(self, stall: Stall) -> None:
        self.told.append(stall.text)
        say(self.stage, f"! {stall.text}; {self.again}")


def _at(beat: Beat, is_silent: bool) -> Any:
    """The call that ends a rank, on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(beat.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(end_process)
    return task.options(scheduling_strategy=there).remote(beat.pid, beat.begun, is_silent)


def _answer(call: Any) -> str:
    """What a node says: "late" where it says nothing yet, "gone" where it is lost itself."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(call, timeout=ASKED_S)
    except GetTimeoutError:
        return "late"
    except RayError:
        return "gone"
