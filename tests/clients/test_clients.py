#!/usr/bin/python3
"""Clients that others wrote: libnbd's tools, QEMU's, fio, and a file system through FUSE."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from harness import K, M, need, rounds, run

try:
    import nbd
except ImportError:
    nbd = None

SIZE = 16 * M


class Clients:
    """One server with a sparse image for all tests of a class."""

    ring = io = None

    @classmethod
    def setUpClass(cls):
        cls.dir = cls.enterClassContext(harness.scratch_dir())
        cls.image = os.path.join(cls.dir, "disk.img")
        harness.write_file(cls.image, size=SIZE)
        cls.server = cls.enterClassContext(harness.Server(cls.image, ring=cls.ring, io=cls.io))
        cls.uri = cls.server.uri()

    def setUp(self):
        self.server.assert_alive()

    def path(self, name):
        path = os.path.join(self.dir, name)
        self.addCleanup(lambda: os.path.exists(path) and os.unlink(path))
        return path

    def fill(self):
        """Data, holes and zeroes in the image, by our own client."""
        with self.server.connect() as client:
            client.expect(0, raw.WRITE_ZEROES, 0, SIZE)
            for at, length in ((0, M), (3 * M, 64 * K), (10 * M + 4096, 5 * M), (SIZE - 8192, 8192)):
                client.write(at, harness.pattern(length, at))
            client.flush()
        return harness.read_file(self.image)

    def assert_same(self, path, other=None):
        self.assertTrue(harness.read_file(path) == harness.read_file(other or self.image), "the contents differ")

    # libnbd's tools

    @need("nbdinfo")
    def test_nbdinfo_tells_what_there_is(self):
        info = json.loads(run("nbdinfo", "--json", self.uri).stdout)
        self.assertEqual(info["protocol"], "newstyle-fixed")
        self.assertTrue(info["structured"])
        export = info["exports"][0]
        self.assertEqual((export["export-name"], export["export-size"]), ("disk.img", SIZE))
        self.assertEqual([export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")],
                         [1, 4096, 32 * M])
        self.assertEqual(export["contexts"], ["base:allocation"])
        self.assertEqual({key: value for key, value in export.items() if key.startswith(("can_", "is_"))}, {
            "can_cache": True, "can_df": True, "can_fast_zero": True, "can_flush": True, "can_fua": True,
            "can_multi_conn": True, "can_trim": True, "can_zero": True, "is_read_only": False, "is_rotational": False})

    @need("nbdinfo")
    def test_nbdinfo_lists_the_exports(self):
        info = json.loads(run("nbdinfo", "--json", "--list", self.uri).stdout)
        self.assertEqual([export["export-name"] for export in info["exports"]], ["disk.img"])

    @need("nbdinfo")
    def test_nbdinfo_size(self):
        self.assertEqual(run("nbdinfo", "--size", self.uri).stdout.strip(), str(SIZE))

    @need("nbdinfo")
    def test_nbdinfo_map_agrees_with_the_contents(self):
        data = self.fill()
        extents = json.loads(run("nbdinfo", "--map", "--json", self.uri).stdout)
        end = 0
        for extent in extents:
            self.assertEqual(extent["offset"], end)
            end += extent["length"]
            if extent["type"] & 2:
                self.assertFalse(any(data[extent["offset"]:end]))
        self.assertEqual(end, SIZE)
        self.assertTrue(any(extent["type"] == 3 for extent in extents), "no hole in a sparse image")

    @need("nbdinfo")
    def test_nbdinfo_of_an_unknown_export_fails(self):
        self.assertNotEqual(run("nbdinfo", self.server.uri("nothing"), status=None).returncode, 0)

    @need("nbdcopy")
    def test_nbdcopy_from_the_image(self):
        self.fill()
        for options in ((), ("--connections=1", "--requests=1"), ("--connections=4", "--requests=64"),
                        ("--synchronous",)):
            copy = self.path("copy")
            run("nbdcopy", *options, self.uri, copy)
            self.assert_same(copy)

    @need("nbdcopy")
    def test_nbdcopy_to_the_image(self):
        source = self.path("source")
        for options in (("--connections=4", "--requests=64", "--request-size=131072"), ("--synchronous",),
                        ("--allocated",), ("--sparse=0",)):
            with self.subTest(options=options):
                with self.server.connect() as client:
                    client.expect(0, raw.WRITE_ZEROES, 0, SIZE)
                data = bytearray(SIZE)
                data[M:2 * M] = harness.pattern(M, len(options))
                data[SIZE - 70000:] = harness.pattern(70000)
                harness.write_file(source, data)
                run("nbdcopy", "--flush", *options, source, self.uri)
                self.assert_same(source)

    @need("nbdcopy")
    def test_nbdcopy_between_two_servers(self):
        self.fill()
        other = harness.write_file(self.path("other"), size=SIZE)
        with harness.Server(other, ring=self.ring, io=self.io) as server:
            run("nbdcopy", "--flush", self.uri, server.uri())
        self.assert_same(other)

    @need("nbdsh")
    def test_nbdsh(self):
        run("nbdsh", "-u", self.uri, "-c", "h.pwrite(b'hello', 12345, nbd.CMD_FLAG_FUA)",
            "-c", "assert h.pread(7, 12344)[1:6] == b'hello'", "-c", "h.zero(10, 12340)", "-c", "h.trim(4096, 8192)",
            "-c", "h.cache(4096, 0)", "-c", "h.flush()", "-c", "assert h.pread(5, 12345) == bytes(5)",
            "-c", "h.shutdown()", env=os.environ | {"PATH": "/usr/bin:/bin"})  # the python3 that libnbd is for

    # QEMU's

    @need("qemu-img")
    def test_qemu_img_info(self):
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", self.uri).stdout)
        self.assertEqual(info["virtual-size"], SIZE)

    @need("qemu-img")
    def test_qemu_img_convert_and_compare(self):
        self.fill()
        copy = self.path("copy")
        for options in ((), ("-m", "16", "-W")):
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", *options, self.uri, copy)
            self.assert_same(copy)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, self.uri)
        with open(copy, "r+b") as file:
            file.seek(2 * M)
            file.write(b"x")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, self.uri, status=1)

    @need("qemu-img")
    def test_qemu_img_convert_to_the_image(self):
        source = self.path("source")
        data = bytearray(SIZE)
        data[5 * M:6 * M] = harness.pattern(M, 8)
        harness.write_file(source, data)
        for options in ((), ("-m", "16", "-W"), ("-S", "0")):
            self.fill()
            run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", *options, source, self.uri)
            self.assert_same(source)

    @need("qemu-img")
    def test_qemu_img_convert_from_qcow2(self):
        data = self.fill()
        qcow2 = self.path("copy.qcow2")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.uri, qcow2)
        with self.server.connect() as client:
            client.expect(0, raw.WRITE_ZEROES, 0, SIZE)
        run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, self.uri)
        self.assertTrue(harness.read_file(self.image) == data)

    @need("qemu-img")
    def test_qemu_img_map_agrees_with_the_contents(self):
        data = self.fill()
        end = 0
        for extent in json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", self.uri).stdout):
            self.assertEqual(extent["start"], end)
            end += extent["length"]
            if extent["zero"]:
                self.assertFalse(any(data[extent["start"]:end]))
        self.assertEqual(end, SIZE)

    def qemu_io(self, *commands, options=()):
        arguments = [argument for command in commands for argument in ("-c", command)]
        done = run("qemu-io", "-f", "raw", *options, *arguments, self.uri)
        self.assertNotIn("failed", done.stdout)
        self.assertNotIn("rror", done.stdout + done.stderr)

    @need("qemu-io")
    def test_qemu_io_patterns(self):
        self.qemu_io("write -P 0xa1 0 1M", "write -P 0xa2 512 512", "write -f -P 0xa3 5M 64k", "flush",
                     "read -P 0xa1 0 512", "read -P 0xa2 512 512", "read -P 0xa1 1k 1023k", "read -P 0xa3 5M 64k")
        self.qemu_io("read -P 0xa2 512 512", "read -P 0xa3 5M 64k")

    @need("qemu-io")
    def test_qemu_io_unaligned(self):
        self.qemu_io("write -P 0x11 1M 8k", "write -P 0x22 1048577 1", "write -P 0x33 1052671 2",
                     "write -P 0x44 1053000 3000", "read -P 0x11 1M 1", "read -P 0x22 1048577 1",
                     "read -P 0x33 1052671 2", "read -P 0x44 1053000 3000", "read -P 0x11 1056000 100")

    @need("qemu-io")
    def test_qemu_io_discard_and_zeroes(self):
        self.qemu_io("write -P 0x55 8M 4M", "flush")
        before = harness.allocated(self.image)
        self.qemu_io("discard 8M 1M", "write -z -u 9M 1M", "write -z 10M 1M", "write -z -f 11M 4k", "flush",
                     "read -P 0 8M 3M", "read -P 0 11M 4k", "read -P 0x55 11268k 1020k")
        self.assertLess(harness.allocated(self.image), before - M)

    @need("qemu-io")
    def test_qemu_io_many_in_flight(self):
        writes = [f"aio_write -P {number % 255 + 1} {number * 64}k 64k" for number in range(rounds(256))]
        reads = [f"aio_read -P {number % 255 + 1} {number * 64}k 64k" for number in range(rounds(256))]
        self.qemu_io(*writes, "aio_flush", *reads, "aio_flush")

    # fio

    @need("fio")
    def test_fio_verify(self):
        for name, options in {
                "random 4k": ["--rw=randwrite", "--bs=4k", "--iodepth=64"],
                "unaligned": ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=32"],
                "sequential": ["--rw=write", "--bs=128k", "--iodepth=8"],
                "mixed with flushes": ["--rw=randrw", "--bs=8k", "--iodepth=32", "--fsync=100"],
        }.items():
            with self.subTest(name):
                self.fio("--size=7M", "--offset_increment=8M", "--numjobs=4", *options)

    def fio(self, *options):
        run("fio", "--name=verify", "--ioengine=nbd", f"--uri={self.uri}", "--thread", "--verify=crc32c",
            "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--randrepeat=0",
            f"--randseed={harness.SEED}", "--output-format=terse", *options, cwd=self.dir)

    # the library

    @unittest.skipIf(nbd is None, "not installed: python3-libnbd")
    def test_libnbd_many_in_flight_on_several_connections(self):
        handles = []
        for _ in range(4):
            handle = nbd.NBD()
            handle.connect_uri(self.uri)
            self.assertTrue(handle.can_multi_conn())
            handles.append(handle)
        size = 3000
        for first in range(0, rounds(2000), 200):
            buffers = [(handles[n % 4], n * size, nbd.Buffer.from_bytearray(bytearray(harness.pattern(size, n))))
                       for n in range(first, first + 200)]
            self.finish([(handle, handle.aio_pwrite(buffer, offset)) for handle, offset, buffer in buffers])
            reads = [(handles[(n + 1) % 4], n * size, nbd.Buffer(size)) for n in range(first, first + 200)]
            self.finish([(handle, handle.aio_pread(buffer, offset)) for handle, offset, buffer in reads])
            for number, (_, _, buffer) in enumerate(reads, first):
                self.assertEqual(buffer.to_bytearray(), harness.pattern(size, number))
        handles[0].flush()
        for handle in handles:
            handle.shutdown()

    def finish(self, commands):
        for handle, cookie in commands:
            while not handle.aio_command_completed(cookie):
                self.assertGreater(handle.poll(60000), 0)

    # a file system

    @contextlib.contextmanager
    def fuse(self):
        """The export as a plain file."""
        if not os.access("/dev/fuse", os.R_OK | os.W_OK) or not harness.have("nbdfuse"):
            self.skipTest("needs nbdfuse and /dev/fuse")
        with harness.undo_stack() as stack:
            path = stack.enter_context(harness.scratch_dir())
            process = subprocess.Popen(["nbdfuse", path, self.uri], stderr=subprocess.PIPE, text=True,
                                       preexec_fn=harness.die_with_parent)
            stack.callback(process.stderr.close)
            stack.callback(process.wait)
            stack.callback(run, "fusermount3" if harness.have("fusermount3") else "umount", *(
                ["-u"] if harness.have("fusermount3") else []), path, status=None)
            mounted = os.path.join(path, "nbd")
            harness.wait_until(lambda: process.poll() is not None or os.path.exists(mounted), "the FUSE mount")
            if process.poll() is not None:
                raise unittest.SkipTest(f"nbdfuse: {process.stderr.read().strip()}")
            yield mounted

    @need("mkfs.ext4", "e2fsck", "debugfs")
    def test_ext4_made_filled_and_checked_through_fuse(self):
        tree = self.path("tree")
        os.mkdir(tree)
        self.addCleanup(shutil.rmtree, tree)
        for number in range(50):
            harness.write_file(os.path.join(tree, f"file{number}"), harness.pattern(number * 1000, number))
        with self.fuse() as path:
            run("mkfs.ext4", "-q", "-F", "-d", tree, path)
            run("e2fsck", "-f", "-n", path)
        run("e2fsck", "-f", "-n", self.image)
        for number in (1, 17, 49):
            out = self.path("out")
            run("debugfs", "-R", f"dump file{number} {out}", self.image)
            self.assert_same(out, os.path.join(tree, f"file{number}"))

    @need("mkfs.ext4", "e2fsck")
    def test_ext4_mounted_through_fuse(self):
        if os.geteuid():
            self.skipTest("mounting needs root")
        with self.fuse() as path:
            run("mkfs.ext4", "-q", "-F", path)
            with harness.loop_device(0, backing=path) as device:
                with harness.mounted(device, "ext4") as point:
                    for number in range(20):
                        harness.write_file(os.path.join(point, f"file{number}"), harness.pattern(100000, number))
                    os.unlink(os.path.join(point, "file3"))
                with harness.mounted(device, "ext4") as point:
                    for number in range(4, 20):
                        self.assertEqual(harness.read_file(os.path.join(point, f"file{number}")),
                                         harness.pattern(100000, number))
            run("e2fsck", "-f", "-n", path)
        run("e2fsck", "-f", "-n", self.image)


for _ring, _io in harness.ways():
    harness.variant(globals(), Clients, unittest.TestCase, ring=_ring, io=_io)

if __name__ == "__main__":
    unittest.main()
