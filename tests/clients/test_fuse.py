#!/usr/bin/python3
"""An image as a file, by FUSE: what it is like, what lies on it, how it ends."""
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import BIGHT, K, M, Case, Server, need, need_root, run

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
libc = ctypes.CDLL(None, use_errno=True)


def mounts(path):
    with open("/proc/self/mounts") as file:
        return [line.split()[2] for line in file if line.split()[1] == path]


def fallocate(fd, mode, offset, length):
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def page_aligned(data):
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


@contextlib.contextmanager
def opened(path, flags):
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # the server is gone
            os.close(fd)


def have_fuse():
    with open("/proc/filesystems") as file:
        return os.path.exists("/dev/fuse") and "\tfuse\n" in file.read()


@unittest.skipUnless(have_fuse(), "the kernel has no FUSE")
class FuseCase(Case):
    @contextlib.contextmanager
    def files(self, *images, args=(), path=None, **options):
        """Serves the images as files. Who waits for a server that hangs is not killable: unmounting helps."""
        paths = [path or self.path("device")] + [self.path(f"device{n}") for n in range(2, len(images) + 1)]
        fuse = [word for p in paths for word in ("--fuse", p)]

        def help_out():
            for p in paths:
                run("umount", "--force", "--lazy", p, status=None)

        watchdog = threading.Timer(harness.PATIENCE / 2, help_out)
        watchdog.start()
        try:
            with Server(*images, args=[*fuse, *args], nbd=[], **options) as server:
                server.paths = paths
                yield server
        finally:
            watchdog.cancel()
            help_out()

    def assert_error(self, number, call, *arguments):
        with self.assertRaises(OSError) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.errno, number)


class File(FuseCase):
    def test_is_the_image(self):
        size = M + 777
        data = harness.pattern(size)
        image = self.image(data)
        os.chmod(image, 0o640)
        for ring in harness.rings():
            with self.subTest(ring=ring), self.files(image, ring=ring) as server:
                there, here = os.stat(server.paths[0]), os.stat(image)
                self.assertEqual((there.st_size, there.st_mode & 0o777, there.st_uid, int(there.st_mtime)),
                                 (size, 0o640, here.st_uid, int(here.st_mtime)))
                self.assertTrue(harness.read_file(server.paths[0]) == data)
                with opened(server.paths[0], os.O_RDONLY) as fd:
                    self.assertEqual(os.pread(fd, 4096, size - 100), data[-100:])
                    self.assertEqual(os.pread(fd, 4096, size), b"")
                    self.assertEqual(os.statvfs(fd).f_bsize, 4096)

    def test_memory_is_bounded_with_write_back(self):
        """What comes while many are being written waits in the kernel."""
        if harness.sanitized():
            self.skipTest("a sanitizer's memory says nothing")
        with self.files(self.image(size=512 * M), args=["--writeback=1M"]) as server:
            page, before, most = page_aligned(b"x" * M), server.rss(), 0
            with opened(server.paths[0], os.O_RDWR | os.O_DIRECT) as fd, \
                    concurrent.futures.ThreadPoolExecutor(48) as pool:
                writes = [pool.submit(os.pwrite, fd, page, i * M) for i in range(480)]
                while not all(done.done() for done in writes):
                    most = max(most, server.rss())
                    time.sleep(0.005)
                self.assertEqual({done.result() for done in writes}, {M})
            self.assertLess(most, before + M + 16 * M)

    def test_writes_reach_the_image(self):
        image = self.image(harness.pattern(M))
        model = bytearray(harness.pattern(M))
        for flags in (0, os.O_DIRECT, os.O_DSYNC, os.O_DIRECT | os.O_DSYNC):
            with self.subTest(flags=flags), self.files(image) as server:
                with opened(server.paths[0], os.O_RDWR | flags) as fd:
                    page = page_aligned(harness.pattern(256 * K, seed=flags))
                    for offset, length in ((0, 4096), (64 * K, 256 * K), (M - 512, 512), (12 * K, 1024)):
                        self.assertEqual(os.pwrite(fd, page[:length], offset), length)
                        model[offset:offset + length] = page[:length]
                    os.fsync(fd)
                self.assertTrue(harness.read_file(image) == model)
                self.assertTrue(harness.read_file(server.paths[0]) == model)

    def test_writes_end_where_the_device_does(self):
        image = self.image(harness.pattern(64 * K + 100))
        with self.files(image) as server, opened(server.paths[0], os.O_RDWR) as fd:
            self.assertEqual(os.pwrite(fd, b"x" * 4096, 64 * K), 100)
            self.assert_error(errno.ENOSPC, os.pwrite, fd, b"x", 64 * K + 100)
            self.assert_error(errno.ENOSPC, os.pwrite, fd, b"x", 10 * M)
        self.assertEqual(os.stat(image).st_size, 64 * K + 100)

    def test_size_owner_and_mode_stay(self):
        image = self.image(b"", size=M)
        with self.files(image) as server:
            for size in (0, M - 1, M + 1):
                self.assert_error(errno.EPERM, os.truncate, server.paths[0], size)
            os.truncate(server.paths[0], M)
            self.assert_error(errno.EPERM, os.chmod, server.paths[0], 0o777)
            os.utime(server.paths[0])
            with opened(server.paths[0], os.O_RDWR) as fd:
                self.assert_error(errno.ENOTTY, fcntl.ioctl, fd, 0x1234)
                self.assert_error(errno.EOPNOTSUPP, fallocate, fd, 0, 0, 2 * M)
                self.assert_error(errno.EFBIG, fallocate, fd, ZERO_RANGE, M - 4096, 8192)
            self.assert_error(errno.ENOTDIR, os.listdir, server.paths[0])
            self.assert_error(errno.ENOTDIR, os.stat, server.paths[0] + "/name")
            server.assert_alive()

    def test_read_only(self):
        image = self.image(harness.pattern(64 * K))
        with self.files(image, args=["--read-only"]) as server:
            self.assertTrue(harness.read_file(server.paths[0]) == harness.pattern(64 * K))
            for flags in (os.O_WRONLY, os.O_RDWR):
                self.assert_error(errno.EROFS, os.open, server.paths[0], flags)

    def test_holes(self):
        """Zeroed, punched and written at random: data and holes are told as the image has them."""
        size, chunk = 4 * M, 64 * K
        rng = random.Random(harness.SEED)
        image = self.image(b"", size=size)
        model = bytearray(size)
        with self.files(image) as server, opened(server.paths[0], os.O_RDWR) as fd, \
                opened(image, os.O_RDONLY) as image_fd:
            for _ in range(harness.rounds(60)):
                at = rng.randrange(size // chunk) * chunk
                length = min(rng.randrange(1, 8) * chunk, size - at)
                kind = rng.randrange(3)
                if kind == 0:
                    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, at, length)
                elif kind == 1:
                    fallocate(fd, ZERO_RANGE | KEEP_SIZE, at, length)
                else:
                    os.pwrite(fd, harness.pattern(length), at)
                model[at:at + length] = harness.pattern(length) if kind == 2 else bytes(length)
                os.fsync(fd)
                for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                    start = rng.randrange(size)
                    told = []
                    for f in (fd, image_fd):
                        try:
                            told.append(os.lseek(f, start, whence))
                        except OSError as error:
                            told.append(-error.errno)
                    self.assertEqual(*told, f"seed {harness.SEED}")
                self.assert_error(errno.ENXIO, os.lseek, fd, size, os.SEEK_HOLE)
            self.assertTrue(os.pread(fd, size, 0) == model)
        self.assertTrue(harness.read_file(image) == model)

    def test_memory_maps(self):
        image = self.image(harness.pattern(64 * K))
        with self.files(image) as server, opened(server.paths[0], os.O_RDWR) as fd:
            with mmap.mmap(fd, 64 * K) as memory:
                self.assertTrue(memory[:] == harness.pattern(64 * K))
                memory[5000:5005] = b"hello"
                memory.flush()
        self.assertEqual(harness.read_file(image)[5000:5005], b"hello")

    def test_several_images(self):
        images = [self.image(harness.pattern(64 * K, seed=n), name=f"{n}.img") for n in range(3)]
        with self.files(*images) as server:
            for n, path in enumerate(server.paths):
                self.assertTrue(harness.read_file(path) == harness.pattern(64 * K, seed=n))

    @need("fio")
    def test_verified_at_every_depth(self):
        image = self.image(b"", size=16 * M)
        for ring, io in harness.ways():
            with self.subTest(ring=ring, io=io), self.files(image, ring=ring, io=io) as server:
                for depth, direct, block in ((1, 0, "4k"), (7, 1, "4k"), (64, 1, "512-64k"), (32, 1, "1m")):
                    run("fio", "--name=verify", f"--filename={server.paths[0]}", "--rw=randwrite",
                        f"--bs{'range' if '-' in block else ''}={block}", "--size=8m", f"--iodepth={depth}",
                        "--blockalign=512", "--ioengine=libaio", f"--direct={direct}", "--verify=crc32c",
                        "--verify_fatal=1", "--verify_state_save=0", "--verify_state_save=0", "--do_verify=1", "--thread",
                        "--allow_file_create=0",
                        "--serialize_overlap=1")


@need_root
class Loop(FuseCase):
    def file_system(self, kind, ring):
        image = self.image(b"", 400 * M, f"{kind}-{ring}.img")
        with self.files(image, ring=ring) as server:
            with harness.loop_device(0, backing=server.paths[0], options=["--direct-io=on"]) as device:
                run(*harness.MKFS[kind], device)
                with harness.mounted(device, kind) as point:
                    run("cp", "-a", os.path.join(harness.ROOT, "src"), point)
                    run("fio", "--name=data", f"--filename={point}/data", "--rw=randwrite", "--bs=4k", "--size=24m",
                        "--iodepth=32", "--ioengine=libaio", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
                        "--verify_state_save=0", "--thread")
                    run("fio", "--name=meta", f"--directory={point}", "--nrfiles=200", "--filesize=4k-64k",
                        "--rw=randwrite", "--bs=4k", "--openfiles=20", "--numjobs=2", "--thread", "--fallocate=none",
                        "--create_on_open=1", "--fsync=20")
                    run("sh", "-c", f"cd {point}/src && find . -type f -exec sha256sum {{}} + > {self.path('sums')}")
                    run("fstrim", point)
                with harness.mounted(device, kind) as point:
                    run("sh", "-c", f"cd {point}/src && sha256sum --quiet -c {self.path('sums')}")
                run(*(("fsck.ext4", "-fn") if kind == "ext4" else ("xfs_repair", "-n")), device)

    @need("fio", "mkfs.ext4")
    def test_ext4(self):
        for ring in harness.rings():
            with self.subTest(ring=ring):
                self.file_system("ext4", ring)

    @need("fio", "mkfs.xfs")
    def test_xfs(self):
        for ring in harness.rings()[:1]:
            with self.subTest(ring=ring):
                self.file_system("xfs", ring)

    @need("fio")
    def test_verified_at_every_depth(self):
        image = self.image(b"", size=16 * M)
        with self.files(image) as server, \
                harness.loop_device(0, backing=server.paths[0], options=["--direct-io=on"]) as device:
            for depth in (1, 64):
                run("fio", "--name=verify", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--size=8m",
                    f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
                    "--verify_state_save=0", "--thread")


class Life(FuseCase):
    def test_file_is_made_and_removed_or_left(self):
        image = self.image(harness.pattern(64 * K))
        path = self.path("device")
        with self.files(image):
            self.assertEqual(mounts(path), ["fuse.bight"])
        self.assertFalse(os.path.exists(path))
        harness.write_file(path, b"under it")
        with self.files(image):
            self.assertEqual(os.stat(path).st_size, 64 * K)
        self.assertEqual(mounts(path), [])
        self.assertEqual(harness.read_file(path), b"under it")

    def test_killed_server_leaves_no_mount(self):
        image = self.image(harness.pattern(64 * K))
        for _ in range(harness.rounds(4)):
            with self.files(image) as server:
                with opened(server.paths[0], os.O_RDONLY) as fd:
                    server.kill()
                    harness.wait_until(lambda: not os.path.lexists(server.paths[0]), "the file's removal")
                    self.assertEqual(mounts(server.paths[0]), [])
                    with self.assertRaises(OSError):
                        os.pread(fd, 4096, 0)

    def test_open_file_does_not_keep_the_server(self):
        image = self.image(harness.pattern(64 * K))
        with self.files(image) as server, opened(server.paths[0], os.O_RDONLY) as fd:
            server.stop()
            with self.assertRaises(OSError):
                os.pread(fd, 4096, 8192)

    def test_unmounted_server_ends(self):
        image = self.image(harness.pattern(64 * K))
        with self.files(image) as server:
            run("umount" if not os.geteuid() else "fusermount3", *(["-u"] if os.geteuid() else []), server.paths[0])
            server.wait()

    def test_refused(self):
        image = self.image(harness.pattern(64 * K))
        for path, told in ((image, "is the image itself"), (self.dir, "is no regular file"),
                           ("/no/such/directory/device", "No such file or directory")):
            done = run(BIGHT, "serve", image, "--fuse", path, status=1)
            self.assertRegex(done.stderr, rf"\Abight: --fuse: [^\n]*{told}[^\n]*; [^\n]+\n\Z")
        link = self.path("link")
        os.symlink(self.path("twice"), link)
        for option, path in (("--fuse", self.path("twice")), ("--fuse", link), ("--nbd", "unix:" + self.path("twice"))):
            done = run(BIGHT, "serve", image, "--fuse", self.path("twice"), option, path, status=1)
            self.assertRegex(done.stderr, r"\Abight: --[^\n]*(is named twice|is no regular file); [^\n]+\n\Z")
            self.assertEqual(mounts(self.path("twice")), [])
        self.assertTrue(harness.read_file(image) == harness.pattern(64 * K))
        other = self.image(b"", size=M, name="other.img")
        with self.files(image) as server:
            done = run(BIGHT, "serve", other, "--fuse", server.paths[0], status=1)
            self.assertIn("is a device of bight already", done.stderr)
            self.assertTrue(harness.read_file(server.paths[0]) == harness.pattern(64 * K))

    @need_root
    @need("setpriv", "fusermount3")
    @unittest.skipUnless(have_fuse() and os.stat("/dev/fuse").st_mode & 0o006 == 0o006, "/dev/fuse is for root alone")
    @unittest.skipUnless(os.path.exists("/etc/mtab"), "fusermount3 needs /etc/mtab to unmount")
    def test_without_root(self):
        directory = self.path("theirs")
        os.mkdir(directory)
        os.chmod(self.dir, 0o755)
        image = harness.write_file(os.path.join(directory, "disk.img"), harness.pattern(64 * K))
        for path in (directory, image):
            os.chown(path, 65534, 65534)
        device = os.path.join(directory, "device")
        with self.files(image, path=device, wrap=NOBODY) as server:
            seen = run(*NOBODY, "sha256sum", device).stdout.split()[0]
            self.assertEqual(seen, run("sha256sum", image).stdout.split()[0])
            server.stop()
        self.assertEqual(mounts(device), [])
        with self.files(image, path=device, wrap=NOBODY) as server:
            server.process.send_signal(signal.SIGKILL)
            harness.wait_until(lambda: not mounts(device), "the unmounting")


@need_root
class Supervised(FuseCase):
    @need("fio")
    def test_requests_of_a_killed_worker_are_answered_by_the_next(self):
        image = self.image(size=64 * M)
        environment = os.environ | {"XDG_RUNTIME_DIR": self.dir}
        device = self.path("device")

        def bight(*arguments):
            return run(BIGHT, *arguments, env=environment).stdout

        self.assertEqual(bight("attach", "--name", "killed", "--fuse", device, image).strip(), device)
        with harness.undo_stack() as stack:
            stack.callback(run, BIGHT, "detach", "killed", "--force", env=environment, status=None)
            stack.callback(run, "umount", "--force", "--lazy", device, status=None)
            loop = stack.enter_context(harness.loop_device(0, backing=device, options=["--direct-io=on"]))
            fio = subprocess.Popen([harness.have("fio"), "--name=verify", f"--filename={loop}", "--rw=randwrite", "--bs=4k",
                                    "--size=32m", "--iodepth=32", "--ioengine=libaio", "--direct=1", "--thread",
                                    "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--rate_iops=4000"],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(fio.kill)
            killed = set()

            def another():
                worker = re.search(r"^worker_pid +([1-9][0-9]*)$", bight("show", "killed"), re.M)
                return worker and int(worker[1]) not in killed and int(worker[1])

            for _ in range(3):
                harness.wait_until(another, "a worker")
                worker = another()
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
                time.sleep(0.3)  # so that it dies at different times
            text, _ = fio.communicate(timeout=harness.PATIENCE)
            self.assertEqual(fio.returncode, 0, text)
        self.assertEqual(mounts(device), [])


if __name__ == "__main__":
    unittest.main()
