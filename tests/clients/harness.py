"""Starts servers, makes scratch images and file systems, runs client programs; leaves nothing behind.

BIGHT names the binary, BIGHT_TEST_QUICK=1 cuts the rounds (sanitizers are slow), BIGHT_SEED repeats a random run.
"""
import atexit
import contextlib
import ctypes
import functools
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import unittest
import urllib.parse

import raw

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIGHT = os.path.abspath(os.environ.get("BIGHT") or os.path.join(ROOT, "build", "bight"))
QUICK = os.environ.get("BIGHT_TEST_QUICK") == "1"
SEED = int(os.environ.get("BIGHT_SEED") or random.SystemRandom().randrange(1 << 32))
RINGS = ("uring", "threads")
IOS = ("direct", "buffered")
WRITEBACK = "writeback"  # direct, with as little memory as there can be: it is full all the time
K, M, G = 1 << 10, 1 << 20, 1 << 30
PATIENCE = raw.PATIENCE
SANITIZER = re.compile(r"(ERROR|WARNING): \w+Sanitizer|runtime error:|SUMMARY: \w+Sanitizer")

libc = ctypes.CDLL(None, use_errno=True)


def rounds(count):
    return max(1, count // 4) if QUICK else count


@functools.cache
def sanitized():
    """The sanitizer that the binary is built with, or None; its memory and speed say nothing then."""
    with open(BIGHT, "rb") as binary:
        found = re.search(rb"__([atm]san)_init", binary.read())
    return found and found[1].decode()


def wait_until(condition, what):
    """Poll for what is bound to come."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"never came: {what}")
        time.sleep(0.01)


# Undoing

_stacks = []


def undo_stack():
    """An ExitStack that is also closed when the tests are interrupted."""
    stack = contextlib.ExitStack()
    _stacks.append(stack)
    return stack


@atexit.register
def _undo_all():
    for stack in reversed(_stacks):
        with contextlib.suppress(Exception):
            stack.close()


def _interrupted(number, _frame):
    signal.signal(number, signal.SIG_IGN)  # the undoing is not to be interrupted
    raise KeyboardInterrupt(f"signal {number}")  # the one exception that unittest does not swallow


signal.signal(signal.SIGTERM, _interrupted)


# Programs

def have(tool):
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def need(*tools):
    """Skip without these programs."""
    missing = [tool for tool in tools if not have(tool)]
    return unittest.skipIf(missing, f"not installed: {' '.join(missing)}")


def need_root(thing):
    return unittest.skipIf(os.geteuid(), "needs root")(thing)


def run(*command, status=0, timeout=PATIENCE * 2, **options):
    """Run a program; its exit status has to be `status` (None: any). Returns the CompletedProcess with text."""
    command = [have(command[0]) or command[0], *map(str, command[1:])]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
               "errors": "replace"} | options
    done = subprocess.run(command, timeout=timeout, check=False, **options)
    if status is not None and done.returncode != status:
        raise AssertionError(f"exit status {done.returncode}, not {status}: {' '.join(command)}\n{done.stdout or ''}"
                             f"{done.stderr or ''}")
    return done


def thread_states(pid):
    """The letters of proc_pid_stat(5)."""
    states = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            states.add(read_file(f"/proc/{pid}/task/{thread}/stat").rpartition(b") ")[2][:1].decode())
    return states


def die_with_parent():
    """In a child before exec: no process outlives a test run that was killed."""
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)


def refuse_io_uring():
    """In a child before exec: the kernel answers io_uring_setup with EPERM, as container runtimes do."""
    # ld [0] (the system call); jeq 425; ret ERRNO(EPERM); ret ALLOW
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0):
        os._exit(99)


@functools.cache
def io_uring_works():
    """False where the kernel or a container forbids io_uring: then only the other ring can be tested."""
    params = ctypes.create_string_buffer(120)
    fd = libc.syscall(425, 4, params)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def rings():
    return RINGS if io_uring_works() else RINGS[1:]


def ways(ios=IOS):
    """(ring, io) to run a test with. In a quick run only half of them, each ring and each io among them: under TSan the
    other half than under ASan."""
    every = [(ring, io) for ring in rings() for io in ios]
    if not QUICK or not io_uring_works():
        return every
    odd = sanitized() == "tsan"
    return [(ring, io) for ring, io in every if (RINGS.index(ring) + ios.index(io)) % 2 == odd]


# Images and file systems

@functools.lru_cache(maxsize=16)
def pattern(size, seed=0):
    """Bytes that differ at every offset and hold no zero, so that a lost or moved byte shows."""
    unit = random.Random(seed).randbytes(65521).replace(b"\0", b"\1")
    return (unit * (size // len(unit) + 1))[:size]


def write_file(path, data=b"", size=None):
    with open(path, "wb") as file:
        file.write(data)
        if size is not None:
            file.truncate(size)
    return path


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def allocated(path):
    return os.stat(path).st_blocks * 512


@contextlib.contextmanager
def loop_device(size, sector=512, backing=None, options=()):
    """A loop device on a file in memory. Skips where there can be none."""
    if os.geteuid():
        raise unittest.SkipTest("loop devices need root")
    with undo_stack() as stack:
        path = backing
        if path is None:
            fd, path = tempfile.mkstemp(prefix="bight-loop-", dir="/dev/shm")
            os.close(fd)
            stack.callback(os.unlink, path)
            os.truncate(path, size)
        for attempt in range(5):  # another process may take the device that was found
            found = run("losetup", "--find", "--show", "--sector-size", sector, *options, path, status=None)
            if found.returncode == 0:
                break
            time.sleep(0.1 * attempt)
        else:
            raise unittest.SkipTest(f"no loop device: {found.stderr.strip()}")
        device = found.stdout.strip()
        stack.callback(run, "losetup", "--detach", device, status=None)
        yield device


@contextlib.contextmanager
def mounted(source, kind, options=""):
    with undo_stack() as stack:
        point = tempfile.mkdtemp(prefix="bight-mnt-")
        stack.callback(os.rmdir, point)
        done = run("mount", "-t", kind, "-o", f"rw,{options}".rstrip(","), source, point, status=None)
        if done.returncode:
            raise unittest.SkipTest(f"cannot mount {kind}: {done.stderr.strip()}")

        def unmount():
            for _ in range(100):  # the kernel may hold a file of a killed process a little longer
                if run("umount", point, status=None).returncode == 0:
                    return
                time.sleep(0.05)
            run("umount", "--lazy", point, status=None)

        stack.callback(unmount)
        yield point


MKFS = {"ext4": ("mkfs.ext4", "-q", "-F"), "ext3": ("mkfs.ext3", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f"),
        "btrfs": ("mkfs.btrfs", "-q", "-f")}


@contextlib.contextmanager
def filesystem(kind, size=512 * M, sector=512, options=""):
    """A fresh file system on a loop device; yields where it is mounted."""
    if not have(MKFS[kind][0]):
        raise unittest.SkipTest(f"not installed: {MKFS[kind][0]}")
    with loop_device(size, sector) as device:
        run(*MKFS[kind], device)
        with mounted(device, kind, options) as point:
            yield point


@contextlib.contextmanager
def scratch_dir(parent=None):
    with undo_stack() as stack:
        path = tempfile.mkdtemp(prefix="bight-test-", dir=parent)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


# The server

def io_args(io):
    if io == WRITEBACK:
        return ["--io", "direct", "--writeback=1M"]
    return ["--io", io] if io else []


class StartError(AssertionError):
    def __init__(self, status, stderr):
        super().__init__(f"the server ended with {status} before it was ready:\n{stderr}")
        self.status, self.stderr = status, stderr


class Server:
    """A `bight serve`. Leaving the block stops it with SIGTERM and holds it to a clean end."""

    def __init__(self, *images, args=(), nbd=None, ring=None, io=None, wrap=(), setup=None, env=None, pass_fds=()):
        self.stack = undo_stack()
        self.dir = self.stack.enter_context(scratch_dir())
        os.chmod(self.dir, 0o777)
        self.socket = os.path.join(self.dir, "nbd.sock")
        self.stderr_path = os.path.join(self.dir, "stderr")
        self.command = [*wrap, BIGHT, "serve", *(["--ring", ring] if ring else []), *io_args(io),
                        *map(str, args), *map(str, images)]
        for address in ([f"unix:{self.socket}"] if nbd is None else nbd):
            self.command += ["--nbd", address]
        self.setup, self.env, self.pass_fds = setup, env or {}, pass_fds
        self.process = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind, *_):
        try:
            if self.process.poll() is None and kind is None:
                self.stop()
            elif self.process.poll() is None:
                self.kill()
            if kind is not None and self.stderr():
                print(f"server's stderr:\n{self.stderr()}", flush=True)
        finally:
            self.stack.close()

    def start(self):
        notify = self.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        path = os.path.join(self.dir, "notify")
        notify.bind(path)
        os.chmod(path, 0o777)
        self.notify = notify
        # a small quarantine: else freed memory is kept and looks like a leak in the RSS
        env = os.environ | {"ASAN_OPTIONS": "quarantine_size_mb=4:" + os.environ.get("ASAN_OPTIONS", ""),
                            "UBSAN_OPTIONS": "print_stacktrace=1:" + os.environ.get("UBSAN_OPTIONS", ""),
                            "NOTIFY_SOCKET": path} | self.env

        def prepare():
            die_with_parent()
            if self.setup:
                self.setup()

        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                                            env=env, preexec_fn=prepare, pass_fds=self.pass_fds)
        self.stack.callback(self.kill)
        notify.settimeout(0.05)
        deadline = time.monotonic() + PATIENCE
        while "READY=1" not in self.notified():
            if self.process.poll() is not None:
                if os.geteuid() and "io_uring_setup: Cannot allocate memory" in self.stderr():
                    raise unittest.SkipTest("this user's locked memory is used up by other rings")
                raise StartError(self.process.returncode, self.stderr())
            if time.monotonic() > deadline:
                raise AssertionError(f"no READY=1 from the server:\n{self.stderr()}")

    def notified(self):
        """The next notification, as its lines."""
        try:
            return self.notify.recv(4096).decode().split("\n")
        except (TimeoutError, BlockingIOError):
            return []

    @property
    def pid(self):
        return self.process.pid

    def stderr(self):
        with open(self.stderr_path, errors="replace") as file:
            return file.read()

    def assert_alive(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.stderr()}")

    def stop(self, number=signal.SIGTERM):
        """A clean end: exit status 0 and nothing from a sanitizer. Returns what was on stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, status=0):
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end:\n{self.stderr()}") from None
        text = self.stderr()
        if self.process.returncode != status or SANITIZER.search(text):
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{text}")
        return text

    def suspend(self):
        """SIGSTOP, and wait for it: one thread is told, and has to run before the others are."""
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: thread_states(self.pid) == {"T"}, "all threads stopped")

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def uri(self, export=""):
        return f"nbd+unix:///{urllib.parse.quote(export)}?socket={self.socket}"

    def connect(self, mode="structured", export="", meta=True):
        return raw.connect(self.socket, mode, export, meta)

    def client(self):
        """A connection on which nothing was said yet."""
        return raw.Client(self.socket)

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss(self):
        with open(f"/proc/{self.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) * K


class Case(unittest.TestCase):
    """A test with a scratch directory."""

    def setUp(self):
        self.dir = self.enterContext(scratch_dir())

    def path(self, name):
        return os.path.join(self.dir, name)

    def image(self, data=b"", size=None, name="disk.img"):
        return write_file(self.path(name), data, size)

    def serve(self, *images, **options):
        return self.enterContext(Server(*images, **options))


def variant(module, tests, base, **attributes):
    """Make a test class out of a class of tests: `tests` with these attributes, named for them."""
    name = "_".join([tests.__name__, *map(str, attributes.values())])
    module[name] = type(name, (tests, base), attributes | {"__module__": module["__name__"]})


def usable_fds(count):
    """Raise our own limit of open files; skip where it cannot be raised that far."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise unittest.SkipTest(f"the limit of open files is {hard}, {count} are needed")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
