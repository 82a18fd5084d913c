#!/usr/bin/python3
"""Write-back: what becomes of a sparse image, of memory, of a file system inside when the server is killed."""
import concurrent.futures
import fcntl
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "clients"))
import harness
import raw
from harness import BIGHT, K, M, Case, Server, need, need_root, rounds, run

FS_IOC_FSGETXATTR = 0x801C581F


def extents(path):
    """Physically separate pieces."""
    run("sync", "-f", path)
    return int(re.search(r": (\d+) extents? found", run("filefrag", path).stdout)[1])


def counters(server):
    """The numbers of the write-back's line, by the word behind them."""
    server.process.send_signal(signal.SIGUSR1)
    harness.wait_until(lambda: ": writeback: " in server.stderr(), "the counters")
    line = server.stderr().split(": writeback: ")[-1].split("\n")[0]
    return {word: int(number) for number, word in re.findall(r"(\d+) (?:bytes )?(\w+)", line)}


def write_at_random(client, pages, size, chance):
    for number in range(pages):
        cookies = [client.issue(raw.WRITE, chance.randrange(size // (4 * K)) * 4 * K, data=b"x" * 4 * K)
                   for _ in range(min(16, pages - number * 16))]
        if not cookies:
            break
        for cookie in cookies:
            assert client.wait(cookie).error == 0


@need_root
@need("filefrag")
class Layout(Case):
    def fragments(self, kind, args):
        with harness.filesystem(kind, 640 * M) as point:
            image = harness.write_file(os.path.join(point, "disk.img"), size=256 * M)
            with Server(image, args=args) as server, server.connect() as client:
                write_at_random(client, 1000, 256 * M, random.Random(1))
                client.flush()
                numbers = counters(server) if "--writeback" in args else None
            return extents(image), numbers

    def test_random_writes_leave_few_extents(self):
        for kind, ratio in (("xfs", 50), ("ext4", 5)):  # ext4 has data of its own in between
            with self.subTest(kind=kind):
                plain, _ = self.fragments(kind, [])
                few, numbers = self.fragments(kind, ["--writeback"])
                self.assertLess(few * ratio, plain)
                # each of those that were allocated by a call or two
                self.assertLess(numbers["calls"], 20)
                self.assertEqual((numbers["dirty"], numbers["reserved"], numbers["failed"]), (0, 0, 0))

    def test_a_file_of_specks_stays_small(self):
        with harness.filesystem("xfs", 320 * M) as point:
            image = harness.write_file(os.path.join(point, "disk.img"), size=1024 * M)
            with Server(image, args=["--writeback"]) as server, server.connect() as client:
                for at in range(0, 1024 * M, 64 * M):
                    client.write(at, b"x" * 4 * K)
            self.assertLessEqual(harness.allocated(image), 16 * 64 * K + 64 * K)

    def test_an_allocation_unit_of_a_page_rounds_nothing(self):
        with harness.filesystem("ext4", 320 * M) as point:
            image = harness.write_file(os.path.join(point, "disk.img"), size=256 * M)
            with Server(image, args=["--writeback", "--allocation-unit=4K"]) as server, server.connect() as client:
                for at in range(0, M, 16 * K):
                    client.write(at, b"x" * 4 * K)
            self.assertLessEqual(harness.allocated(image), M // 4 + 16 * K)

    def test_an_extent_size_hint_is_set_on_the_file(self):
        with harness.filesystem("xfs", 320 * M) as point:
            image = harness.write_file(os.path.join(point, "disk.img"), size=256 * M)
            for _ in range(2):  # a second time it is there already
                with Server(image, args=["--extent-size-hint=1M"]) as server, server.connect() as client:
                    client.write(0, b"x" * 4 * K)
            with open(image) as file:
                attr = struct.unpack("IIIII8x", fcntl.ioctl(file, FS_IOC_FSGETXATTR, bytes(28)))
            self.assertEqual(attr[1], M)
            with self.assertRaises(harness.StartError) as caught:
                self.serve(image, args=["--extent-size-hint=2M"])
            self.assertIn("no blocks yet", caught.exception.stderr)


@need_root
class FullDisk(Case):
    def write(self, client, size, chance, held):
        """16 pages at random, noted in held. Returns how many were refused."""
        issued, refused = [], 0
        for page in chance.sample(range(size // (4 * K)), 16):
            number = chance.randrange(1 << 32)
            issued.append((page, client.issue(raw.WRITE, page * 4 * K, data=struct.pack("<I", number) * K), number))
        for page, cookie, number in issued:
            error = client.wait(cookie).error
            self.assertIn(error, (0, raw.ENOSPC))
            refused += error != 0
            if not error:
                held[page] = number
        return refused

    def check(self, read, held):
        for page, number in held.items():
            self.assertEqual(read(page * 4 * K, 4 * K), struct.pack("<I", number) * K, f"page {page}")

    def test_it_is_told_to_the_write_that_fills_it_and_the_others_are_kept(self):
        size = 256 * M
        for kind in ("xfs", "ext4", "ext3"):  # ext3 has no fallocate
            with self.subTest(kind=kind), harness.filesystem(kind, 320 * M) as point:
                image = harness.write_file(os.path.join(point, "disk.img"), size=size)
                filler = os.path.join(point, "filler")
                with open(filler, "wb") as file:
                    stat = os.statvfs(point)
                    os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 24 * M)
                with Server(image, args=["--writeback=8M"]) as server, server.connect() as client:
                    held, refused, chance = {}, 0, random.Random(2)
                    while refused < 100:
                        refused += self.write(client, size, chance, held)
                    client.flush()
                    numbers = counters(server)
                    self.assertEqual((numbers["dirty"], numbers["reserved"], numbers["failed"]), (0, 0, 0))
                    self.check(client.read, held)
                    # What has its place can be written for ever; and with space, all else.
                    for page in list(held)[:100]:
                        client.write(page * 4 * K, struct.pack("<I", held[page]) * K)
                    os.unlink(filler)
                    harness.wait_until(lambda: os.statvfs(point).f_bfree * stat.f_frsize > 64 * M,
                                       "what XFS gives back in the background")
                    for _ in range(50):
                        self.assertEqual(self.write(client, size, chance, held), 0)
                    client.flush()
                data = harness.read_file(image)
                self.check(lambda at, length: data[at:at + length], held)

    def test_zeroes_that_take_space_leave_what_was_promised(self):
        for kind in ("xfs", "ext4"):
            with self.subTest(kind=kind), harness.filesystem(kind, 320 * M) as point:
                image = harness.write_file(os.path.join(point, "disk.img"), size=256 * M)
                with open(os.path.join(point, "filler"), "wb") as file:
                    stat = os.statvfs(point)
                    os.posix_fallocate(file.fileno(), 0, stat.f_bfree * stat.f_frsize - 32 * M)
                with Server(image, args=["--writeback=64M"]) as server, server.connect() as client:
                    for at in range(0, 8 * M, M):
                        client.write(at, b"w" * M)
                    errors = {client.command(raw.WRITE_ZEROES, 64 * M + at, M, flags=raw.NO_HOLE).error
                              for at in range(0, 64 * M, M)}
                    self.assertEqual(errors, {0, raw.ENOSPC})
                    client.flush()
                    # What has its space can be zeroed for ever.
                    client.expect(0, raw.WRITE_ZEROES, 0, 8 * M, flags=raw.NO_HOLE)
                    client.flush()
                    numbers = counters(server)
                    self.assertEqual((numbers["dirty"], numbers["reserved"], numbers["failed"]), (0, 0, 0))
                    self.assertEqual(client.read(0, 8 * M), bytes(8 * M))

    def test_what_is_promised_to_one_image_is_not_promised_to_another(self):
        size = 128 * M
        for kind in ("xfs", "ext4"):
            with self.subTest(kind=kind), harness.filesystem(kind, 400 * M) as point:
                images = [harness.write_file(os.path.join(point, f"{name}.img"), size=size) for name in "ab"]
                with open(os.path.join(point, "filler"), "wb") as file:
                    stat = os.statvfs(point)
                    os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 12 * M)
                args = ["--writeback=64M", "--name", "a", "--name", "b"]
                with Server(*images, args=args) as server, \
                        server.connect(export="a") as a, server.connect(export="b") as b:
                    held, refused, chance = ({}, {}), [0, 0], random.Random(3)
                    while min(refused) < 32:
                        for number, client in enumerate((a, b)):
                            refused[number] += self.write(client, size, chance, held[number])
                    for client, pages in zip((a, b), held):
                        client.flush()
                        self.assertGreater(len(pages), 200)
                        self.check(client.read, pages)
                for image, pages in zip(images, held):
                    data = harness.read_file(image)
                    self.check(lambda at, length, data=data: data[at:at + length], pages)


class Limits(Case):
    def test_memory_is_bounded_when_each_page_has_one_sector(self):
        if harness.sanitized():
            self.skipTest("a sanitizer's memory says nothing")
        size = 32 * M
        server = self.serve(self.image(size=1024 * M), args=[f"--writeback={size}"])
        with server.connect() as client:
            client.write(0, b"x" * 512)
            client.flush()
            before = most = server.rss()
            for number in range(rounds(100)):
                cookies = [client.issue(raw.WRITE, (number * 100 + i) * 40 * K % (1024 * M), data=b"x" * 512)
                           for i in range(100)]
                for cookie in cookies:
                    self.assertEqual(client.wait(cookie).error, 0)
                most = max(most, server.rss())
            self.assertLess(most, before + size + 16 * M)
            self.assertGreater(most, before + size // 4)

    def test_memory_is_bounded_with_large_requests_of_many_clients(self):
        if harness.sanitized():
            self.skipTest("a sanitizer's memory says nothing")
        server = self.serve(self.image(size=1024 * M), args=["--writeback=1M"])
        before = most = server.rss()
        data = b"x" * 4 * M

        def write(first):
            """What is sent before it is answered waits in the socket, and not in the server."""
            with server.connect() as client:
                cookies = [client.issue(raw.WRITE, (first + 3 * i) * len(data), data=data) for i in range(32)]
                self.assertEqual([client.wait(cookie).error for cookie in cookies], [0] * len(cookies))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            writes = [pool.submit(write, first) for first in range(3)]
            while not all(done.done() for done in writes):
                most = max(most, server.rss())
                time.sleep(0.005)
        for done in writes:
            done.result()
        self.assertLess(most, before + M + 16 * M)

    def test_who_does_not_take_its_answers_keeps_nobody_waiting(self):
        server = self.serve(self.image(size=64 * M), args=["--writeback=1M", "--queues=1"])
        with server.connect() as slow, server.connect() as other:
            asked = [slow.issue(raw.READ, i % 16 * 4 * M, 4 * M) for i in range(32)]
            for length in (4 * K, 4 * M):
                written = [other.issue(raw.WRITE, i * length, data=bytes([i + 1]) * length) for i in range(16)]
                self.assertEqual([other.wait(cookie).error for cookie in written], [0] * 16)
                self.assertEqual(other.read(15 * length, length), b"\x10" * length)
            self.assertEqual([len(slow.wait(cookie).data) for cookie in asked], [4 * M] * 32)

    def test_devices_under_load_do_not_starve_each_other(self):
        images = [harness.write_file(self.path(name), size=256 * M) for name in ("one", "two", "three")]
        for ring in harness.rings():
            with self.subTest(ring=ring), Server(*images, args=["--writeback=1M", "--workers=1"], ring=ring) as server:
                done, over = [0] * len(images), threading.Event()

                def write(number):
                    chance = random.Random(number)
                    with server.connect(export=os.path.basename(images[number])) as client:
                        while not over.is_set():
                            write_at_random(client, 32, 256 * M, chance)
                            done[number] += 1
                            if done[number] == rounds(40):
                                over.set()

                with concurrent.futures.ThreadPoolExecutor() as pool:
                    list(pool.map(write, range(len(images))))
                self.assertGreater(min(done), max(done) // 4, done)

    def test_it_is_refused_where_the_kernel_does_it(self):
        done = run(BIGHT, "serve", "--io", "buffered", "--writeback", self.image(size=M), "--nbd",
                   f"unix:{self.path('sock')}", status=2)
        self.assertIn("kernel's write-back", done.stderr)

    def test_sizes(self):
        for value in ("1", "1000K", "2T", "x", ""):
            with self.subTest(value=value):
                done = run(BIGHT, "serve", f"--writeback={value}", self.image(size=M), "--nbd",
                           f"unix:{self.path('sock')}", status=2)
                self.assertIn("--writeback", done.stderr)

    def test_what_cannot_be_written_is_told_at_the_end(self):
        server = self.serve(self.image(size=M), io="fault:write.error=1", args=["--writeback"])
        with server.connect() as client:
            client.write(0, b"x" * 8 * K)
            client.expect(raw.EIO, raw.FLUSH)
            client.expect(raw.EIO, raw.FLUSH)
            self.assertEqual(client.read(0, 8 * K), b"x" * 8 * K)
        server.process.send_signal(signal.SIGTERM)
        self.assertIn("8192 bytes could not be written (Input/output error) and are lost", server.wait(status=1))

    def test_a_discard_brings_nothing_back_that_was_overwritten(self):
        """The last sector is a part of one, and cannot be given back."""
        image = self.image(b"o" * (M + 777))
        with Server(image, io=harness.WRITEBACK) as server, server.connect() as client:
            client.write(M, b"n" * 777)
            client.expect(0, raw.TRIM, M - 64 * K, 64 * K + 777)
            self.assertLessEqual(set(client.read(M, 777)), {0, ord("n")})

    def test_age_alone_brings_it_below(self):
        image = self.image(size=M)
        server = self.serve(image, args=["--writeback"])
        with server.connect() as client:
            client.write(0, b"x" * 4 * K)
            harness.wait_until(lambda: harness.read_file(image)[:4 * K] == b"x" * 4 * K, "the page that has aged")


@need_root
@need("mkfs.ext4", "e2fsck", "losetup", "mount")
@unittest.skipUnless(os.path.exists("/dev/fuse"), "the kernel has no FUSE")
class FileSystemInside(Case):
    """ext4 in the image, on a loop device over --fuse. The server is killed while files are written: what was synced
    is there, and the file system is whole once its journal is replayed."""

    def fill(self, point, stop, synced):
        number = 0
        try:
            while not stop.is_set():
                path = os.path.join(point, f"file{number}")
                data = harness.pattern(random.Random(number).randrange(1, 100 * K), number)
                with open(path, "wb") as file:
                    file.write(data)
                    if number % 5 == 0:
                        os.fsync(file.fileno())
                        synced[os.path.basename(path)] = data
                number += 1
        except OSError:
            pass  # the disk has gone

    def kill_in_the_middle(self, image, synced):
        device_path = self.path("device")
        server = Server(image, args=["--writeback=4M", "--fuse", device_path], nbd=[])
        with server.stack:
            server.start()
            loop = run("losetup", "--find", "--show", "--direct-io=on", device_path).stdout.strip()
            point = self.path("mnt")
            os.makedirs(point, exist_ok=True)
            try:
                run("mount", "-t", "ext4", "-o", "errors=continue", loop, point)
                stop = threading.Event()
                writer = threading.Thread(target=self.fill, args=(point, stop, synced))
                writer.start()
                harness.wait_until(lambda: len(synced) >= 12, "synced files")
                server.kill()
                stop.set()
                run("umount", "--force", "--lazy", device_path, status=None)
                writer.join()
            finally:
                run("umount", "--lazy", point, status=None)
                run("losetup", "--detach", loop, status=None)
                run("umount", "--force", "--lazy", device_path, status=None)

    def test_a_killed_server_leaves_it_whole(self):
        for number in range(rounds(2)):
            with self.subTest(number=number):
                image = self.image(size=96 * M, name=f"disk{number}.img")
                run("mkfs.ext4", "-q", "-F", image)
                synced = {}
                self.kill_in_the_middle(image, synced)
                self.assertGreaterEqual(len(synced), 12)
                # 1: its journal was replayed, or orphans deleted; 4 would be errors
                run("e2fsck", "-fp", image, status=None)
                done = subprocess.run(["e2fsck", "-fn", image], stdout=subprocess.PIPE, text=True)
                self.assertEqual(done.returncode, 0, done.stdout)
                with harness.loop_device(0, backing=image) as device, harness.mounted(device, "ext4") as point:
                    for name, data in synced.items():
                        self.assertTrue(harness.read_file(os.path.join(point, name)) == data, f"{name} is not as synced")


if __name__ == "__main__":
    unittest.main()
