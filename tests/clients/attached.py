"""Attached devices: bight attach and its companions, in a run directory of their own; nothing is left behind."""
import json
import os
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
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        output = self.process.communicate(timeout=harness.PATIENCE)[0]
        if kind is None and (re.search(r"err= *[1-9]|verify:|fio: .*error", output) or self.process.returncode not in (0, 128)):
            raise AssertionError(output)
