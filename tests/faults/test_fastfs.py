#!/usr/bin/python3
"""--map fastfs on real file systems: against a model while others open the image, at power cuts, and where it cannot be.

What is redirected by mistake lands in somebody else's file: so every other file of the file system is compared, too,
and the file system is checked. BIGHT_SEED repeats the choice of operations.
"""
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import mmap
import os
import random
import re
import select
import signal
import struct
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "clients"))
import attached
import harness
import raw
from harness import K, M, Server, filesystem, have, run, rounds, wait_until
from test_model import Model, Shadow

KINDS = ("ext4", "xfs")
LONG = os.environ.get("BIGHT_TEST_LONG") == "1"
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
            if number % 40 == 39:
                self.fill_up()
            with open(f"{self.point}/{name}", "wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            self.files[name] = hashlib.sha256(data).digest()
        except OSError:  # full, and perhaps not even made
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.point}/{name}")
        while len(self.files) > 200:
            name = self.chance.choice(list(self.files))
            os.unlink(f"{self.point}/{name}")
            del self.files[name]
        time.sleep(0.002)

    def fill_up(self):
        """No space is left for a while, and then all that was taken is free."""
        path, size = f"{self.point}/everything", 512 * M
        with open(path, "wb") as file:
            while size >= 4 * K:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                except OSError:
                    size //= 2
        time.sleep(0.02)
        os.unlink(path)

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
                with contextlib.suppress(OSError):
                    os.truncate(self.image, self.size + 64 * K)
                os.truncate(self.image, self.size)
            elif what == 2 and self.kind == "xfs":
                run("cp", "--reflink=always", self.image, f"{self.point}/snapshot", status=None)
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
        ways = [(ring, io) for ring in harness.rings() for io in (None, harness.WRITEBACK)]
        for kind, (ring, io) in itertools.product(KINDS, ways if LONG else ways[:2]):
            with self.subTest(kind=kind, ring=ring, io=io, BIGHT_SEED=harness.SEED), \
                    harness.loop_device(400 * M) as device:
                run(*harness.MKFS[kind], device)
                with harness.mounted(device, kind) as point:
                    files = self.disturbed(f"{point}/disk.img", point, kind, ring, io)
                check_filesystem(kind, device)
                with harness.mounted(device, kind) as point:  # from the disk, not from the cache
                    files.check(point)

    def disturbed(self, path, point, kind, ring, io):
        shadow = Shadow(make_image(path, random.Random(harness.SEED)))
        with served(path, "--queues", "4", ring=ring, io=io) as server:
            with Others(point, path, kind, harness.SEED) as others:
                model = Model(self, server, shadow, harness.SEED, raw.MODES * 2, errors=(raw.ENOSPC,))
                model.pick_range = self.picker(model)
                for _ in range(rounds(8)):
                    model.run(250)
                    if io:  # what is in our cache nobody else sees
                        self.settle(model)
                    # nothing is in flight: whoever opens it now sees exactly this
                    check_whole(model, harness.read_file(path))
                    if kind == "xfs":
                        self.insist("cp", "--reflink=always", path, f"{point}/copy.img")
                        check_whole(model, harness.read_file(f"{point}/copy.img"))
                    self.punch(path, shadow, model.chance)
            if others.errors:
                raise others.errors[0]
            self.settle(model)
            model.run(500)  # alone again
            wait_for_redirection(server)
            model.run(500)
            told = status(server)
            self.assertTrue(told["redirects"], told)
            self.assertGreater(told["bytes"], 0)
            self.assertGreater(told["breaks"], 0)
            self.settle(model)
            with server.connect() as client:
                check_whole(model, client.read(0, SIZE))
            for client in model.clients:
                client.disconnect()
        check_whole(model, harness.read_file(path))
        self.assertEqual(os.path.getsize(path), SIZE)
        return others

    @staticmethod
    def settle(model):
        """A flush, which fails while there is no space for what was promised some (write-back), but not for long."""
        client = model.clients[0]
        wait_until(lambda: client.command(raw.FLUSH).error in (0, raw.ENOSPC) and not client.command(raw.FLUSH).error,
                   "a flush")

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
        Fastfs.insist("fallocate", "--punch-hole", "--offset", offset, "--length", length, path)
        shadow.write(offset, bytes(length))

    @staticmethod
    def insist(*command):
        """Also while the file system is full."""
        wait_until(lambda: run(*command, status=None).returncode == 0, f"the end of {command[0]}")


@contextlib.contextmanager
def lease_break_time(seconds):
    """The whole machine's: it is put back when the tests are interrupted, too."""
    knob = "/proc/sys/fs/lease-break-time"
    with harness.undo_stack() as stack:
        before = harness.read_file(knob)
        try:
            harness.write_file(knob, b"%d" % seconds)
        except OSError as error:
            raise unittest.SkipTest(f"{knob}: {error.strerror}") from None
        stack.callback(harness.write_file, knob, before)
        yield


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

    def test_pages_in_a_pipe_are_not_read_by_the_next_opener(self):
        """They stay in the page cache, whoever drops it, after the image has been closed."""
        if harness.libc.syscall(451, -1, None, None, 0) == -1 and ctypes.get_errno() == errno.ENOSYS:
            self.skipTest("cachestat(2) came with Linux 6.5")
        for kind in KINDS:
            with self.subTest(kind):
                path = harness.write_file(f"{self.file_system(kind)}/disk.img", b"o" * M)
                with served(path) as server, server.connect() as client:
                    reader, writer = os.pipe()
                    with open(path, "rb") as file:
                        os.splice(file.fileno(), writer, 64 * K)
                    wait_until(lambda: "holds pages" in server.stderr() or status(server)["redirects"], "a decision")
                    client.write(0, b"n" * 64 * K)
                    self.assertEqual(harness.read_file(path)[:64 * K], b"n" * 64 * K)
                    os.close(reader)
                    os.close(writer)
                    wait_for_redirection(server)
                    client.write(0, b"m" * 64 * K)
                    self.assertEqual(harness.read_file(path)[:64 * K], b"m" * 64 * K)

    def test_who_does_not_wait_has_it_the_second_time(self):
        """The kernel turns O_NONBLOCK away while there is a lease, as it does with tar, blkid and lsattr."""
        path = harness.write_file(f"{self.file_system()}/disk.img", b"o" * M)
        with served(path) as server, server.connect() as client:
            client.write(0, b"n" * M)
            with self.assertRaises(BlockingIOError):
                os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            time.sleep(0.5)
            self.assertIn("not to wait", (status(server), server.stderr())[1])
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self.assertEqual(os.read(fd, M), b"n" * M)
            os.close(fd)
            wait_for_redirection(server)

    def test_an_opener_makes_it_a_file_that_cannot_be_redirected(self):
        path = harness.write_file(f"{self.file_system()}/disk.img", b"o" * M)
        with served(path) as server, server.connect() as client:
            with open(path, "rb") as file:
                flags = struct.unpack("i", fcntl.ioctl(file.fileno(), 0x80086601, bytes(4)))[0]  # FS_IOC_GETFLAGS
                # FS_COMPR_FL, which ext4 only takes down: unlike for chattr +j, no CAP_SYS_RESOURCE is needed for it
                fcntl.ioctl(file.fileno(), 0x40086602, struct.pack("i", flags | 4))
            wait_until(lambda: "the file is compressed" in server.stderr(), "a refusal")
            self.assertFalse(status(server)["redirects"])
            client.write(0, b"n" * M)
            self.assertEqual(client.read(0, M), b"n" * M)
        self.assertEqual(harness.read_file(path), b"n" * M)

    def test_a_part_of_a_block_can_be_trimmed(self):
        """As mkfs with small blocks does: the kernel's loop device takes a refusal for one of all discards."""
        path = harness.write_file(f"{self.enterContext(filesystem('xfs', 400 * M))}/disk.img", b"o" * 64 * K)
        for args in ((), ("--writeback",)):
            with self.subTest(args), served(path, *args) as server, server.connect() as client:
                client.write(0, b"o" * 64 * K)
                for offset, length in ((K, K), (7 * K, 2 * K), (15 * K, 6 * K)):
                    client.expect(0, raw.WRITE_ZEROES, offset, length, raw.FAST_ZERO)
                    self.assertEqual(client.read(offset - K, length + 2 * K), b"o" * K + bytes(length) + b"o" * K)

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
                told = status(server)
                self.assertEqual((told["bytes"], told["file"], told["unknown"]), (M, 0, 0))

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
        self.enterContext(lease_break_time(2))
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
                        model.run(rounds(800))
                        with server.connect() as client:
                            client.flush()
                        server.kill()
                    check_whole(model, harness.read_file(path))
                check_filesystem(kind, device)
                with harness.mounted(device, kind) as point:
                    check_whole(model, harness.read_file(f"{point}/disk.img"))

    def test_a_power_cut_loses_nothing_that_was_flushed(self):
        """What the disk has after the answer to a FLUSH, or to a write with FUA, is all that is needed."""
        for kind, io in itertools.product(KINDS, (None, harness.WRITEBACK)):
            with self.subTest(kind=kind, io=io), harness.undo_stack() as undo:
                disk = f"{undo.enter_context(harness.scratch_dir('/dev/shm'))}/disk"
                harness.write_file(disk, size=400 * M)
                device = undo.enter_context(harness.loop_device(0, backing=disk))
                run(*harness.MKFS[kind], device)
                point = undo.enter_context(harness.mounted(device, kind))
                shadow = Shadow(make_image(f"{point}/disk.img", random.Random(harness.SEED)))
                server = undo.enter_context(served(f"{point}/disk.img", io=io))
                model = Model(self, server, shadow, harness.SEED, raw.MODES)
                for _ in range(2):
                    model.run(rounds(300))
                    model.clients[0].flush()
                    check_whole(model, self.after_power_cut(disk, kind))
                client, offset = model.clients[0], 0
                for number in range(1, 4):  # into what is whatever it is: hole, unwritten, redirected
                    offset = 4 * K * model.chance.randrange(SIZE // (4 * K))
                    client.command(raw.WRITE, offset, data=bytes([number]) * 4 * K, flags=raw.FUA)
                    found = self.after_power_cut(disk, kind)
                    self.assertEqual(found[offset:offset + 4 * K], bytes([number]) * 4 * K)

    @staticmethod
    def after_power_cut(disk, kind):
        """The image on a copy of the disk."""
        run("cp", "--sparse=always", disk, f"{disk}.copy")
        with harness.loop_device(0, backing=f"{disk}.copy") as device, \
                harness.mounted(device, kind, "nouuid" if kind == "xfs" else "") as point:
            data = harness.read_file(f"{point}/disk.img")
        os.unlink(f"{disk}.copy")
        return data


@unittest.skipIf(os.geteuid(), "needs root")
class Changes(attached.Attached):
    """What is set, switched and resized while it redirects."""

    def attached(self, path, *args):
        self.attach(path, "--name", "disk", "--map", "fastfs", "--nbd", f"unix:{self.sock('disk')}", *args)
        self.addCleanup(lambda: self.bight("detach", "--all", "--force"))  # before its file system goes
        return self.enterContext(raw.connect(self.sock("disk")))

    def test_what_an_image_has_grown_by_is_redirected(self):
        path = harness.write_file(f"{self.enterContext(filesystem('ext4', 400 * M))}/disk.img", b"o" * M, size=20 * M)
        client = self.attached(path)
        client.read(0, M)
        os.truncate(path, 80 * M)
        self.bight("resize", "disk")
        with raw.connect(self.sock("disk")) as client:
            client.write(70 * M, b"n" * M)
            wait_until(lambda: self.show("disk")["redirects"], "redirection")

            def is_redirected():
                self.assertEqual((client.read(0, 64 * K), client.read(70 * M, M)), (b"o" * 64 * K, b"n" * M))
                return self.show("disk")["redirected_bytes"] == 2 * M

            wait_until(is_redirected, "redirection of what is new")
            self.assertEqual(self.show("disk")["not_asked_for_bytes"], 48 * M)

    def test_settings_change_under_load(self):
        point = self.enterContext(filesystem("xfs", 400 * M))
        path = harness.write_file(f"{point}/disk.img", size=16 * M)
        self.attached(path)
        with attached.Load(f"nbd+unix:///disk?socket={self.sock('disk')}", 16 * M):
            for _ in range(rounds(5)):
                self.bight("set", "disk", "map=linear")
                self.assertNotIn("redirects", self.show("disk"))
                self.bight("set", "disk", "map=fastfs")
                wait_until(lambda: self.show("disk").get("redirected_bytes"), "redirection")
                self.bight("set", "disk", "writeback=4M")
                self.bight("set", "disk", "writeback=off")

    def test_images_are_switched_and_each_keeps_its_own(self):
        point = self.enterContext(filesystem("ext4", 400 * M))
        paths = [harness.write_file(f"{point}/{name}", b"o" * 4 * M) for name in ("one", "two")]
        client = self.attached(paths[0])
        for number in range(1, rounds(20) + 1):
            at = number % 64 * 64 * K
            client.write(at, bytes([number]) * 64 * K)
            self.assertEqual(client.read(at, 64 * K), bytes([number]) * 64 * K)
            self.bight("switch", "disk", paths[number % 2])
            self.assertNotEqual(client.read(at, 64 * K), bytes([number]) * 64 * K)
            if number % 4 == 0:
                wait_until(lambda: self.show("disk")["redirects"], "redirection")
        client.disconnect()
        self.bight("detach", "--force", "disk")
        for number in range(1, rounds(20) + 1):
            with open(paths[(number - 1) % 2], "rb") as file:
                file.seek(number % 64 * 64 * K)
                self.assertEqual(file.read(64 * K), bytes([number]) * 64 * K)


@unittest.skipIf(os.geteuid(), "needs root")
@unittest.skipUnless(os.path.exists("/dev/fuse"), "the kernel has no FUSE")
class Killed(attached.Attached):
    """A disk may still be at a write whose server is dead: nobody opens the image before it is over."""

    def slow_file_system(self):
        """An image in an ext4 on a block device whose writes can be made to take their time."""
        lower = harness.write_file(self.path("lower"), size=32 * M)
        run(*harness.MKFS["ext4"], lower)
        device = self.attach(lower, "--name", "slow")
        point = self.enterContext(harness.mounted(device, "ext4", "noatime"))
        return harness.write_file(f"{point}/disk.img", b"o" * 64 * K)

    def killed_in_the_middle(self, client, path, pid):
        self.assertEqual(client.read(0, 4 * K), b"o" * 4 * K)
        self.bight("set", "slow", "io=fault:write.delay=1:500")
        client.issue(raw.WRITE, 0, data=b"n" * 4 * K)
        time.sleep(0.1)
        self.assertFalse(select.select([client.sock], [], [], 0)[0], "the disk was not slow")
        os.kill(pid, signal.SIGKILL)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with open(fd, "rb", buffering=0) as file, mmap.mmap(-1, 4 * K) as buffer:
            file.readinto(buffer)
            then = bytes(buffer)
            time.sleep(1)
            file.seek(0)
            file.readinto(buffer)
            self.assertEqual(then[:1], buffer[:1])
        self.bight("set", "slow", "io=direct")

    def test_a_write_in_flight_is_over_before_somebody_opens_the_image(self):
        path = self.slow_file_system()
        for ring in harness.rings():
            with self.subTest(ring), served(path, ring=ring) as server, server.connect() as client:
                self.assertTrue(status(server)["redirects"])
                self.killed_in_the_middle(client, path, server.pid)
                server.process.wait()
            harness.write_file(path, b"o" * 64 * K)

    def test_so_it_is_when_another_worker_starts(self):
        path = self.slow_file_system()
        self.attach(path, "--name", "fast", "--map", "fastfs", "--nbd", f"unix:{self.sock('fast')}")
        self.addCleanup(lambda: self.bight("detach", "--force", "fast"))  # before its file system goes
        with raw.connect(self.sock("fast")) as client:
            self.assertTrue(self.show("fast")["redirects"])
            self.killed_in_the_middle(client, path, self.show("fast")["worker_pid"])


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

    def test_a_layer_above_a_file_system(self):
        self.on("ext4")
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{self.point}/{name}")
        folders = ",".join(f"{name}dir={self.point}/{name}" for name in ("lower", "upper", "work"))
        done = run("mount", "-t", "overlay", "overlay", "-o", folders, f"{self.point}/merged", status=None)
        if done.returncode:
            self.skipTest("no overlayfs")
        self.addCleanup(run, "umount", f"{self.point}/merged")
        self.refused("overlayfs does not tell", path=harness.write_file(f"{self.point}/merged/disk.img", b"x" * M))

    @harness.need("xfs_io")
    def test_an_encrypted_file(self):
        with harness.loop_device(400 * M) as device:
            run(*harness.MKFS["ext4"], "-O", "encrypt", device)
            with harness.mounted(device, "ext4") as self.point:
                added = run("xfs_io", "-c", "add_enckey", self.point, input="k" * 64, stdin=None, status=None)
                key = re.search(r"identifier ([0-9a-f]+)", added.stdout)
                if not key:
                    self.skipTest("the kernel encrypts no files")
                os.mkdir(f"{self.point}/secret")
                run("xfs_io", "-c", f"set_encpolicy {key[1]}", f"{self.point}/secret")
                self.refused("the file is encrypted", path=harness.write_file(f"{self.point}/secret/disk.img", b"x" * M))

    def test_a_file_whose_data_are_journalled(self):
        self.on("ext4")
        path = harness.write_file(f"{self.point}/disk.img")
        if run("chattr", "+j", path, status=None).returncode:
            self.skipTest("chattr +j needs CAP_SYS_RESOURCE")
        harness.write_file(path, b"x" * M)
        self.refused("its data go through the journal; chattr -j it", path=path)

    def test_no_node_for_the_device(self):
        self.on("xfs")
        self.refused("mknod it", wrap=["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "-"])

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
            self.assertEqual((told["bytes"], told["file"]), (M, M))
            client.write(0, b"n" * 2 * M)
            self.assertEqual(client.read(0, 2 * M), b"n" * 2 * M)
            wait_until(lambda: status(server)["bytes"] == 2 * M, "the copy is redirected")
            client.flush()
        self.assertEqual(harness.read_file(f"{self.point}/snapshot"), b"s" * M)
        self.assertEqual(harness.read_file(path), b"n" * 2 * M)

    @harness.need("strace")
    def test_contents_that_do_not_match(self):
        """What is read from the device, the second of each pair of reads, is another byte at its begin."""
        self.on("ext4")
        path = harness.write_file(f"{self.point}/disk.img", b"x" * M)
        wrap = ["strace", "-f", "-o", "/dev/null", "-e", "inject=pread64:poke_exit=@arg2=79:when=2+2"]
        self.refused("has something else at byte", path=path, wrap=wrap)

    def test_another_device_at_its_node(self):
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


@unittest.skipIf(os.geteuid(), "needs root")
class Places(harness.Case):
    """Files that may not be written, and many images on one file system."""

    def test_an_immutable_file_is_redirected_for_reading(self):
        point = self.enterContext(filesystem("ext4", 400 * M))
        path = harness.write_file(f"{point}/disk.img", b"x" * M)
        run("chattr", "+i", path)
        try:
            with served(path, "--read-only") as server, server.connect() as client:
                self.assertEqual(client.read(0, M), b"x" * M)
                self.assertEqual(status(server)["bytes"], M)
        finally:
            run("chattr", "-i", path)

    def test_kinds_of_ext4(self):
        for options in (["-b", "1024"], ["-O", "bigalloc"], ["-O", "inline_data"], ["-O", "^extents,^64bit"]):
            with self.subTest(options=options), harness.loop_device(400 * M) as device:
                run(*harness.MKFS["ext4"], *options, device)
                with harness.mounted(device, "ext4") as point:
                    other = harness.write_file(f"{point}/other", b"o" * M)
                    path = harness.write_file(f"{point}/disk.img", b"x" * M)
                    os.truncate(path, 2 * M)
                    with served(path) as server, server.connect() as client:
                        client.write(64 * K, b"y" * 64 * K)  # is there
                        client.write(M + 64 * K, b"z" * 64 * K)  # is a hole
                        client.flush()
                        wait_until(lambda: status(server)["bytes"] >= M, "redirection")  # pylint: disable=cell-var-from-loop
                        expected = b"x" * 64 * K + b"y" * 64 * K + b"x" * (M - 128 * K) + bytes(64 * K) + b"z" * 64 * K
                        self.assertEqual(client.read(0, M + 128 * K), expected)
                    self.assertEqual(harness.read_file(path)[:M + 128 * K], expected)
                    self.assertEqual(harness.read_file(other), b"o" * M)
                check_filesystem("ext4", device)

    def write_and_compare(self, path):
        harness.write_file(path, b"x" * M)
        with served(path) as server, server.connect() as client:
            client.write(64 * K, b"y" * 64 * K)
            client.flush()
            self.assertEqual(client.read(0, M), b"x" * 64 * K + b"y" * 64 * K + b"x" * (M - 128 * K))
            self.assertEqual(status(server)["bytes"], M)
        self.assertEqual(harness.read_file(path), b"x" * 64 * K + b"y" * 64 * K + b"x" * (M - 128 * K))

    def test_a_bind_mount(self):
        for kind in KINDS:
            with self.subTest(kind), filesystem(kind, 400 * M) as point, harness.scratch_dir() as bound:
                run("mount", "--bind", point, bound)
                try:
                    self.write_and_compare(f"{bound}/disk.img")
                finally:
                    run("umount", bound)

    def test_a_device_with_sectors_of_4_KiB(self):
        for kind in KINDS:
            with self.subTest(kind), filesystem(kind, 400 * M, sector=4096) as point:
                self.write_and_compare(f"{point}/disk.img")

    @harness.need("sfdisk", "partx")
    def test_a_partition(self):
        """Extents count from the start of the partition, and so does its node."""
        for kind in KINDS:
            with self.subTest(kind), harness.loop_device(400 * M) as device:
                run("sfdisk", "-q", device, input="start=40960\n", stdin=None)
                run("partx", "-u", device, status=None)
                part = f"{device}p1"
                if not os.path.exists(part):
                    self.skipTest("the kernel finds no partitions, or nobody makes their nodes")
                run(*harness.MKFS[kind], part)
                with harness.mounted(part, kind) as point:
                    self.write_and_compare(f"{point}/disk.img")
                check_filesystem(kind, part)
                run("partx", "-d", device)

    def test_many_images_on_one_file_system(self):
        """What one of them gives back another one takes."""
        for kind in KINDS:
            with self.subTest(kind), harness.loop_device(400 * M) as device:
                run(*harness.MKFS[kind], device)
                with harness.mounted(device, kind) as point, contextlib.ExitStack() as stack:
                    shadows = [Shadow(bytes(2 * M)) for _ in range(6)]
                    paths = [harness.write_file(f"{point}/{number}.img", size=2 * M) for number in range(6)]
                    servers = [stack.enter_context(served(path, "--queues", "1")) for path in paths]
                    models = [Model(self, server, shadow, harness.SEED + number, ("extended",), aligned=4 * K)
                              for number, (server, shadow) in enumerate(zip(servers, shadows))]
                    for _ in range(rounds(10)):
                        for model in models:
                            model.run(30)
                    for model in models:
                        model.clients[0].flush()
                    for model, path in zip(models, paths):
                        check_whole(model, harness.read_file(path))
                check_filesystem(kind, device)


if __name__ == "__main__":
    unittest.main()
