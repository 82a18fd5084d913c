#!/usr/bin/python3
"""--map fastfs on real file systems: against a model while others open the image, at power cuts, and where it cannot be.

What is redirected by mistake lands in somebody else's file: so every other file of the file system is compared, too,
and the file system is checked. BIGHT_SEED repeats the choice of operations.
"""
import contextlib
import fcntl
import hashlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "clients"))
import harness
import raw
from harness import K, M, Server, filesystem, have, run, rounds, wait_until
from test_model import Model, Shadow

KINDS = ("ext4", "xfs")
SIZE = 18 * M  # a region of the map, and a part of one


def served(path, *args, **options):
    return Server(path, args=["--map", "fastfs", "-v", *args], **options)


def status(server):
    """What the counters tell of the map."""
    seen = len(server.stderr())
    server.process.send_signal(signal.SIGUSR1)
    line = re.compile(r"map fastfs: (redirects|does not redirect).*: (\d+) bytes in (\d+) extents, (\d+) bytes of zeroes, "
                      r"(\d+) by way of the file, (\d+) not asked.* (\d+) times\n")
    wait_until(lambda: line.search(server.stderr(), seen), "the counters")
    match = line.search(server.stderr(), seen)
    names = ("bytes", "extents", "zero", "file", "unknown", "breaks")
    return {"redirects": match[1] == "redirects"} | dict(zip(names, map(int, match.groups()[1:])))


def wait_for_redirection(server):
    wait_until(lambda: status(server)["redirects"], "redirection")


def make_image(path, chance, size=SIZE):
    """Data, holes and unwritten extents in pieces of all sizes; returns the contents."""
    data = bytearray(size)
    with open(path, "wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(4 * K * chance.choice((1, 2, 3, 16, 64, 512)), size - at)
            kind = chance.choice("ddhu")
            if kind == "d":
                data[at:at + length] = chance.randbytes(length)
                file.seek(at)
                file.write(data[at:at + length])
            elif kind == "u":
                file.flush()
                os.posix_fallocate(file.fileno(), at, length)
            at += length
    return data


def check_whole(model, data):
    """In pieces: the model looks at every byte of what is not equal, as where something was trimmed."""
    for at in range(0, model.size, 4 * K):
        if data[at:at + 4 * K] != model.shadow.data[at:at + 4 * K]:
            wrong = model.shadow.mismatch(at, data[at:at + 4 * K])
            if wrong is not None:
                model.fail(f"byte {wrong}", f"is {data[wrong]:#x}, not {model.shadow.data[wrong]:#x}")


def check_filesystem(kind, device):
    if kind == "ext4":
        run("e2fsck", "-f", "-n", device)
    else:
        run("xfs_repair", "-n", device)


class Others:
    """What happens around the image meanwhile: other files come and go, and somebody opens the image."""

    def __init__(self, point, image, kind, seed):
        self.point, self.image, self.kind, self.chance = point, image, kind, random.Random(seed)
        self.size = os.path.getsize(image)
        self.files, self.opened, self.waits, self.errors = {}, 0, [], []
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self.loop, args=(work,)) for work in (self.fill, self.open)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join(harness.PATIENCE)

    def loop(self, work):
        number = 0
        while not self.stopping.is_set():
            try:
                work(number)
            except Exception as error:  # pylint: disable=broad-except
                self.errors.append(error)
                return
            number += 1

    def fill(self, number):
        """A file of known contents, on the disk at once: it takes blocks that a punch has freed."""
        name, size = f"other-{number}", 4 * K * self.chance.randrange(1, 64)
        data = self.chance.randbytes(size)
        try:
            with open(f"{self.point}/{name}", "wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            self.files[name] = hashlib.sha256(data).digest()
        except OSError:  # full
            os.unlink(f"{self.point}/{name}")
        while len(self.files) > 200:
            name = self.chance.choice(list(self.files))
            os.unlink(f"{self.point}/{name}")
            del self.files[name]
        time.sleep(0.002)

    def open(self, number):
        """Whoever opens the image for reading, for writing, by its name or with intent to move its blocks."""
        begin = time.monotonic()
        fd = os.open(self.image, os.O_RDWR if number % 2 else os.O_RDONLY)
        self.waits.append(time.monotonic() - begin)
        what = self.chance.randrange(6)
        try:
            if what == 0:
                while os.read(fd, M):
                    pass
            elif what == 1:
                os.truncate(self.image, self.size + 64 * K)
                os.truncate(self.image, self.size)
            elif what == 2 and self.kind == "xfs":
                run("cp", "--reflink=always", self.image, f"{self.point}/snapshot")
            elif what == 3 and self.kind == "ext4" and have("e4defrag"):
                run("e4defrag", self.image, status=None)
            elif what == 3 and self.kind == "xfs" and have("xfs_fsr"):
                run("xfs_fsr", self.image, status=None)
            elif what == 4:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(fd, 0, self.size)  # holes become unwritten extents
        finally:
            os.close(fd)
        self.opened += 1
        time.sleep(self.chance.choice((0, 0.001, 0.05, 0.2)))

    def check(self, point):
        for name, digest in self.files.items():
            if hashlib.sha256(harness.read_file(f"{point}/{name}")).digest() != digest:
                raise AssertionError(f"{name} has been written to")


@unittest.skipIf(os.geteuid(), "needs root")
class Fastfs(unittest.TestCase):
    def test_operations_of_all_kinds_while_others_open_the_image(self):
        for kind, ring in itertools.product(KINDS, harness.rings()):
            with self.subTest(kind=kind, ring=ring, BIGHT_SEED=harness.SEED), harness.loop_device(400 * M) as device:
                run(*harness.MKFS[kind], device)
                with harness.mounted(device, kind) as point:
                    files = self.disturbed(f"{point}/disk.img", point, kind, ring)
                check_filesystem(kind, device)
                with harness.mounted(device, kind) as point:  # from the disk, not from the cache
                    files.check(point)

    def disturbed(self, path, point, kind, ring):
        shadow = Shadow(make_image(path, random.Random(harness.SEED)))
        with served(path, "--queues", "4", ring=ring) as server:
            with Others(point, path, kind, harness.SEED) as others:
                model = Model(self, server, shadow, harness.SEED, raw.MODES * 2)
                model.pick_range = self.picker(model)
                for _ in range(rounds(12)):
                    model.run(250)
                    # nothing is in flight: whoever opens it now sees exactly this
                    check_whole(model, harness.read_file(path))
                    if kind == "xfs":
                        run("cp", "--reflink=always", path, f"{point}/copy.img")
                        check_whole(model, harness.read_file(f"{point}/copy.img"))
                    self.punch(path, shadow, model.chance)
            if others.errors:
                raise others.errors[0]
            model.run(500)  # alone again
            wait_for_redirection(server)
            model.run(500)
            told = status(server)
            self.assertTrue(told["redirects"], told)
            self.assertGreater(told["bytes"], 0)
            self.assertGreater(told["breaks"], 0)
            with server.connect() as client:
                client.flush()
                check_whole(model, client.read(0, SIZE))
            for client in model.clients:
                client.disconnect()
        check_whole(model, harness.read_file(path))
        self.assertEqual(os.path.getsize(path), SIZE)
        return others

    @staticmethod
    def picker(model):
        """Most requests in a few places, so that they meet; some cross regions of the map."""
        plain = model.pick_range

        def pick():
            offset, length = plain()
            if model.chance.random() < 0.5:
                offset = 16 * M - 64 * K + offset % (128 * K)
            return offset, length

        return pick

    @staticmethod
    def punch(path, shadow, chance):
        offset, length = 4 * K * chance.randrange(SIZE // (4 * K) - 64), 4 * K * chance.randrange(1, 64)
        run("fallocate", "--punch-hole", "--offset", offset, "--length", length, path)
        shadow.write(offset, bytes(length))


if __name__ == "__main__":
    unittest.main()
