"""Attached devices: bight attach and its companions, in a run directory of their own; nothing is left behind."""
import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import time

import harness

BUSY = re.compile(r"connected|mounted|open")


class Attached(harness.Case):
    """A test with a run directory. Leaving it detaches everything, and holds that to work."""

    uid = None  # of who attaches: ours

    def setUp(self):
        super().setUp()
        os.chmod(self.dir, 0o777)
        self.run_dir = self.path("run")
        for path in (self.run_dir, self.path("socks")):
            os.mkdir(path, 0o755)
            if self.uid is not None:
                os.chown(path, self.uid, self.uid)
        self.addCleanup(self.detach_all)

    def sock(self, name):
        return self.path(f"socks/{name}")

    def env(self):
        return os.environ | {"BIGHT_RUN_DIR": self.run_dir}

    def as_user(self):
        if self.uid is None:
            return []
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]

    def bight(self, *args, status=0, **options):
        """Run a command; returns its stdout."""
        done = harness.run(*self.as_user(), harness.BIGHT, *args, status=None, env=self.env(), **options)
        self.stderr = done.stderr
        if status not in (None, done.returncode) or harness.SANITIZER.search(done.stderr):
            raise AssertionError(f"bight {' '.join(map(str, args))}: {done.returncode}\n{done.stdout}{done.stderr}"
                                 f"{self.logs()}")
        return done.stdout.strip()

    def attach(self, *args, **options):
        return self.bight("attach", *args, **options)

    def show(self, name):
        return json.loads(self.bight("show", "--json", name))

    def list(self):
        return {device["name"]: device for device in json.loads(self.bight("list", "--json"))}

    def wait_for_writes(self, name):
        """A load that is not under way yet can neither see an error nor be stopped."""
        def writes():
            return json.loads(self.bight("stats", "--json", name))["ops"]["write"]["done"]

        before = writes()
        harness.wait_until(lambda: writes() > before + 100, "writes")

    def logs(self):
        text = ""
        for name in os.listdir(self.run_dir):
            path = os.path.join(self.run_dir, name, "log")
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    text += file.read()
        return text

    def detach_all(self):
        logs = self.logs()
        self.bight("detach", "--all", "--force")
        self.assertEqual(os.listdir(self.run_dir) + os.listdir(self.path("socks")), [])
        if harness.SANITIZER.search(logs):
            raise AssertionError(logs)

    def kill_worker(self, name):
        """kill -9, and wait until another one answers."""
        before = self.show(name)
        os.kill(before["worker_pid"], signal.SIGKILL)
        harness.wait_until(lambda: self.show_or_none(name).get("worker_pid", before["worker_pid"]) != before["worker_pid"],
                           "another worker")

    def show_or_none(self, name):
        done = harness.run(*self.as_user(), harness.BIGHT, "show", "--json", name, status=None, env=self.env())
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        harness.wait_until(lambda: not any(alive(pid) for pid in pids), "the end of what was killed")


def alive(pid):
    """Also not as a zombie whose parent does not care."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def qemu_io(uri, *commands, status=0):
    args = [arg for command in commands for arg in ("-c", command)]
    done = harness.run("qemu-io", "-f", "raw", uri, *args, status=None)
    failed = re.search(r"fail|error|can't|verification", done.stdout + done.stderr, re.I)
    if (status == 0) == bool(failed or done.returncode):
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout + done.stderr


class SwitchLoad:
    """Reads and writes while images are switched, and knows what each may see.

    The first half of each image is read: blocks that tell the image and their place. In the second half each write
    has a place of its own. connect() gives what has read(offset, length) and write(offset, data).
    """

    SIZE, BLOCK, WRITE = 48 * harness.M, 64 * harness.K, 4 * harness.K

    def __init__(self, connect, read_bytes=BLOCK):
        self.connect = connect
        self.read_bytes = read_bytes
        self.is_over = False
        self.reads, self.writes = [], []  # (begin, end, what)
        self.switches = []  # (begin, end, letter)

    @classmethod
    def unit(cls, letter, offset):
        return f"{letter}{offset:015d}".encode()

    @classmethod
    def contents(cls, letter):
        return b"".join(cls.unit(letter, offset) * (cls.WRITE // 16) for offset in range(0, cls.SIZE // 2, cls.WRITE))

    def read_some(self, seed):
        dice = random.Random(seed)
        with self.connect() as client:
            while not self.is_over:
                offset = dice.randrange(0, self.SIZE // 2, self.read_bytes)
                begin = time.monotonic()
                data = client.read(offset, self.read_bytes)
                end = time.monotonic()
                letter = chr(data[0])
                expected = b"".join(self.unit(letter, at) * (self.WRITE // 16)
                                    for at in range(offset, offset + self.read_bytes, self.WRITE))
                if data != expected:
                    raise AssertionError(f"torn: {offset}: {set(data[::self.WRITE])}")
                self.reads.append((begin, end, letter))

    def write_some(self, number):
        with self.connect() as client:
            for offset in range(self.SIZE // 2 + number * self.WRITE, self.SIZE, 2 * self.WRITE):
                if self.is_over:
                    break
                begin = time.monotonic()
                client.write(offset, self.unit("w", offset) * (self.WRITE // 16))
                self.writes.append((begin, time.monotonic(), offset))
                time.sleep(0.0005)

    def run(self, switch, letters, nr_switches):
        """switch(letter); letters: of the images, the first of which is there."""
        self.switches.append((0, 0, letters[0]))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = [pool.submit(self.read_some, seed) for seed in range(2)]
            jobs += [pool.submit(self.write_some, number) for number in range(2)]
            try:
                for n in range(nr_switches):
                    before = len(self.reads), len(self.writes)
                    harness.wait_until(lambda: any(job.done() for job in jobs) or
                                       len(self.reads) > before[0] + 20 and len(self.writes) > before[1] + 20, "requests")
                    letter = letters[(n + 1) % len(letters)]
                    begin = time.monotonic()
                    switch(letter)
                    self.switches.append((begin, time.monotonic(), letter))
                time.sleep(0.1)
            finally:
                self.is_over = True
            for job in jobs:
                job.result()

    def may_be(self, begin, end):
        """The images that a request of that time may have met."""
        letters = {[letter for _, done, letter in self.switches if done < begin][-1]}
        return letters | {letter for asked, done, letter in self.switches if done >= begin and asked <= end}

    def check(self, images):
        """images: {letter: contents}, now that all of it has been flushed."""
        for begin, end, letter in self.reads:
            if letter not in self.may_be(begin, end):
                raise AssertionError(f"read of {letter!r} instead of {self.may_be(begin, end)}")
        for begin, end, offset in self.writes:
            data = self.unit("w", offset) * (self.WRITE // 16)
            found = {letter for letter, image in images.items() if image[offset:offset + self.WRITE] == data}
            blank = {letter for letter, image in images.items() if not any(image[offset:offset + self.WRITE])}
            if len(found) != 1 or found | blank != set(images) or not found <= self.may_be(begin, end):
                raise AssertionError(f"write at {offset} is in {found}, not in {blank}, of {self.may_be(begin, end)}")


class Load:
    """fio writes to an NBD URI, or a file, and verifies, as long as the block lasts; an error of it is ours."""

    def __init__(self, where, size, seconds=600, extra=(), kind="nbd"):
        target = {"nbd": ["--ioengine=nbd", f"--uri={where}"],
                  "file": ["--ioengine=libaio", "--direct=1", f"--filename={where}", "--thread"]}[kind]
        self.command = ["fio", "--name=load", *target, "--rw=randwrite", "--bs=4k", "--iodepth=16",
                        f"--size={size}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64",
                        "--verify_state_save=0", "--time_based", f"--runtime={seconds}", *extra]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, preexec_fn=harness.die_with_parent)
        time.sleep(0.3)
        harness.wait_until(self.takes_sigint, "fio's start")
        return self

    def takes_sigint(self):
        """Or has ended: on a busy machine it may take a while, and would just die of the signal before."""
        caught = re.search(r"SigCgt:\s*(\w+)", harness.read_file(f"/proc/{self.process.pid}/status").decode())
        return self.process.poll() is not None or int(caught[1], 16) & 1 << (signal.SIGINT - 1)

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        output = self.process.communicate(timeout=harness.PATIENCE)[0]
        if kind is None and (re.search(r"err= *[1-9]|verify:|fio: .*error", output) or self.process.returncode not in (0, 128)):
            raise AssertionError(output)
