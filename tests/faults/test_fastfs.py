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


@unittest.skipIf(os.geteuid(), "needs root")
class Lease(harness.Case):
    """Whoever opens the image waits until it is safe, and no longer."""

    def file_system(self, kind="ext4"):
        return self.enterContext(filesystem(kind, 400 * M))

    def test_an_opener_sees_what_was_written_last(self):
        for kind in KINDS:
            with self.subTest(kind):
                path = harness.write_file(f"{self.file_system(kind)}/disk.img", b"o" * 8 * M)
                with served(path) as server, server.connect() as client:
                    for number in range(rounds(40)):
                        data = bytes([number % 255 + 1]) * 64 * K
                        offset = 4 * K * (number * 7 % 1024)
                        client.write(offset, data)
                        with open(path, "rb") as file:
                            file.seek(offset)
                            self.assertEqual(file.read(len(data)), data)
                        if number % 4 == 0:
                            wait_for_redirection(server)
                            self.assertEqual(client.read(offset, len(data)), data)

    def test_an_opener_writes_and_we_see_it(self):
        path = harness.write_file(f"{self.file_system()}/disk.img", b"o" * M)
        with served(path) as server, server.connect() as client:
            self.assertEqual(client.read(0, 4 * K), b"o" * 4 * K)
            with open(path, "r+b") as file:
                file.write(b"theirs" * 1000)  # in the page cache, and dirty
            wait_for_redirection(server)
            self.assertEqual(client.read(0, 6000), b"theirs" * 1000)
            client.write(0, b"ours" * 1000)
            wait_for_redirection(server)
        self.assertEqual(harness.read_file(path)[:6000], b"ours" * 1000 + (b"theirs" * 1000)[4000:])

    def test_somebody_has_it_open_at_the_start(self):
        path = harness.write_file(f"{self.file_system()}/disk.img", b"o" * M)
        with open(path, "rb") as file:
            with served(path) as server, server.connect() as client:
                self.assertIn("somebody else has it open", server.stderr())
                self.assertFalse(status(server)["redirects"])
                self.assertEqual(client.read(0, M), b"o" * M)
                file.close()
                wait_for_redirection(server)
                client.read(0, M)
                self.assertEqual(status(server)["bytes"], M)

    def test_thousands_of_openers_while_it_is_in_use(self):
        """Breaks in the middle of look-ups, fills and punches; p99 of the waits is in bench/fastfs."""
        path = harness.write_file(f"{self.file_system('xfs')}/disk.img", b"o" * 4 * M, size=36 * M)
        with served(path, "--queues", "4") as server:
            stop, opened = threading.Event(), []

            def open_and_close():
                while not stop.is_set():
                    os.close(os.open(path, os.O_RDONLY))
                    opened.append(1)
                    time.sleep(0.0005 * random.randrange(60))

            openers = [threading.Thread(target=open_and_close) for _ in range(2)]
            for opener in openers:
                opener.start()
            chance = random.Random(harness.SEED)
            clients = [self.enterContext(server.connect()) for _ in range(4)]
            shadow = {}
            for _ in range(rounds(1500)):
                cookies = []
                for client, slot in zip(clients, chance.sample(range(36 * M // (64 * K)), 4)):
                    if chance.random() < 0.3:
                        shadow[slot] = 0
                        cookies.append((client, client.issue(raw.WRITE_ZEROES, slot * 64 * K, 4 * K)))
                    else:
                        shadow[slot] = chance.randrange(1, 256)
                        data = bytes([shadow[slot]]) * 4 * K
                        cookies.append((client, client.issue(raw.WRITE, slot * 64 * K, data=data)))
                for client, cookie in cookies:
                    self.assertEqual(client.wait(cookie).error, 0)
            stop.set()
            for opener in openers:
                opener.join()
            for slot, value in shadow.items():
                self.assertEqual(clients[0].read(slot * 64 * K, 4 * K), bytes([value]) * 4 * K)
            self.assertGreater(len(opened), 0)

    def test_a_stopped_process_does_not_redirect_when_it_goes_on(self):
        """The kernel waits for lease-break-time and then breaks the lease by force."""
        try:
            knob = "/proc/sys/fs/lease-break-time"
            before = harness.read_file(knob)
            harness.write_file(knob, b"2")
        except OSError as error:
            self.skipTest(f"{knob}: {error.strerror}")
        self.addCleanup(lambda: harness.write_file(knob, before))
        path = harness.write_file(f"{self.file_system()}/disk.img", b"o" * 8 * M)
        with served(path) as server, server.connect() as client:
            client.read(0, 8 * M)
            self.assertTrue(status(server)["redirects"])
            server.suspend()
            cookie = client.issue(raw.WRITE, 0, data=b"late" * K)
            with open(path, "r+b") as file:  # comes back when the lease is broken by force
                fcntl.flock(file, fcntl.LOCK_EX)
                run("fallocate", "--punch-hole", "--offset", 0, "--length", 4 * M, path)
                other = harness.write_file(f"{os.path.dirname(path)}/other", b"x" * 8 * M)
                os.sync()
                server.resume()
                self.assertEqual(client.wait(cookie).error, 0)
                wait_until(lambda: not status(server)["redirects"], "the end of redirection")
                file.seek(0)
                self.assertEqual(file.read(4 * K), b"late" * K)
            self.assertEqual(client.read(4 * K, 4 * K), bytes(4 * K))
            with open(other, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self.assertEqual(file.read(), b"x" * 8 * M)

    def test_a_killed_server_loses_nothing_that_it_answered(self):
        """What is redirected is the device's when it is answered; what was flushed is the file's as well."""
        for kind in KINDS:
            with self.subTest(kind), harness.loop_device(400 * M) as device:
                run(*harness.MKFS[kind], device)
                with harness.mounted(device, kind) as point:
                    path = f"{point}/disk.img"
                    shadow = Shadow(make_image(path, random.Random(harness.SEED)))
                    with served(path) as server:
                        model = Model(self, server, shadow, harness.SEED, raw.MODES)
                        model.run(rounds(1000))
                        with server.connect() as client:
                            client.flush()
                        server.kill()
                    check_whole(model, harness.read_file(path))
                check_filesystem(kind, device)
                with harness.mounted(device, kind) as point:
                    check_whole(model, harness.read_file(f"{point}/disk.img"))


@unittest.skipIf(os.geteuid(), "needs root")
class Refusals(harness.Case):
    """One line says why, and what to do instead."""

    def refused(self, why, *args, data=b"x" * M, path=None, **options):
        path = path or harness.write_file(f"{self.point}/disk.img", data)
        with self.assertRaises(harness.StartError) as caught:
            with served(path, *args, **options):
                pass
        lines = [line for line in caught.exception.stderr.splitlines() if "fastfs" in line or "--map" in line]
        self.assertEqual(len(lines), 1, caught.exception.stderr)
        self.assertRegex(lines[0], why)
        self.assertRegex(lines[0], r"^bight: \S+: .*; .*")

    def on(self, kind, **options):
        self.point = self.enterContext(filesystem(kind, 400 * M, **options))

    def test_file_systems(self):
        self.point = self.enterContext(harness.scratch_dir("/dev/shm"))
        self.refused("tmpfs|goes past the page cache")
        if have("mkfs.btrfs"):
            with harness.loop_device(400 * M) as device:
                run("mkfs.btrfs", "-q", device)
                with harness.mounted(device, "btrfs") as self.point:
                    self.refused("btrfs does not tell")

    def test_a_block_device(self):
        with harness.loop_device(16 * M) as device:
            self.refused("a block device has no file system", path=device)

    def test_journalled_data(self):
        self.on("ext4", options="data=journal")
        self.refused("data=journal")

    def test_offset_and_size(self):
        self.on("ext4")
        self.refused("--offset 512 is no multiple", "--offset", 512)
        self.refused("truncate -s %[0-9]+ ", data=b"x" * (M + 512))

    def test_io(self):
        self.on("xfs")
        self.refused("use --io direct", io="buffered")
        self.refused("--writeback", "--writeback")

    def test_without_rights(self):
        self.on("ext4")
        path = harness.write_file(f"{self.point}/disk.img", b"x" * M)
        for folder in (self.point, path):
            os.chmod(folder, 0o777)
        self.refused("run as root", path=path, wrap=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])

    def test_shared_blocks_are_left_to_the_file(self):
        self.on("xfs")
        path = harness.write_file(f"{self.point}/disk.img", b"s" * M)
        run("cp", "--reflink=always", path, f"{self.point}/snapshot")
        with open(path, "ab") as file:
            file.write(b"o" * M)
        with served(path) as server, server.connect() as client:
            self.assertEqual(client.read(0, 2 * M), b"s" * M + b"o" * M)
            told = status(server)
            self.assertEqual((told["bytes"], told["file"]), (M, 15 * M))  # and what is behind the end
            client.write(0, b"n" * 2 * M)
            self.assertEqual(client.read(0, 2 * M), b"n" * 2 * M)
            wait_until(lambda: status(server)["bytes"] == 2 * M, "the copy is redirected")
            client.flush()
        self.assertEqual(harness.read_file(f"{self.point}/snapshot"), b"s" * M)
        self.assertEqual(harness.read_file(path), b"n" * 2 * M)

    def test_contents_that_do_not_match(self):
        """A file system on a device that is not the one of its number: a bind mount over the node."""
        self.on("ext4")
        path = harness.write_file(f"{self.point}/disk.img", b"x" * M)
        with harness.loop_device(400 * M) as other:
            node = os.stat(self.point).st_dev
            name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(node)}:{os.minor(node)}"))
            run("mount", "--bind", other, f"/dev/{name}")
            try:
                self.refused("is not the block device", path=path)
            finally:
                run("umount", f"/dev/{name}")


if __name__ == "__main__":
    unittest.main()
