"""Does a run lose anything, whatever happens to it, and what does that cost?

    python benchmarks/reliability.py                              # all parts, half an hour on two
    cores
    python benchmarks/reliability.py --part kills --only 7 21     # two of the killed runs; the
    order is that of the table

kills    30 runs, 10 of them of two processes, are ended by SIGKILL at moments on the clock that a
seed draws, go on in new
         processes, some to be killed again, and are held against runs that nobody broke off:
         weights, the optimiser's state,
         history, best file, and the samples of each step, so that each of the broken epoch was seen
         exactly once
error    seconds from a killed rank to the end of the job, with Lightning's own launcher and with
torchrun
damage   1,000 damaged images and 1,000 damaged annotation files (damage.py)
disk     a disk that fills up in the middle of a run: what is said, and what the run that goes on
comes to
memory   the memory of a tiny run over 200 epochs: its peak, what it grows by after full
collections, and how much of that is the history
cost     `last.ckpt` every 10 s, a loader that can go on at its batch, and the trainer beside
Lightning's own

The runs are those of tests/exact_run.py: a task, boxes with mosaic, a user's own module on our
data, and both of the user. Linux only.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(TESTS), str(HERE.parent)]

import exact_run  # noqa: E402 - of the tests
import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from common import keep_quiet, machine, ratio, table  # noqa: E402

from autotimm.checkpoints import find_last, read_run  # noqa: E402

KINDS = ("classifier", "boxes", "own", "plain")
LIMIT = 300                                  # seconds for one run of a few seconds


# Runs in processes of their own

@dataclass
class Job:
    "The processes of one run."
    pids: list[int]
    log: Path
    trace: str
    codes: dict[int, int] = field(default_factory=dict)    # rank -> exit status

    def poll(self) -> bool:
        "Whether all processes have ended."
        for rank, pid in enumerate(self.pids):
            if rank in self.codes: continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended: self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = LIMIT) -> bool:
        """Wait for the end, or for something else to be true; False where the processes ended
        first, or nothing came."""
        limit = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < limit:
            if until(): return True
            time.sleep(0.002)
        return False

    def kill(self, ranks: Sequence[int]) -> None:
        "SIGKILL for some of the processes."
        for rank in ranks:
            if rank not in self.codes: os.kill(self.pids[rank], signal.SIGKILL)

    def end(self) -> None:
        "End whatever is left."
        self.poll()
        self.kill(range(len(self.pids)))
        self.wait()

    def notes(self, rank: int = 0) -> list[list[Any]]:
        "What a process has written down so far."
        path = Path(f"{self.trace}.{rank}")
        if not path.exists(): return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n")]

    def last_note(self) -> float:
        "When it wrote something down last, on the clock."
        return Path(f"{self.trace}.0").stat().st_mtime

    def validates(self, batches: int) -> bool:
        "Whether it has come to a batch of validation."
        return sum(o[0] == "validation" for o in self.notes()) >= batches

    def said(self) -> str:
        "The first error in its output, in a line."
        found = re.search(r"^(?:\[\w+\]:\s*)?([\w.]*(?:Error|Exception|Exit|Interrupt)\b: .+)$",
                          self.log.read_text(errors="replace"), re.M)
        return found[1] if found else ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def child(settings: dict[str, Any], log: Path, environ: dict[str, str],
          callbacks: Callable[[], list[pl.Callback]]) -> int:
    """Fork a process that makes a run: it needs no time to import anything, and shares nothing with
    the run before it."""
    if pid := os.fork(): return pid
    code = 1
    try:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environ)
        exact_run.main({**settings, "callbacks": callbacks()})
        code = 0
    except BaseException:  # noqa: BLE001 - the child must never return into the benchmark
        traceback.print_exc()
    finally: os._exit(code)


def start(settings: dict[str, Any], log: Path,
          callbacks: Callable[[], list[pl.Callback]] = list) -> Job:
    "Start a run; several processes as a launcher would."
    n, port = settings.get("devices", 1), free_port()
    def environ(rank: int) -> dict[str, str]:
        if n == 1: return {}
        return {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Path(settings["root"]).mkdir(parents=True, exist_ok=True)
    return Job([child(settings, log, environ(rank), callbacks) for rank in range(n)], log,
               settings["trace"])


def finished(job: Job, what: str) -> None:
    "Wait for the end of a run that nothing disturbs."
    job.wait()
    if set(job.codes.values()) != {0} or len(job.codes) < len(job.pids):
        job.end()
        raise RuntimeError(f"{what}: {job.codes}\n{job.log.read_text()[-4000:]}")


def last_of(root: str) -> Path | None:
    "The newest last.ckpt of a folder of runs."
    return find_last(Path(root) / "checkpoints")


# Comparing two runs

def differences(whole: dict[str, Any], other: dict[str, Any]) -> list[str]:
    "What two runs do not have in common, bit for bit."
    found = [f"weight {k}" for k, v in whole["weights"].items()
             if not torch.equal(v, other["weights"][k])]
    found += [f"optimizer {i} {k}" for i, state in whole["optimizer"].items()
              for k, v in state.items()
              if not torch.equal(torch.as_tensor(v), torch.as_tensor(other["optimizer"][i][k]))]
    return found + [o for o in ("history", "epoch", "step", "best") if whole[o] != other[o]]


def steps_of(notes: list[list[Any]]) -> list[list[Any]]:
    return [o for o in notes if o[0] not in ("process", "validation")]


def samples(whole: list[list[Any]], parts: list[list[list[Any]]]) -> str:
    """Whether the steps of processes that went on from one another are those of the unbroken run;
    what is wrong otherwise."""
    done = 0
    for part in parts:
        if not part: continue
        first = next((i for i, o in enumerate(whole) if o[:2] == part[0][:2]), None)
        if first is None or first > done:
            return f"the samples of steps {done} to {first} are missing"
        if part != whole[first:first + len(part)]:
            return f"other samples than those of the unbroken run from step {first} on"
        done = first + len(part)
    return "" if done == len(whole) else f"{len(whole) - done} steps at the end are missing"


# Part 1: kills

@dataclass
class Case:
    "One run that is killed."
    kind: str
    workers: int = 0
    context: str = ""                        # 'fork' or 'spawn'
    devices: int = 1
    kills: int = 1
    who: str = "all"                         # 'rank 0', 'rank 1' or 'all'
    validating: bool = False                 # killed while it validates
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.kind, *(f"{k}={v}" for k, v in self.more.items()
                                       if k not in ("train", "slow"))])

    def ranks(self) -> list[int]:
        return {"rank 0": [0], "rank 1": [1]}.get(self.who, list(range(self.devices)))

    def settings(self, folder: Path, name: str) -> dict[str, Any]:
        more = {"strategy": "ddp", "train": 38, "slow": 0.05} if self.devices > 1 else {}
        return {"kind": self.kind, "workers": self.workers, "context": self.context,
                "devices": self.devices, "root": str(folder / name),
                "data": str(folder / f"data-{name}"), "out": str(folder / f"{name}.pt"),
                "trace": str(folder / f"{name}.trace"), **more, **self.more}


LOADERS = ((0, ""), (2, "fork"), (2, "spawn"))
VARIANTS = [
    Case("classifier", more={"accumulate": 3}),
    Case("classifier", 2, "fork", more={"balanced": True, "interval": 2}),
    Case("own", 2, "fork", more={"val_check_interval": 0.5}),
    Case("own", more={"schedule": "plateau", "val_check_interval": 3}),
    Case("plain", more={"precision": "bf16-mixed"}), Case("classifier", 2, "fork", validating=True),
    Case("boxes", validating=True),
    Case("own", validating=True, more={"steps": 14, "interval": 0.02})]


def cases(seed: int) -> list[Case]:
    """20 runs of one process and 10 of two; each pair of kind, loader and number of processes is
    among them."""
    rng = random.Random(seed)
    one = [Case(kind, *loader) for loader in LOADERS for kind in KINDS] + VARIANTS
    two = [Case(kind, *loader, devices=2) for loader in LOADERS[:2]
           for kind in KINDS] + [Case(kind, *LOADERS[2], devices=2) for kind in ("own", "boxes")]
    for i, case in enumerate(two): case.who = ("rank 0", "rank 1", "all")[i % 3]
    for case in one + two: case.kills = rng.choice([1, 1, 2, 3]) if case.context != "spawn" else 1
    return one + two


def broken(case: Case, folder: Path, window: float,
           rng: random.Random) -> tuple[list[Job], list[str]]:
    """Kill a run, and each that goes on from it, until the last comes to the end: the jobs, and
    where they were killed."""
    jobs: list[Job] = []
    places: list[str] = []
    settings, tries, over = case.settings(folder, "broken"), 0, False
    while True:
        resume = {"resume": True, "ckpt": "last" if over
                  else rng.choice(["last", "auto"])} if places else {}
        job = start({**settings, **resume, "trace": f"{settings['trace']}.{len(jobs)}"},
                    folder / f"broken-{len(jobs)}.log")
        jobs.append(job)
        if len(places) == case.kills:
            finished(job, f"{case}, going on after {len(places)} kills")
            return jobs, places
        ready = partial(last_of, settings["root"]) if not places else job.notes
        job.wait(lambda ready=ready: bool(ready()))
        if case.validating: job.wait(partial(job.validates, rng.randint(1, 3)))
        else: time.sleep(rng.uniform(0, 0.9 * window / 2**tries))
        if job.poll():                       # it came to its end before the moment that was drawn
            if set(job.codes.values()) != {0}:
                raise RuntimeError(f"{case}: {job.codes}\n{job.log.read_text()[-4000:]}")
            if places: return jobs, places
            tries += 1
            if tries > 6: raise RuntimeError(f"{case}: it was never killed in time.")
            jobs.clear()
            subprocess.run(["rm", "-rf", settings["root"]], check=True)
            for path in folder.glob("broken*"):
                if path.is_file(): path.unlink()
            continue
        job.kill(case.ranks())
        last = job.notes()[-1] if job.notes() else ["start"]
        job.wait(seconds=90)
        if not job.poll():
            job.end()
            raise RuntimeError(f"{case}: after {case.who} was killed the other process still waits "
                               f"after 90 s.\n{job.log.read_text()[-3000:]}")
        half = list(Path(settings["root"]).rglob(".*.partial"))
        path = last_of(settings["root"])
        if path is None: raise RuntimeError(f"{case}: last.ckpt is gone.")
        where = {"validation": "validation", "process": "start",
                 "start": "start"}.get(str(last[0]),
                                       f"epoch {last[0]}, batch {last[1] if len(last) > 1 else 0}")
        kept = read_run(path)
        over = kept["finished"]               # 'auto' would rightly begin another run
        places.append(f"{where}{' (writing)' if half else ''}, on from step {kept['step']}")


def kill_one(case: Case, folder: Path, seed: int) -> list[object]:
    "A row about one run that was killed."
    rng = random.Random(seed)
    interval = rng.choice([1, 1, 2, 0.03])
    case.more = {"interval": interval, **case.more}
    whole = start(case.settings(folder, "whole"), folder / "whole.log")
    whole.wait(lambda: last_of(case.settings(folder, "whole")["root"]) is not None)
    first = time.time()
    finished(whole, f"{case}, unbroken")
    window = max(0.1, whole.last_note() - first)
    jobs, places = broken(case, folder, window, rng)
    wrong: list[str] = []
    for rank in range(case.devices):
        suffix = f".{rank}" if case.devices > 1 else ""
        one, other = (torch.load(folder / f"{o}.pt{suffix}", weights_only=False)
                      for o in ("whole", "broken"))
        wrong += differences(one, other)
        said = samples(steps_of(whole.notes(rank)), [steps_of(job.notes(rank)) for job in jobs])
        wrong += [said] if said else []
    loader = f"{case.workers} {case.context}".strip()
    return [str(case), loader, case.devices, case.who if case.devices > 1 else "",
            "; ".join(places), "exact" if not wrong else f"NOT: {', '.join(wrong[:3])}"]


def kills(args: argparse.Namespace) -> None:
    rows: list[list[object]] = []
    for i, case in enumerate(cases(args.seed)):
        if args.only and i not in args.only: continue
        with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as folder:
            try: rows.append([i, *kill_one(case, Path(folder), args.seed + i)])
            except RuntimeError as e:
                rows.append([i, str(case), f"{case.workers} {case.context}", case.devices,
                             case.who, "", f"FAILED: {e}"])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table(rows, ["", "run", "workers", "processes", "killed", "when, and where it went on",
                       "the rest"]))
    print(f"\n{sum(o[-1] == 'exact' for o in rows)} of {len(rows)} went on exactly, after "
          f"{sum(str(o[5]).count('on from') for o in rows)} kills.")


# Part 2: the time to the error

def job_of(folder: Path, launcher: str, settings: dict[str, Any]) -> subprocess.Popen:
    "A job of two processes as its user starts it."
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    command = [str(TESTS / "exact_run.py"), str(path)]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                   str(free_port()), *command]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("w")
    return subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log,
                            start_new_session=True)


def running(pid: int) -> bool:
    "Whether a process is there and no zombie."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def until(ready: Callable[[], Any], what: str, seconds: float = LIMIT) -> float:
    "The seconds until something is true."
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"{what}: not within {seconds} s.")
        time.sleep(0.02)
    return time.monotonic() - began


def time_to_error(folder: Path, launcher: str, rank: int) -> tuple[float, float, str]:
    "Seconds until the job has ended, until its last process has, and what it said."
    settings = {"kind": "own", "devices": 2, "strategy": "ddp", "train": 80, "epochs": 100_000,
                "slow": 0.02, "root": str(folder / "run"),
                "data": str(folder / "data"), "out": str(folder / "out.pt"),
                "trace": str(folder / "trace"), "interval": None}
    job = job_of(folder, launcher, settings)
    both = Job([], folder / "log", settings["trace"])
    try:
        until(lambda: all(len(both.notes(o)) > 5 for o in (0, 1)) or job.poll() is not None,
              "the start of the job")
        if job.poll() is not None: raise RuntimeError((folder / "log").read_text()[-3000:])
        pids = [both.notes(o)[0][1] for o in (0, 1)]
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        until(lambda: job.poll() is not None, "the end of the job", 120)
        ended = time.monotonic() - began
        until(lambda: not any(running(o) for o in pids), "the end of the other process", 120)
        return ended, time.monotonic() - began, both.said()
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def error(args: argparse.Namespace) -> None:
    rows: list[list[object]] = []
    for launcher in ("AutoTrainer(devices=2)", "torchrun"):
        for rank in (0, 1):
            found = []
            for _ in range(args.runs):
                with tempfile.TemporaryDirectory(prefix="error-",
                                                 ignore_cleanup_errors=True) as folder:
                    found.append(time_to_error(Path(folder), launcher, rank))
            job, every, said = zip(*found)
            rows.append([launcher, rank, f"{statistics.median(job):.1f} (to {max(job):.1f})",
                         f"{statistics.median(every):.1f} (to {max(every):.1f})", said[-1][:110]])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table(rows, ["started by", "killed rank", "seconds to the end of the job",
                       "of every process", "the last error in its output"]))


# Part 3: damaged files

def damage(args: argparse.Namespace) -> None:
    if not (HERE / "damage.py").exists():
        raise SystemExit("benchmarks/damage.py is not here: the damaged files are its part. Leave "
                         "out --part damage.")
    import damage as damaged  # type: ignore[import-not-found]
    for what in damaged.CASES:
        found = damaged.run(what, args.files, args.seed)
        print(f"{len(found)} damaged "
              f"{what}\n\n{table(damaged.rows(found), ['damage', 'files', *damaged.OUTCOMES])}\n",
              flush=True)


# Part 4: a disk that fills up

@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    "A file system of a few MB at a folder; False where the system does not permit one."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs",
                           str(folder)], capture_output=True)
    try: yield done.returncode == 0
    finally:
        if done.returncode == 0: subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    "Fill a disk with a file, but for some bytes."
    space = os.statvfs(folder)
    with (folder / "others").open("wb") as file:
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))


def disk_one(case: Case, base: Path, rng: random.Random) -> list[object]:
    "A row about a run whose disk fills up at a random moment."
    folder = base / "w"
    folder.mkdir()
    whole: dict[str, Any] = case.settings(folder, "whole")
    job = start(whole, folder / "whole.log")
    job.wait(lambda: last_of(whole["root"]) is not None)
    first = time.time()
    finished(job, f"{case}, unbroken")
    window = max(0.1, job.last_note() - first)
    written = last_of(whole["root"])
    assert written is not None
    size = written.stat().st_size
    with small_disk(base / "disk", 8 + 4 * size // 2**20) as mounted:
        full = {**case.settings(folder, "broken"), "root": str(base / "disk" / "run")}
        job = start(full, folder / "full.log")
        job.wait(lambda: last_of(full["root"]) is not None)
        time.sleep(rng.uniform(0, 0.6 * window))
        if mounted: fill(base / "disk", leave=rng.randrange(size))
        else:
            for pid in job.pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
        job.wait(seconds=90)
        said = next((o for o in job.log.read_text().splitlines() if o.startswith("OSError")
                     and "could not be written" in o), job.said() or "no error")
        if not job.poll():
            job.end()
            said = "HANGS: " + said
        if 0 in job.codes.values(): said = "ENDED WELL, so the disk was full too late: " + said
        left = [o.name for o in Path(full["root"]).rglob(".*.partial")]
        path = last_of(full["root"])
        assert path is not None
        step = read_run(path)["step"]
        with contextlib.suppress(FileNotFoundError): (base / "disk" / "others").unlink()
        again = start({**full, "resume": True, "trace": full["trace"] + ".1"}, folder / "again.log")
        finished(again, f"{case}, going on after the disk was full")
        wrong: list[str] = []
        for rank in range(case.devices):
            suffix = f".{rank}" if case.devices > 1 else ""
            wrong += differences(*(torch.load(folder / f"{o}.pt{suffix}", weights_only=False)
                                   for o in ("whole", "broken")))
            told = samples(steps_of(Job([], job.log, whole["trace"]).notes(rank)),
                           [steps_of(o.notes(rank)) for o in (job, again)])
            wrong += [told] if told else []
    said = re.sub(r"'/\S+/(checkpoints/\S+')", r"'.../\1", said)
    return [str(case), case.devices, "tmpfs" if mounted else "RLIMIT_FSIZE", said,
            "; ".join(left) or "nothing", f"read; on from step {step}",
            "exact" if not wrong else f"NOT: {', '.join(wrong[:3])}"]


def disk(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    plans = ([Case(kind, more={"interval": 1}) for kind in KINDS]
             + [Case("own", 2, "fork", more={"interval": 1}),
                Case("classifier", devices=2, more={"interval": 1})])
    rows: list[list[object]] = []
    for case in plans:
        with tempfile.TemporaryDirectory(prefix="disk-", ignore_cleanup_errors=True) as folder:
            rows.append(disk_one(case, Path(folder), rng))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table(rows, ["run", "processes", "disk", "what was said", "half files left",
                       "the checkpoint before", "the rest"]))


# Part 5: memory

def megabytes(pid: int, key: str = "Rss") -> float:
    "The memory of a process: 'Rss', or 'Private' for what is its own."
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(o.split()[1]) for o in lines if o.startswith(key)) / 1024


class Heap(ctypes.Structure):
    "What glibc's mallinfo2 tells."
    _fields_ = [(name, ctypes.c_size_t)
                for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def heap_in_use() -> int:
    """Bytes that the C library has handed out and not got back, tensors among them; Python's small
    objects lie elsewhere."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap
    found = mallinfo()
    return found.uordblks + found.hblkhd


def history_size(history: list[dict[str, float]]) -> int:
    "Bytes of the rows of a history; their keys are shared."
    return sys.getsizeof(history) + sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values()))
                                        for row in history)


def of_workers() -> dict[str, float]:
    """What the children of this process hold all together, shared pages counted in each, and what
    is their own alone."""
    found = {"workers": 0.0, "own": 0.0}
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                found["workers"] += megabytes(int(pid))
                found["own"] += megabytes(int(pid), "Private")
    return found


class Memory(pl.Callback):
    """Writes the memory of this process and of its workers to a file after each epoch, and every so
    often what is left after a full collection."""
    def __init__(self, path: Path, every: int): self.path, self.every = path, every

    def on_train_epoch_end(self, trainer, pl_module):
        for callback in trainer.callbacks:
            # What the tests keep is no part of a run
            if isinstance(callback, exact_run.Watch): callback.seen.clear()
        note: dict[str, float] = {"epoch": trainer.current_epoch + 1,
                                  "highest": megabytes(os.getpid())}
        if note["epoch"] % self.every == 0:
            before = heap_in_use()
            gc.collect()
            after = heap_in_use()
            note |= {"process": megabytes(os.getpid()), **of_workers(), "heap": after / 2**20,
                     "garbage": (before - after) / 2**20,
                     "blocks": sys.getallocatedblocks(),
                     "history": history_size(trainer.history) / 2**20}
        with self.path.open("a") as file: file.write(json.dumps(note) + "\n")


def watched(path: Path, every: int) -> list[pl.Callback]: return [Memory(path, every)]


def memory_run(workers: int, epochs: int, every: int) -> list[dict[str, float]]:
    "The notes of a run: one an epoch."
    with tempfile.TemporaryDirectory(prefix="memory-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = {**Case("classifier", workers, "fork" if workers
                           else "").settings(folder, "run"), "epochs": epochs, "interval": None,
                    "persistent": bool(workers)}
        job = start(settings, folder / "log", partial(watched, folder / "memory", every))
        job.wait(seconds=1500)
        finished(job, "memory")
        return [json.loads(o) for o in (folder / "memory").read_text().splitlines()]


def memory(args: argparse.Namespace) -> None:
    every, rows = max(1, args.epochs // 20), []
    for workers in (0, 2):
        notes = memory_run(workers, args.epochs, every)
        marks = [o for o in notes if "process" in o]
        later = [o for o in marks if o["epoch"] >= args.epochs / 2]

        def slope(key: str, unit: float = 1024, later: list[dict[str, float]] = later) -> str:
            middle, spread = trend([o["epoch"] for o in later], [unit * o[key] for o in later])
            return f"{middle:+.2f} ± {spread:.2f}"
        for key, what in (("process", "the process (RSS)"), ("workers", "its workers (RSS)"),
                          ("own", "their own alone (USS)"))[:3 if workers else 1]:
            curve, main = " ".join(f"{o[key]:.1f}" for o in marks[1::2]), key == "process"
            highest = max(o["highest"] for o in notes) if main else max(o[key] for o in marks)
            waiting = 1024 * statistics.median(o["garbage"] for o in later) / every
            more = [slope("heap"), slope("blocks", 1), slope("history"),
                    f"{waiting:.1f}"] if main else [""] * 4
            rows.append([workers, what, curve, f"{highest:.1f}", slope(key), *more])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table(rows, ["workers", "whose", f"MB after a full collection, every {2 * every} epochs",
                       "at most, collected or not", "grows by, kB an epoch",
                       "the C heap in use, kB an epoch", "Python's blocks an epoch",
                       "the history, kB an epoch", "waits for the collection, kB an epoch"]))
    print(f"\nGrowth is that from epoch {args.epochs // 2} to {args.epochs}. Where the workers' "
          "own grows and all that they hold does not, pages that they "
          "share with the process are copied as they are touched.")


def trend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The median slope between any two points (Theil and Sen), and half the range of the middle
    eighty percent: one step of an allocator is no trend."""
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]
    return float(np.median(slopes)), float((np.quantile(slopes, 0.9) - np.quantile(slopes, 0.1))
                                           / 2)


# Part 6: the cost

class Steps(pl.Callback):
    "When each step ended, on the wall and in processor time of all threads."
    def __init__(self) -> None: self.ends: list[tuple[float, float]] = []
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append((time.perf_counter(), time.process_time()))


def train_for(seconds: float, interval: timedelta | None,
              folder: Path) -> tuple[np.ndarray, list[float]]:
    """Train ResNet-18: seconds of its steps, on the wall and of the processor, and how long each
    last.ckpt inside the epoch stopped it."""
    import timm
    from overhead import CLASSES, batches

    from autotimm import AutoTrainer, ImageClassifier
    pauses: list[float] = []

    class Timed(AutoTrainer):
        def save_checkpoint(self, *arguments: Any, **how: Any) -> None:
            began = time.perf_counter()
            super().save_checkpoint(*arguments, **how)
            pauses.append(time.perf_counter() - began)
    steps = Steps()
    model = ImageClassifier(timm.create_model("resnet18", num_classes=0), CLASSES, lr=1e-4,
                            scheduler=None)
    trainer = Timed(max_time=timedelta(seconds=seconds), max_epochs=-1, callbacks=[steps],
                    default_root_dir=str(folder), checkpoint_interval=interval,
                    checkpoint_monitor=None, enable_progress_bar=False, enable_model_summary=False,
                    accelerator="cpu")
    trainer.fit(model, batches(100_000, 16, 96))
    return np.diff(steps.ends, axis=0)[5:], pauses[:-1]  # the last is that of the end of the run


def checkpoint_cost(args: argparse.Namespace) -> None:
    sides = {"every 10 s": timedelta(seconds=10), "between epochs only": None}
    steps: dict[str, list[np.ndarray]] = {o: [] for o in sides}
    pauses: list[float] = []
    for i in range(args.runs):
        for name in list(sides)[::1 if i % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(prefix="cost-", dir=args.disk) as folder:
                one, stopped = train_for(args.seconds / args.runs, sides[name], Path(folder))
            steps[name].append(one)
            pauses += stopped
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "median": lambda o: float(np.median(o[:, 0])), "mean": lambda o: float(o[:, 0].mean()),
        "processor time, mean": lambda o: float(o[:, 1].mean())}
    rows = [[name, sum(map(len, steps[name])),
             *(f"{1e3 * statistics.median(map(o, steps[name])):.1f}" for o in measures.values())]
            for name in sides]
    a, b = ({k: [*map(o, steps[name])] for k, o in measures.items()} for name in sides)
    rows.append(["ratio, by pair", "",
                 *(f"{statistics.median(x / y for x, y in zip(a[k], b[k])):.3f}"
                   for k in measures)])
    print(table(rows, ["last.ckpt", "steps", *(f"ms a step, {o}" for o in measures)]))
    stop = statistics.median(pauses)
    print(f"\nEach of {len(pauses)} last.ckpt stopped the training for {1e3 * stop:.0f} ms "
          f"({1e3 * min(pauses):.0f} to {1e3 * max(pauses):.0f}): "
          f"{stop / 10:.2%} of ten seconds.\n", flush=True)


class Photos(torch.utils.data.Dataset):
    "JPEG photos of 500 by 375, cropped to 224."
    def __init__(self, folder: Path, count: int = 32):
        from PIL import Image
        rng = np.random.default_rng(0)
        self.paths = [folder / f"{i}.jpg" for i in range(count)]
        for path in self.paths:
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            small.resize((500, 375)).save(path, quality=90)
        from torchvision.transforms import v2
        self.transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True),
                                     v2.RandomHorizontalFlip(),
                                     v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int: return 20 * len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        from torchvision.io import decode_image
        return self.transform(decode_image(str(self.paths[i % len(self.paths)])))


def loader_cost(args: argparse.Namespace) -> None:
    from common import interleave
    from torch.utils.data import DataLoader, TensorDataset

    from autotimm.data.loading import resumable
    def once(loader: DataLoader) -> Callable[[], float]:
        def run() -> float:
            began = time.process_time()
            for _ in loader: pass
            return (time.process_time() - began) / len(loader.dataset)  # type: ignore[arg-type]
        return run
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        sets = {"tensors of 8 numbers": TensorDataset(torch.randn(20_000, 8)),
                "JPEG, random crop": Photos(Path(folder))}
        for name, data in sets.items():
            plain = DataLoader(data, 32, shuffle=True)
            times = interleave({"plain": once(plain),
                                "resumable": once(resumable(DataLoader(data, 32, shuffle=True)))},
                               7)
            a, b = (1e6 * statistics.median(times[o]) for o in ("plain", "resumable"))
            rows.append([name, f"{a:.1f}", f"{b:.1f}", f"{b - a:.1f}",
                         f"{ratio(times, 'resumable', 'plain'):.3f}"])
    print(table(rows, ["data, 0 workers", "DataLoader, µs a sample", "ResumableLoader",
                       "more", "ratio"]) + "\n", flush=True)


def trainer_cost(args: argparse.Namespace) -> None:
    import overhead
    def auto(run: overhead.Run) -> float: return overhead.by_trainer(overhead.Plain(), run)
    def silent(run: overhead.Run) -> float:
        return overhead.by_trainer(overhead.ImageClassifier(overhead.Convolution(),
                                                            overhead.CLASSES, lr=1e-4,
                                                            scheduler=None), run)
    sides = overhead.convolution_sides()
    found = overhead.measure({"by hand": sides["by hand"], "pl.Trainer": sides["pl.Trainer"],
                              "AutoTrainer, the same module": auto,
                              "AutoTrainer, ImageClassifier": silent},
                             overhead.Run(overhead.batches(1005, 16, 8), time.process_time), 7)
    rows = [[name, f"{1e3 * statistics.median(times):.2f}", f"{1e3 * min(times):.2f} to "
                                                            f"{1e3 * max(times):.2f}",
             f"{ratio(found, name, 'pl.Trainer'):.3f}"]
            for name, times in found.items()]
    print(table(rows, ["one small convolution, processor time", "ms a step, median",
                       "lowest and highest", "of pl.Trainer's"]))


def cost(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    checkpoint_cost(args)
    loader_cost(args)
    trainer_cost(args)


PARTS = {"kills": kills, "error": error, "damage": damage, "disk": disk, "memory": memory,
         "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the killed runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3, help="repetitions of what is timed")
    parser.add_argument("--files", type=int, default=1000, help="damaged files of each sort")
    parser.add_argument("--epochs", type=int, default=200,
                        help="of the run whose memory is watched")
    parser.add_argument("--seconds", type=float, default=60,
                        help="of training with and without last.ckpt, each")
    parser.add_argument("--disk", help="folder for the checkpoints whose cost is measured; the "
                                       "system's for temporary files if left out")
    args = parser.parse_args()
    keep_quiet()
    torch.set_num_threads(1)
    for part in args.part:
        print(f"## {part}\n\n{machine()}\n", flush=True)
        PARTS[part](args)
        print(flush=True)


if __name__ == "__main__": main()
