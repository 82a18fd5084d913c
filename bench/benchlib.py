"""What every benchmark shares: scratch devices, contestants, fio runs, verdicts, and the table, JSON and plots.

A contestant attaches an image and gives back a Target: the fio options that reach it and, where there is one, the
server process. Whatever is set up here is a context manager, so that errors, SIGTERM and Ctrl-C undo it all.
"""
import contextlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Callable, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TICKS = os.sysconf("SC_CLK_TCK")
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


class BenchError(Exception):
    pass


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse_size(text):
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, None)
    if not number.isdigit():
        raise BenchError(f"{text}: not a size; give bytes, or a number with K, M, G or T")
    return int(number) << UNITS.get(unit, 0)


def call(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


def insist(action, *argv, seconds=10):
    """Undo steps meet EBUSY while the kernel still lets go of the last user."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action(*argv)
        except (BenchError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def put(path, text):
    with open(path, "w") as f:
        f.write(text)


def get(path):
    with open(path) as f:
        return f.read()


def main_guard(main):
    """Runs main: needs root, turns the ending signals into one exception, and lets nothing interrupt the undoing."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(signo, frame):
        for s in ending:
            signal.signal(s, signal.SIG_IGN)
        raise KeyboardInterrupt

    for s in ending:
        signal.signal(s, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("bench: interrupted, everything is undone")
        sys.exit(130)
    except (BenchError, OSError) as error:
        say(f"bench: {error}")
        sys.exit(1)


def need(root=False, tools=()):
    missing = [t for t in tools if not shutil.which(t)]
    if missing:
        raise BenchError(f"not installed: {' '.join(missing)}; run ./dev deps")
    if root and os.geteuid() != 0:
        raise BenchError("only root can set up scratch devices and drop caches; run it as root or with sudo")


# ---- scratch devices and images

@contextlib.contextmanager
def scratch_dir(parent="/dev/shm"):
    path = tempfile.mkdtemp(prefix="bight-bench-", dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def zram(size_bytes):
    """A zram device of its own, so that one that is in use elsewhere is left alone."""
    if not os.path.exists("/sys/class/zram-control"):
        call("modprobe", "zram")
    number = get("/sys/class/zram-control/hot_add").strip()
    try:
        put(f"/sys/block/zram{number}/disksize", str(size_bytes))
        yield f"/dev/zram{number}"
    finally:
        insist(put, "/sys/class/zram-control/hot_remove", number)


@contextlib.contextmanager
def loop(file, direct):
    """The kernel's loop device. It falls back to buffered without a word, so the mode is read back."""
    device = call("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", file)
    try:
        # blockdev --setro outlives the attachment for which it was meant.
        call("blockdev", "--setrw", device)
        if get(f"/sys/block/{os.path.basename(device)}/loop/dio").strip() != str(int(direct)):
            raise BenchError(f"{device}: the kernel refuses direct I/O on {file}")
        yield device
    finally:
        insist(call, "losetup", "-d", device)


@contextlib.contextmanager
def mounted(device, directory):
    os.makedirs(directory, exist_ok=True)
    call("mount", device, directory)
    try:
        yield directory
    finally:
        insist(call, "umount", directory)


@contextlib.contextmanager
def ext4_on_zram(scratch, image_bytes):
    with zram(max(4 << 30, 2 * image_bytes)) as device:
        # Lazy initialisation would write in the background of the first minutes.
        call("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        with mounted(device, scratch + "/ext4") as directory:
            yield directory


@contextlib.contextmanager
def xfs_on_loop(scratch, image_bytes):
    """The loop device below is the default one, buffered: on tmpfs the page cache is the storage."""
    backing = scratch + "/xfs.img"
    with open(backing, "wb") as f:
        f.truncate(max(2 << 30, 2 * image_bytes))
    try:
        with loop(backing, direct=False) as device:
            call("mkfs.xfs", "-q", device)
            with mounted(device, scratch + "/xfs") as directory:
                yield directory
    finally:
        os.unlink(backing)


FILE_SYSTEMS = {"ext4": ("ext4 on zram", ext4_on_zram), "xfs": ("XFS on a loop device on tmpfs", xfs_on_loop)}


class Image:
    """A file without holes. Its bytes do not compress, so zram stores and copies whole pages for everybody."""

    noise = None

    def __init__(self, path, size_bytes):
        self.path, self.size_bytes = path, size_bytes
        self.fill()

    def fill(self):
        if Image.noise is None:
            Image.noise = random.Random(1).randbytes(min(self.size_bytes, 64 << 20))
        mode = "r+b" if os.path.exists(self.path) else "wb"
        with open(self.path, mode, buffering=0) as f:
            while (left := self.size_bytes - f.tell()) > 0:
                f.write(memoryview(Image.noise)[:left])
        self.drop()

    def drop(self):
        with open(self.path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self, pages):
        """By sequential readahead, or as single pages: a 4 KiB write into a large folio is slow on ext4, which then
        becomes the subject instead of the server."""
        with open(self.path, "rb", buffering=0) as f:
            os.fsync(f.fileno())
            if pages:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            if int(call("fincore", "--bytes", "--noheadings", "--output", "RES", self.path)) < self.size_bytes:
                buffer = bytearray(1 << 20)
                while f.readinto(buffer):
                    pass

    def whole(self):
        with open(self.path, "rb") as f:
            return os.lseek(f.fileno(), 0, os.SEEK_HOLE) == self.size_bytes

    def prepare(self, cache, pages=False):
        """The state every run starts from: no holes, nothing dirty, and the page cache "warm" (all of it) or "cold"."""
        if not self.whole():
            self.fill()
        self.warm(pages) if cache == "warm" else self.drop()


# ---- servers and other contestants

class Server:
    """A server process on a unix socket. What it used is exact also for threads that have ended."""

    def __init__(self, argv, workdir, sock):
        self.argv, self.sock = argv, sock
        self.undo = contextlib.ExitStack()  # what has to go before it does
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock)
        self.log = open(workdir + "/server.log", "w+")
        self.started = time.perf_counter()
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.pid = self.process.pid

    def running(self):
        return self.process.poll() is None

    def said(self):
        self.log.seek(0)
        return " ".join(self.log.read().split())[-300:] or "(silent)"

    def cpu_seconds(self):
        fields = get(f"/proc/{self.pid}/stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def switches(self):
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = get(f"/proc/{self.pid}/task/{task}/status")
                total += sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", status)))
        return total

    def peak_mib(self):
        peak = re.search(r"VmHWM:\s+(\d+)", get(f"/proc/{self.pid}/status"))
        if not peak:
            raise BenchError(f"{self.argv[0]}: ended during the run: {self.said()}")
        return int(peak[1]) / 1024

    def stop(self, seconds=60):
        """SIGTERM, and the resource usage of the whole life. The process is gone afterwards, in any case."""
        usage = None
        self.undo.close()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + seconds
            pid = 0
            while not pid and time.monotonic() < deadline:
                pid, status, usage = os.wait4(self.pid, os.WNOHANG)
                time.sleep(0.002)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
            else:
                self.process.kill()
                self.process.wait()
                raise BenchError(f"{self.argv[0]}: did not end within {seconds} s of SIGTERM")
        if self.process.returncode not in (0, -signal.SIGTERM):
            raise BenchError(f"{self.argv[0]}: exit {self.process.returncode}: {self.said()}")
        return usage


@contextlib.contextmanager
def running(argv, workdir, sock):
    """A server that is gone afterwards, stopped or not."""
    server = Server(argv, workdir, sock)
    try:
        yield server
    finally:
        server.undo.close()
        if server.process.returncode is None:
            server.process.kill()
            server.process.wait()
        server.log.close()


class Attached:
    """A device of bight attach, and its worker process. What it used is read while it lives."""

    def __init__(self, bight, options, image, run_dir):
        self.bight, self.run_dir, self.usage = bight, run_dir, None
        self.argv = [bight, "attach", *options, image]
        began = time.perf_counter()
        self.device = self.call("attach", *options, image)
        self.attach_ms = (time.perf_counter() - began) * 1000
        self.name = os.listdir(self.run_dir)[0]
        self.pid = json.loads(self.call("show", "--json", self.name))["worker_pid"]

    def call(self, *argv):
        done = subprocess.run([self.bight, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                              env=os.environ | {"BIGHT_RUN_DIR": self.run_dir})
        if done.returncode:
            raise BenchError(f"bight {argv[0]}: exit {done.returncode}: {done.stderr.strip()[-300:]}")
        return done.stdout.strip()

    said = Server.said
    cpu_seconds, switches, peak_mib = Server.cpu_seconds, Server.switches, Server.peak_mib

    @property
    def log(self):
        return open(f"{self.run_dir}/{self.name}/log")

    def stop(self):
        """Like Server.stop(), but the usage of the worker's threads that are left."""
        if not self.usage:
            self.usage = SimpleNamespace(ru_nvcsw=self.switches(), ru_nivcsw=0)
            insist(self.call, "detach", self.name)
        return self.usage


@contextlib.contextmanager
def attached(bight, options, image, workdir):
    run_dir = tempfile.mkdtemp(prefix="run-", dir=workdir)
    try:
        device = Attached(bight, options, image, run_dir)
        yield device
        device.stop()
    finally:
        if os.listdir(run_dir):
            subprocess.run([bight, "detach", "--all", "--force"], stdin=subprocess.DEVNULL, timeout=60,
                           env=os.environ | {"BIGHT_RUN_DIR": run_dir})


@dataclass
class Target:
    fio: list  # options of fio that reach it
    server: Optional[Server] = None
    vhost: Optional[list] = None  # or vu_load and its socket


@dataclass
class Contestant:
    name: str
    cache: str  # the page cache it starts with: "warm" (buffered) or "cold" (direct)
    attach: Callable  # (image path, work directory) -> context manager giving a Target
    server_argv: Optional[Callable] = None  # (image path, socket) -> argv, for those that have a server


@dataclass
class Row:
    name: str
    rw: str
    bs: str
    depth: int
    unit: str = field(init=False)

    def __post_init__(self):
        self.unit = "kIOPS" if parse_size(self.bs) < 64 << 10 else "MB/s"

    def writes(self):
        return "write" in self.rw

    def of(self, run):
        return run["iops"] / 1000 if self.unit == "kIOPS" else run["mbps"]


def receive(conn, count):
    data = bytearray()
    while len(data) < count:
        part = conn.recv(count - len(data))
        if not part:
            raise BenchError("the server closed the connection")
        data += part
    return bytes(data)


def first_read(server, seconds=20):
    """Milliseconds from just before the server was spawned until it served one 4 KiB read."""
    while True:
        conn = socket.socket(socket.AF_UNIX)
        try:
            conn.connect(server.sock)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            conn.close()
            if not server.running():
                raise BenchError(f"{server.argv[0]}: exit {server.process.returncode} at start: {server.said()}")
            if time.perf_counter() - server.started > seconds:
                raise BenchError(f"{server.argv[0]}: no socket after {seconds} s")
            time.sleep(0.0001)
    with conn:
        conn.settimeout(seconds)
        if receive(conn, 18)[:16] != b"NBDMAGICIHAVEOPT":
            raise BenchError(f"{server.argv[0]}: not an NBD server")
        fixed_newstyle_no_zeroes, opt_export_name, cmd_read, cmd_disc = 3, 1, 0, 2
        conn.sendall(struct.pack(">I8sII", fixed_newstyle_no_zeroes, b"IHAVEOPT", opt_export_name, 0))
        receive(conn, 10)
        conn.sendall(struct.pack(">IHHQQI", 0x25609513, 0, cmd_read, 1, 0, 4096))
        magic, error, cookie = struct.unpack(">IIQ", receive(conn, 16))
        if (magic, error, cookie) != (0x67446698, 0, 1):
            raise BenchError(f"{server.argv[0]}: the first read failed, error {error}")
        receive(conn, 4096)
        served = time.perf_counter()
        conn.sendall(struct.pack(">IHHQQI", 0x25609513, 0, cmd_disc, 2, 0, 0))
    return (served - server.started) * 1000


def wait_for_server(server, is_there, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_there():
        if not server.running():
            raise BenchError(f"{server.argv[0]}: exit {server.process.returncode} at start: {server.said()}")
        if time.monotonic() > deadline:
            raise BenchError(f"{server.argv[0]}: did not begin within {seconds} s: {server.said()}")
        time.sleep(0.001)


def nbd_contestant(name, cache, argv):
    """argv(image, socket) starts an NBD server in the foreground."""
    @contextlib.contextmanager
    def attach(image, workdir):
        sock = workdir + "/nbd.sock"
        with running(argv(image, sock), workdir, sock) as server:
            first_read(server)
            yield Target(["--ioengine=nbd", f"--uri=nbd+unix:///?socket={sock}"], server)
    return Contestant(name, cache, attach, argv)


def loop_contestant(name, cache, direct):
    @contextlib.contextmanager
    def attach(image, workdir):
        with loop(image, direct) as device:
            yield Target(["--ioengine=io_uring", "--direct=1", f"--filename={device}"])
    return Contestant(name, cache, attach)


def attach_contestant(name, cache, bight, *options):
    """The device that bight attach gives."""
    @contextlib.contextmanager
    def attach(image, workdir):
        with attached(bight, options, image, workdir) as server:
            yield Target(["--ioengine=io_uring", "--direct=1", f"--filename={server.device}"], server)
    return Contestant(name, cache, attach)


def vhost_contestant(name, argv, load, queues):
    """argv(image, socket) starts a vhost-user-blk server in the foreground; load: the program vu_load."""
    @contextlib.contextmanager
    def attach(image, workdir):
        sock = workdir + "/vhost.sock"
        with running(argv(image, sock), workdir, sock) as server:
            wait_for_server(server, lambda: os.path.exists(sock))
            yield Target([], server, [load, "--socket", sock, "--queues", str(queues)])
    return Contestant(name, "cold", attach)


@contextlib.contextmanager
def fuse_file(argv, workdir, path):
    """A server whose file is path, by FUSE. What is put on that goes to its undo."""
    put(path, "")
    try:
        with running(argv, workdir, path + ".none") as server:
            wait_for_server(server, lambda: f" {path} fuse" in get("/proc/self/mounts"))
            yield server
            server.stop()
    finally:
        insist(os.unlink, path)


def fuse_contestant(name, argv, around=contextlib.nullcontext):
    """argv(image, path) makes the file path of the image by FUSE; the kernel's loop device is put on that."""
    @contextlib.contextmanager
    def attach(image, workdir):
        path = workdir + "/device"
        with around(), fuse_file(argv(image, path), workdir, path) as server:
            device = server.undo.enter_context(loop(path, True))
            yield Target(["--ioengine=io_uring", "--direct=1", f"--filename={device}"], server)
    return Contestant(name, "cold", attach, argv)


def nbdkit_argv(image, sock):
    return ["nbdkit", "-f", "-U", sock, "file", image]


def qemu_nbd_argv(image, sock):
    return ["qemu-nbd", "--aio=io_uring", "--cache=none", "-f", "raw", "-x", "", "-t", "-e", "16", "-k", sock, image]


def file_contestant(name):
    @contextlib.contextmanager
    def attach(image, workdir):
        yield Target(["--ioengine=io_uring", "--direct=1", f"--filename={image}"])
    return Contestant(name, "cold", attach)


# ---- one run, and all runs

def cpu_clocks():
    """Seconds: all CPUs busy, taken by the hypervisor, used by programs that this one waited for; and the time."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, get("/proc/stat").split("\n")[0].split()[1:9])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ((user + nice + system + irq + softirq) / TICKS, steal / TICKS, children.ru_utime + children.ru_stime,
            time.monotonic())


def fio(target, row, workdir, seconds, ramp, extra=()):
    """A ramp job and then the measured one. fio's own ramp_time hides how many requests it made, and the server's
    CPU time has to be divided by all of them."""
    out = workdir + "/fio.json"
    argv = ["fio", "--output-format=json", f"--output={out}", "--thread", *target.fio,
            f"--rw={row.rw}", f"--bs={row.bs}", f"--iodepth={row.depth}", "--scramble_buffers=0", "--norandommap",
            "--time_based", "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99", *extra,
            "--name=ramp", f"--runtime={round(ramp * 1000)}ms",
            "--name=run", "--stonewall", f"--runtime={round(seconds * 1000)}ms"]
    done = subprocess.run(argv, cwd=workdir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=60 + 10 * (seconds + ramp))
    # The nbd engine talks into the output file, before the JSON.
    talk, brace, rest = get(out).partition("{\n")
    jobs = json.loads(brace + rest)["jobs"] if brace else []
    if done.returncode or len(jobs) != 2 or any(j["error"] for j in jobs):
        raise BenchError(f"fio: exit {done.returncode}: {' '.join((done.stdout + talk).split())[-300:]}")
    side = "write" if row.writes() else "read"
    run, result = jobs[1], jobs[1][side]
    return {"argv": argv, "iops": result["iops"], "mbps": result["bw_bytes"] / 1e6, "requests": result["total_ios"],
            "requests_with_ramp": sum(j[side]["total_ios"] for j in jobs),
            "runtime_ms": result["runtime"], "client_cpu_percent": run["usr_cpu"] + run["sys_cpu"],
            "client_switches": run["ctx"], "lat_mean_us": result["lat_ns"]["mean"] / 1000,
            "lat_p50_us": result["lat_ns"]["percentile"]["50.000000"] / 1000,
            "lat_p99_us": result["lat_ns"]["percentile"]["99.000000"] / 1000}


def vu_load(target, row, seconds, ramp, extra=()):
    """The same by bench/vu_load, which is a guest. extra: of these options of fio it takes --fsync."""
    argv = [*target.vhost, "--rw", row.rw, "--bs", row.bs, "--depth", str(row.depth), "--seconds", str(seconds),
            "--ramp", str(ramp), *(o.replace("--fsync=", "--flush-every=") for o in extra if o.startswith("--fsync="))]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60 + 10 * (seconds + ramp))
    if done.returncode:
        raise BenchError(f"vu_load: exit {done.returncode}: {(done.stderr.strip() or done.stdout)[-300:]}")
    result = json.loads(done.stdout)
    return {"argv": argv, "iops": result["iops"], "mbps": result["iops"] * parse_size(row.bs) / 1e6,
            "requests": result["requests"], "requests_with_ramp": result["requests"] * (seconds + ramp) / seconds,
            "client_cpu_percent": result["cpu_percent"],
            **{key: result[key] for key in ("lat_mean_us", "lat_p50_us", "lat_p99_us")}}


def run_once(contestant, row, image, workdir, seconds, ramp, extra=()):
    with contestant.attach(image.path, workdir) as target:
        server = target.server
        if server:
            cpu, switches = server.cpu_seconds(), server.switches()
        before = cpu_clocks()
        try:
            if target.vhost:
                result = vu_load(target, row, seconds, ramp, extra)
            else:
                result = fio(target, row, workdir, seconds, ramp, extra)
        except BenchError as error:
            raise BenchError(f"{error}; the server: {server.said()}" if server else str(error))
        busy, steal, client, wall = (now - then for now, then in zip(cpu_clocks(), before))
        used = server.cpu_seconds() - cpu if server else 0
        result.update(rest_cpu_percent=max(0, busy - client - used) / wall * 100, steal_percent=steal / wall * 100)
        if server:
            # CPU time was read before the server is told to end, so that its last flush does not count. Context
            # switches come with the exit status: the threads that a server keeps for each connection are gone by now.
            peak = server.peak_mib()
            usage = server.stop()
            requests = result["requests_with_ramp"]
            result.update(server_argv=server.argv, server_cpu_us=used * 1e6 / requests, server_peak_mib=peak,
                          server_switches=(usage.ru_nvcsw + usage.ru_nivcsw - switches) / requests)
        return result


def rotate(items, by):
    by %= max(len(items), 1)
    return items[by:] + items[:by]


def order(contestants, nth):
    """Everyone gets every place. Warm and cold ones stay together, so that the cache is filled once a round."""
    groups = [[c for c in contestants if c.cache == cache] for cache in ("warm", "cold")]
    return [c for group in rotate(groups, nth) for c in rotate(group, nth)]


def measure(file_system, rows, contestants, image, workdir, rounds, seconds, ramp, runs, extra=()):
    """Appends to runs, so that what was measured is kept when the rest is interrupted. One failure costs one cell."""
    total, done, began = len(rows) * rounds * len(contestants), 0, time.monotonic()
    for row in rows:
        if row.writes():
            image.fill()
        for nth in range(rounds):
            for place, contestant in enumerate(order(contestants, nth)):
                image.prepare(contestant.cache, pages=row.writes() and row.unit == "kIOPS")
                run = {"file_system": file_system, "row": row.name, "contestant": contestant.name, "round": nth,
                       "place": place}
                try:
                    run.update(run_once(contestant, row, image, workdir, seconds, ramp, extra))
                    shown = f"{row.of(run):8.1f} {row.unit}"
                except (BenchError, OSError, subprocess.TimeoutExpired) as error:
                    run["failed"] = str(error)
                    shown = f"FAILED: {error}"
                runs.append(run)
                done += 1
                left = (time.monotonic() - began) / done * (total - done)
                say(f"{file_system} {row.name:>9} round {nth + 1}/{rounds} {contestant.name:<22} {shown}"
                    f"  ({left / 60:.0f} min left)")


def measure_starts(contestants, image, workdir, count):
    """Milliseconds from exec to the first served read, for those that have a server."""
    servers = [c for c in contestants if c.server_argv]
    times = {c.name: [] for c in servers}
    sock = workdir + "/nbd.sock"
    for nth in range(count):
        for contestant in rotate(servers, nth):
            with running(contestant.server_argv(image.path, sock), workdir, sock) as server:
                times[contestant.name].append(first_read(server))
                server.stop()
    return times


# ---- what the figures say

def values(runs, row, contestant, metric):
    """One figure a round, by round number."""
    return {r["round"]: metric(r) for r in runs
            if r["row"] == row and r["contestant"] == contestant and "failed" not in r and metric(r) is not None}


def spread(figures):
    return (statistics.median(figures), min(figures), max(figures)) if figures else None


def ratios(a, b):
    """Round by round: the two stood next to each other in time, so a slow minute hits both."""
    both = [a[n] / b[n] for n in a if n in b and b[n]]
    return (statistics.median(a.values()) / statistics.median(b.values()), min(both), max(both)) if both else None


def verdict(triple, aim, at_least, count):
    """Decided only when every round falls on the same side, and from three rounds on."""
    if triple is None:
        return "not measured"
    median, low, high = triple
    if count >= 3 and (low >= aim if at_least else high <= aim):
        return "met"
    if count >= 3 and (high < aim if at_least else low > aim):
        return "missed"
    return "undecided"


def markdown(header, lines):
    cells = [[str(c) for c in line] for line in [header] + lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells) + "\n"


def show(triple, form="{:.1f}"):
    if triple is None:
        return "–"
    median, low, high = (form.format(x) for x in triple)
    return median if low == high else f"{median} ({low}–{high})"


def details(runs, rows, contestants):
    """Everything but the ranking: one line for each row and contestant, medians of the rounds."""
    metrics = [("kIOPS", lambda r: r["iops"] / 1000, "{:.1f}"), ("MB/s", lambda r: r["mbps"], "{:.0f}"),
               ("p50 µs", lambda r: r["lat_p50_us"], "{:.0f}"), ("p99 µs", lambda r: r["lat_p99_us"], "{:.0f}"),
               ("client CPU %", lambda r: r["client_cpu_percent"], "{:.0f}"),
               ("server CPU µs/request", lambda r: r.get("server_cpu_us"), "{:.2f}"),
               ("switches/request", lambda r: r.get("server_switches"), "{:.3f}"),
               ("rest of machine CPU %", lambda r: r["rest_cpu_percent"], "{:.0f}"),
               ("server peak MiB", lambda r: r.get("server_peak_mib"), "{:.1f}")]
    lines = []
    for row in rows:
        for contestant in contestants:
            line = [row.name, contestant.name]
            for _, metric, form in metrics:
                figures = values(runs, row.name, contestant.name, metric)
                line.append(form.format(statistics.median(figures.values())) if figures else "–")
            lines.append(line)
    return markdown(["row", "contestant", *(name for name, _, _ in metrics)], lines)


def plot(path, title, runs, rows, contestants):
    """One bar chart: 4 KiB rows in thousands of requests, large ones in MB/s, with the range of the rounds."""
    panels = [(unit, [r for r in rows if r.unit == unit]) for unit in ("kIOPS", "MB/s")]
    panels = [(unit, rows_here) for unit, rows_here in panels if rows_here]
    script = ["set terminal svg size 1200,520 background rgb 'white' font 'sans-serif,12'", f"set output '{path}'",
              f"set multiplot layout 1,{len(panels)} title {quoted(title)}", "set style data histograms",
              "set style histogram errorbars gap 2 lw 1", "set style fill solid 0.85 border -1", "set yrange [0:*]",
              "set grid ytics", "set datafile missing '?'", "set key below"]
    for number, (unit, rows_here) in enumerate(panels):
        script.append(f"$panel{number} << END")
        for row in rows_here:
            line = [row.name]
            for contestant in contestants:
                triple = spread(list(values(runs, row.name, contestant.name, row.of).values()))
                line += [f"{x:.3f}" for x in triple] if triple else ["?"] * 3
            script.append(" ".join(line))
        script.append("END")
        series = ", ".join(f"$panel{number} using {3 * i + 2}:{3 * i + 3}:{3 * i + 4}:xtic(1) title '{c.name}'"
                           for i, c in enumerate(contestants))
        script.append(f"set ylabel '{unit}'\nplot {series}")
    gnuplot(script)


def version(*argv):
    with contextlib.suppress(OSError):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
        return done.stdout.strip().split("\n")[0]
    return None


def quietness(seconds=1):
    """What others use of this machine while we do nothing, in percent of one core."""
    busy, _, _, then = cpu_clocks()
    time.sleep(seconds)
    busy_after, _, _, now = cpu_clocks()
    return (busy_after - busy) / (now - then) * 100


def machine():
    cpu = re.search(r"model name\s*:\s*(.*)", get("/proc/cpuinfo"))
    vm = {name: get(f"/proc/sys/vm/{name}").strip() for name in ("dirty_ratio", "dirty_background_ratio")}
    return {"kernel": platform.release(), "cpu": cpu[1] if cpu else platform.machine(), "cpus": os.cpu_count(),
            "virtual": "hypervisor" in get("/proc/cpuinfo"),
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20, "vm": vm,
            "others_cpu_percent": quietness(), "fio": version("fio", "--version"),
            "nbdkit": version("nbdkit", "--version"), "qemu-nbd": version("qemu-nbd", "--version"),
            "libnbd": version("nbdinfo", "--version")}


def choose(what, wanted, have):
    """Those of have, a dict, that are named in wanted, comma separated; all where that is empty."""
    names = wanted.split(",") if wanted else list(have)
    unknown = [n for n in names if n not in have]
    if unknown:
        raise BenchError(f"{what} {' '.join(unknown)}: unknown; there are {' '.join(have)}")
    return [have[n] for n in have if n in names]


def find_bight(path):
    for p in [path] if path else [f"{ROOT}/{d}/bight" for d in ("build-bench", "build")]:
        if os.access(p, os.X_OK):
            return os.path.abspath(p)
    raise BenchError(f"{path or 'build/bight'}: no such program; ./dev build makes it")


def check_scratch(what, needed, available, instead):
    if needed > available:
        raise BenchError(f"{what}: {needed >> 20} MiB are needed, {max(available, 0) >> 20} are free; {instead}")


def memory_available():
    return int(re.search(r"MemAvailable:\s+(\d+)", get("/proc/meminfo"))[1]) << 10


def results_dir(name):
    """Of one measurement, in the directory of the whole: ./dev bench says which that is."""
    path = os.environ.get("BIGHT_BENCH_RESULTS") or f"{ROOT}/bench/results/{time.strftime('%Y-%m-%d-%H%M%S')}"
    path += f"/{name}"
    os.makedirs(path)
    return path


def machine_text(facts):
    return (f"{facts['cpus']} CPUs{' (virtual)' if facts['virtual'] else ''}: {facts['cpu']}, {facts['memory_mib']} MiB, "
            f"Linux {facts['kernel']}")


class Report:
    """What a measurement leaves: results.json, table.md and plots; kept up while it runs, so that an interrupted one
    loses nothing of what it had."""

    def __init__(self, name, args, bight, notes, how):
        self.directory, self.text, self.runs, self.plots = results_dir(name), "", [], []
        facts = machine()
        facts["bight"] = version(bight, "--version")
        self.facts = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "machine": facts,
                      "options": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, type(None)))}}
        self.figures = {}  # of no run
        others = facts["others_cpu_percent"]
        self.add(f"# bench {name}, {self.facts['date']}\n\n{machine_text(facts)}; "
                 + "; ".join(facts[v] for v in ("bight", "nbdkit", "qemu-nbd", "fio") if facts[v])
                 + f".\n{how} Before the start others used {others:.0f} % of one core"
                 f"{'' if others < 10 else ': **not a quiet machine, verdicts may be wrong**'}.\n\n{notes}\n")

    def add(self, text):
        print(text, flush=True)
        self.text += text
        self.save()

    def save(self):
        put(self.directory + "/table.md", self.text)
        put(self.directory + "/results.json", json.dumps(self.facts | {"figures": self.figures, "runs": self.runs}, indent=1))

    def add_aims(self, aims):
        if aims:
            self.add("### Aims\n\n" + markdown(AIMS_HEADER, aims) + "\n")

    def add_failed(self, runs):
        failed = [r for r in runs if "failed" in r]
        if failed:
            self.add("### Failed\n\n"
                     + "".join(f"- {r['row']}, {r['contestant']}: {r['failed']}\n" for r in failed) + "\n")

    def end(self):
        self.save()
        say(f"bench: {os.path.relpath(self.directory)}/ has results.json, table.md and the plots")
        return 1 if any("failed" in r for r in self.runs) else 0


AIMS_HEADER = ["row", "aim", "wanted", "measured", "verdict"]


def aim(row, what, triple, wanted, at_least, count, form="{:.2f}"):
    """A line of a table of aims."""
    return [row, what, f"{'≥' if at_least else '≤'} {wanted}", show(triple, form),
            verdict(triple, wanted, at_least, count)]


def quoted(text):
    """For gnuplot."""
    return "'" + text.replace("'", "''") + "'"


def plot_lines(path, title, x_title, y_title, series, log=True):
    """series: {name: [(x, y)...]}."""
    script = ["set terminal svg size 900,480 background rgb 'white' font 'sans-serif,12'", f"set output '{path}'",
              f"set title {quoted(title)}", f"set xlabel {quoted(x_title)}", f"set ylabel {quoted(y_title)}", "set grid", "set key below",
              "set yrange [0:*]", *(["set logscale x"] if log else [])]
    for number, points in enumerate(series.values()):
        script += [f"$s{number} << END", *(f"{x} {y}" for x, y in points), "END"]
    script.append("plot " + ", ".join(f"$s{n} using 1:2 with linespoints title '{name}'"
                                      for n, name in enumerate(series)))
    gnuplot(script)


def gnuplot(script):
    done = subprocess.run(["gnuplot"], input="\n".join(script) + "\n", text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise BenchError(f"gnuplot: {done.stdout.strip()[-300:]}")
