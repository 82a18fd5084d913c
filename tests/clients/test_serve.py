#!/usr/bin/python3
"""The life of `bight serve`: options, sockets, images, locks, signals, rights, and what it says when it cannot."""
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from harness import BIGHT, K, M, Case, Server, need, need_root, run

SIZE = 2 * M
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]


class ServeCase(Case):
    def refused(self, *arguments, status=1, wrap=(), **options):
        """The command fails with this exit status and one line on stderr, which is returned."""
        done = run(*wrap, BIGHT, *arguments, status=None, **options)
        self.assertEqual(done.returncode, status, f"bight {' '.join(map(str, arguments))}\n{done.stderr}")
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"\Abight: [^\n]+\n\Z")
        return done.stderr

    def refuse_image(self, *arguments, **options):
        return self.refused("serve", *arguments, "--nbd", f"unix:{self.path('refused.sock')}", **options)

    def assert_serves(self, address, data, export=""):
        with raw.connect(address, export=export) as client:
            self.assertEqual(client.size, len(data))
            self.assertTrue(client.read(0, len(data)) == data)
            client.disconnect()


class Usage(ServeCase):
    def test_help_is_told_on_stdout(self):
        for arguments in (["--help"], ["-h"], ["help"], ["help", "serve"], ["serve", "--help"], ["serve", "-h"]):
            done = run(BIGHT, *arguments)
            self.assertIn("bight", done.stdout)
            self.assertEqual(done.stderr, "")
        self.assertEqual(run(BIGHT, "help", "serve").stdout, run(BIGHT, "serve", "--help").stdout)

    def test_version(self):
        self.assertRegex(run(BIGHT, "--version").stdout, r"\Abight \d+\.\d+")

    def test_wrong_commands(self):
        for arguments in (["bogus"], ["--bogus"], ["help", "bogus"]):
            with self.subTest(arguments=arguments):
                self.refused(*arguments, status=2)
        self.assertIn("usage", run(BIGHT, status=2).stderr)

    def test_wrong_options(self):
        image, there = self.image(size=SIZE), ["--nbd", f"unix:{self.path('sock')}"]
        for arguments in (
                [], there, [image], [image, "--nbd"], [image, *there, "--bogus"], [image, *there, "--bogus=1"],
                [image, *there, "--queues", "0"], [image, *there, "--queues", "x"], [image, *there, "--queues", "-1"],
                [image, *there, "--depth", "0"], [image, *there, "--depth", "99999999999"],
                [image, *there, "--workers", "0"], [image, *there, "--connections", "0"],
                [image, *there, "--connections", "1.5"], [image, *there, "--block-size", "256"],
                [image, *there, "--block-size", "1000"], [image, *there, "--block-size", "8192"],
                [image, *there, "--block-size", "0"], [image, *there, "--offset", "-1"],
                [image, *there, "--offset", "x"], [image, *there, "--offset", "1Q"], [image, *there, "--offset", ""],
                [image, *there, "--offset", "1MM"],
                [image, *there, "--size-limit", "99999999999999999999"], [image, *there, "--size-limit", "16777216T"],
                [image, *there, "--ring", "bogus"], [image, *there, "--io", "bogus"], [image, *there, "--map", "bogus"],
                [image, *there, "--format", "bogus"], [image, *there, "--name"],
                [image, *there, "--name", "a", "--name", "b"], [image, *there, "--read-only=yes"]):
            with self.subTest(arguments=arguments):
                self.refused("serve", *arguments, status=2)

    def test_wrong_fault_specs(self):
        image = self.image(size=SIZE)
        for spec in ("bogus", "read", "read.error", "read.error=", "read.error=2", "read.error=-1", "read.error=x",
                     "read.error=0.5:EWHAT", "read.bogus=1", "bogus.error=1", "flush.short=0.5", "read.torn=1",
                     "read.delay=1", "read.delay=1:x", "seed=x", "io=null", "io=fault:", "after=x"):
            with self.subTest(spec=spec):
                self.refuse_image(image, "--io", f"fault:{spec}", status=2)

    def test_several_images_of_one_name(self):
        os.mkdir(self.path("other"))
        images = [self.image(size=SIZE), harness.write_file(self.path("other/disk.img"), size=SIZE)]
        self.refuse_image(*images, status=2)
        with Server(*images, args=["--name", "a", "--name", "b"]) as server, server.client() as client:
            client.greet()
            self.assertEqual(client.list().keys(), {"a", "b"})

    def test_names_that_are_not_utf8(self):
        wrong = os.fsdecode(b"caf\xe9")
        image = self.image(harness.pattern(SIZE), name=wrong)
        self.assertIn("--name", self.refuse_image(image, status=2))
        self.refuse_image(self.image(size=SIZE), "--name", wrong, status=2)
        with Server(image, args=["--name", "café"]) as server:
            self.assert_serves(server.socket, harness.pattern(SIZE), "café")


class Images(ServeCase):
    def test_several_images_are_several_exports(self):
        data = [harness.pattern(SIZE + 1000 * number, number) for number in range(5)]
        images = [self.image(content, name=f"disk{number}") for number, content in enumerate(data)]
        with Server(*images) as server:
            for number, content in enumerate(data):
                self.assert_serves(server.socket, content, f"disk{number}")
            self.assert_serves(server.socket, data[0])
            with server.connect(export="disk3") as one, server.connect(export="disk4") as other:
                one.write(0, b"three")
                other.write(0, b"four")
                self.assertEqual(one.read(0, 5), b"three")
        self.assertEqual(harness.read_file(images[3])[:5], b"three")
        self.assertEqual(harness.read_file(images[4])[:5], b"four" + data[4][4:5])

    def test_many_images_and_connections_with_a_small_soft_limit_of_files(self):
        images = [self.image(bytes([number + 1]), M, f"disk{number}") for number in range(40)]
        harness.usable_fds(1024)

        def small():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

        for ring in harness.rings():
            with self.subTest(ring=ring), Server(*images, ring=ring, args=["--queues", 4], setup=small) as server:
                clients = [self.enterContext(server.connect(export=f"disk{number % 40}")) for number in range(200)]
                for number, client in enumerate(clients):
                    self.assertEqual(client.read(0, 2), bytes([number % 40 + 1, 0]))

    def test_name(self):
        with Server(self.image(harness.pattern(SIZE)), args=["--name", "weird / näme"]) as server:
            self.assert_serves(server.socket, harness.pattern(SIZE), "weird / näme")
            self.assert_serves(server.socket, harness.pattern(SIZE), "")
            with server.client() as client:
                client.greet()
                self.assertEqual(list(client.list()), ["weird / näme"])
                self.assertEqual(client.option(raw.OPT_GO, raw.info_data("disk.img"))[-1][0], raw.REP_ERR_UNKNOWN)

    def test_the_second_name_names_the_second_image(self):
        images = [self.image(harness.pattern(SIZE, number), name=f"disk{number}") for number in range(2)]
        with Server(*images, args=["--name", "first", "--name", "second"]) as server:
            self.assert_serves(server.socket, harness.pattern(SIZE, 1), "second")

    def test_offset_and_size_limit(self):
        data = harness.pattern(SIZE)
        for ring, io in harness.ways():
            for offset, limit in (("1M", "512K"), ("4096", "1M"), ("512", None), ("1000", "10000"),
                                  (None, "1"), ("0", "1G"), ("1048577", "777777")):
                start = {"1M": M, None: 0}.get(offset) if offset in ("1M", None) else int(offset)
                length = {"512K": 512 * K, "1M": M, "1G": SIZE, None: SIZE}.get(limit) or int(limit)
                length = min(length, SIZE - start)
                with self.subTest(ring=ring, io=io, offset=offset, limit=limit):
                    image = self.image(data)
                    args = (["--offset", offset] if offset else []) + (["--size-limit", limit] if limit else [])
                    with Server(image, args=args, ring=ring, io=io) as server, server.connect() as client:
                        self.assertEqual(client.size, length)
                        self.assertTrue(client.read(0, length) == data[start:start + length])
                        client.write(0, b"\0" * min(length, 600))
                        client.write(length - 1, b"\0")
                        client.expect(raw.ENOSPC, raw.WRITE, length, 1, 0, b"x")
                        self.assertEqual(sum(size for _, size, _ in client.allocation()), length)
                    expected = bytearray(data)
                    expected[start:start + min(length, 600)] = bytes(min(length, 600))
                    expected[start + length - 1] = 0
                    self.assertTrue(harness.read_file(image) == expected)

    def test_an_offset_beyond_the_end(self):
        self.refuse_image(self.image(size=SIZE), "--offset", "3M")

    def test_an_empty_image(self):
        with Server(self.image()) as server, server.connect() as client:
            self.assertEqual(client.size, 0)
            client.expect(raw.EINVAL, raw.READ, 0, 1)
            client.expect(raw.ENOSPC, raw.WRITE, 0, 1, 0, b"x")
            client.flush()

    def test_a_symbolic_link(self):
        os.symlink(self.image(harness.pattern(SIZE)), self.path("link"))
        with Server(self.path("link")) as server:
            self.assert_serves(server.socket, harness.pattern(SIZE), "link")

    def test_an_image_truncated_below_us_reads_as_zeroes(self):
        for ring, io in harness.ways():
            image = self.image(harness.pattern(SIZE))
            with self.subTest(ring=ring, io=io), Server(image, ring=ring, io=io) as server:
                with server.connect() as client:
                    os.truncate(image, M + 1000)
                    self.assertEqual(client.read(M + 1000, M - 1000), bytes(M - 1000))
                    self.assertEqual(client.read(M, 4096), harness.pattern(SIZE)[M:M + 1000] + bytes(3096))

    def test_what_is_no_image(self):
        os.mkfifo(self.path("fifo"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path("socket"))
        os.symlink(self.path("nothing"), self.path("dangling"))
        for path in (self.path("missing"), self.dir, self.path("fifo"), self.path("socket"), self.path("dangling"),
                     "/dev/null", self.path("missing/missing"), "/proc/self/mem", ""):
            for options in ([], ["--read-only"], ["--io", "buffered"]):
                with self.subTest(path=path, options=options):
                    if path.startswith("/proc") and not options:
                        continue
                    self.refuse_image(path, *options)

    def test_strange_names_are_told_in_one_line_with_the_reason(self):
        for name in ("new\nline", "escape\033[2J", "x" * 255, "y/" * 2000, "z" * 5000, "-dash", " ", "%s%n"):
            with self.subTest(name=name):
                told = self.refuse_image(self.path(name))
                self.assertRegex(told, "No such file|File name too long")
                self.assertTrue(told.rstrip("\n").isprintable(), told)

    def test_a_bad_image_among_good_ones(self):
        good = self.image(size=SIZE)
        self.refuse_image(good, self.path("missing"))
        with Server(good):  # what was done was undone
            pass

    @need_root
    @need("setpriv")
    def test_an_image_without_the_right_to_it(self):
        os.chmod(self.dir, 0o777)
        image = self.image(harness.pattern(SIZE))
        binary = reachable(self)
        os.chmod(image, 0o600)
        for options in ([], ["--read-only"]):
            done = run(*NOBODY, binary, "serve", image, *options, "--nbd", f"unix:{self.path('sock')}", status=1)
            self.assertRegex(done.stderr, r"\Abight: [^\n]+\n\Z")
        os.chmod(image, 0o444)
        done = run(*NOBODY, binary, "serve", image, "--nbd", f"unix:{self.path('sock')}", status=1)
        self.assertIn("--read-only", done.stderr)

    @need("qemu-img")
    def test_an_image_of_another_format_is_refused(self):
        for format in ("qcow2", "vmdk", "vdi", "luks", "qed", "vhdx", "parallels", "vpc"):
            image = self.path(f"disk.{format}")
            options = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"] if format == "luks" else []
            if run("qemu-img", "create", "-q", "-f", format, *options, image, "4M", status=None).returncode:
                continue  # this QEMU cannot make it
            with self.subTest(format=format):
                for access in ([], ["--read-only"]):
                    message = self.refuse_image(image, *access)
                    self.assertIn(format, message)
                    self.assertIn("--format raw", message)
                before = harness.read_file(image)
                with Server(image, args=["--format", "raw"]) as server:
                    self.assert_serves(server.socket, before)

    def test_a_format_that_begins_within_the_offset_or_later_is_data(self):
        """Only what the image file itself looks like counts, not what a guest has written into it."""
        image = self.image(bytes(M) + b"QFI\xfb" + bytes(M))
        with Server(image) as server, server.connect() as client:
            self.assertEqual(client.read(M, 4), b"QFI\xfb")

    def test_direct_does_not_fill_the_page_cache(self):
        if not harness.have("fincore"):
            self.skipTest("not installed: fincore")
        image = self.image(harness.pattern(SIZE))
        with open(image, "rb") as file:
            try:
                os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
            except OSError:
                self.skipTest("no direct I/O here")
            os.fsync(file.fileno())
        for ring in harness.rings():
            for io, cached in (("direct", False), ("buffered", True)):
                with Server(image, ring=ring, io=io) as server, server.connect() as client:
                    with open(image, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    client.read(0, SIZE)
                    pages = int(json.loads(run("fincore", "--json", "--bytes", image).stdout)["fincore"][0]["pages"])
                    # the format check at the start reads one block through the cache
                    self.assertEqual(pages > 16, cached, f"--ring {ring} --io {io}: {pages} pages are cached")

    @need_root
    def test_a_file_system_without_direct_io_is_told_and_served_buffered(self):
        with harness.mounted("none", "ramfs") as point:
            image = harness.write_file(os.path.join(point, "disk.img"), harness.pattern(SIZE))
            for ring in harness.rings():
                with Server(image, ring=ring) as server:
                    with server.connect() as client:
                        self.assertEqual(client.read(0, SIZE), harness.pattern(SIZE))
                        client.write(1000, bytes(5000))
                        client.expect(0, raw.WRITE_ZEROES, 9000, 5000)  # no fallocate there either
                        client.expect(0, raw.WRITE_ZEROES, 100000, 5000, raw.NO_HOLE)
                        client.expect((0, raw.ENOTSUP), raw.WRITE_ZEROES, 200000, 4096, raw.FAST_ZERO | raw.NO_HOLE)
                        client.expect(0, raw.TRIM, 300000, 5000)
                        client.flush()
                        self.assertEqual(client.read(1000, 5000) + client.read(9000, 5000) + client.read(100000, 5000),
                                         bytes(15000))
                        client.write(0, harness.pattern(SIZE))
                    self.assertRegex(server.stop(), r"\A[^\n]*buffered[^\n]*\n\Z")
                with Server(image, ring=ring, io="buffered") as server:
                    self.assertEqual(server.stop(), "")

    def test_null_takes_and_gives_bytes(self):
        with Server(self.image(harness.pattern(SIZE)), io="null") as server, server.connect() as client:
            self.assertEqual(len(client.read(0, SIZE)), SIZE)
            client.write(0, bytes(SIZE))
            client.expect(0, raw.TRIM, 0, SIZE)
            client.expect((0, raw.EINVAL), raw.FLUSH)
        self.assertEqual(harness.read_file(self.path("disk.img")), harness.pattern(SIZE))


class BlockDevices(ServeCase):
    def test_devices_with_small_and_large_sectors(self):
        """512-byte and unaligned requests work also on sectors of 4096 bytes."""
        for sector in (512, 4096):
            for ring, io in harness.ways():
                with self.subTest(sector=sector, ring=ring, io=io), harness.loop_device(8 * M, sector) as device:
                    with Server(device, ring=ring, io=io) as server:
                        for mode in raw.MODES:
                            with server.connect(mode) as client:
                                self.exercise(client)
                    with open(device, "rb") as file:
                        self.assertTrue(file.read() == self.shadow)

    def exercise(self, client):
        self.assertEqual(client.size, 8 * M)
        self.shadow = bytearray(harness.pattern(8 * M))
        client.write(0, self.shadow)
        for number, (offset, length) in enumerate(((512, 512), (1536, 512), (4096 + 512, 1024), (8191, 2),
                                                   (8 * M - 512, 512), (8 * M - 1, 1), (100001, 200001),
                                                   (3584, 1024))):
            data = harness.pattern(length, number + 1)
            client.write(offset, data, raw.FUA if number % 2 else 0)
            self.shadow[offset:offset + length] = data
            self.assertEqual(client.read(offset, length), data)
        for offset, length, flags in ((M + 512, 512, 0), (2 * M, M, 0), (3 * M + 512, 4096, raw.NO_HOLE),
                                      (4 * M + 3, 99999, 0), (5 * M, M, raw.NO_HOLE)):
            client.expect(0, raw.WRITE_ZEROES, offset, length, flags)
            self.shadow[offset:offset + length] = bytes(length)
        client.expect(0, raw.TRIM, 6 * M, M)
        self.shadow[6 * M:7 * M] = client.read(6 * M, M)
        cookies = []
        for at in range(7 * M, 7 * M + 64 * 512, 512):
            data = harness.pattern(512, at)
            self.shadow[at:at + 512] = data
            cookies.append(client.issue(raw.WRITE, at, data=data))
        for cookie in cookies:
            self.assertEqual(client.wait(cookie).error, 0)
        client.flush()
        self.assertTrue(client.read(0, 8 * M) == self.shadow)
        if client.mode != "simple":
            self.assertEqual(sum(length for _, length, _ in client.allocation()), 8 * M)

    def test_a_mounted_device_is_refused(self):
        if not harness.have("mkfs.ext4"):
            self.skipTest("not installed: mkfs.ext4")
        with harness.loop_device(64 * M) as device:
            run("mkfs.ext4", "-q", "-F", device)
            with harness.mounted(device, "ext4"):
                self.refuse_image(device)
            with Server(device):
                pass

    def test_a_read_only_device(self):
        with harness.loop_device(M, options=["--read-only"]) as device:
            self.assertIn("--read-only", self.refuse_image(device))
            with Server(device, args=["--read-only"]) as server:
                self.assert_serves(server.socket, bytes(M))


class Locks(ServeCase):
    def test_a_second_writer_is_refused(self):
        image = self.image(harness.pattern(SIZE))
        with Server(image) as server:
            self.refuse_image(image)
            self.refuse_image(image, "--read-only")
            self.refuse_image(image, image, "--name", "a", "--name", "b")
            self.assert_serves(server.socket, harness.pattern(SIZE))
        with Server(image):
            pass

    def test_one_image_twice_in_one_server(self):
        image = self.image(size=SIZE)
        self.refuse_image(image, image, "--name", "a", "--name", "b")
        os.symlink(image, self.path("link"))
        self.assertRegex(self.refuse_image(image, self.path("link")), "link: this bight, as another image, has it open")
        with Server(image, image, args=["--read-only", "--name", "a", "--name", "b"]):
            pass

    def test_readers_share(self):
        image = self.image(harness.pattern(SIZE))
        with Server(image, args=["--read-only"]) as one, Server(image, args=["--read-only"]) as other:
            self.assert_serves(one.socket, harness.pattern(SIZE))
            self.assert_serves(other.socket, harness.pattern(SIZE))
            self.refuse_image(image)

    @need("qemu-img", "qemu-io", "qemu-nbd")
    def test_qemu_is_refused_what_we_hold(self):
        image = self.image(harness.pattern(SIZE))
        with Server(image):
            for command in (["qemu-io", "-f", "raw", "-c", "write 0 512", image],
                            ["qemu-nbd", "-f", "raw", "-k", self.path("qemu.sock"), image],
                            ["qemu-img", "resize", "-f", "raw", image, "+1M"]):
                done = run(*command, status=None)
                self.assertRegex(done.stderr, "lock", command)
            run("qemu-img", "info", "-U", "-f", "raw", image)
        with Server(image, args=["--read-only"]):
            run("qemu-io", "-f", "raw", "-r", "-c", "read 0 512", image)
            self.assertRegex(run("qemu-io", "-f", "raw", "-c", "write 0 512", image, status=None).stderr, "lock")
        self.assertEqual(harness.read_file(image), harness.pattern(SIZE))

    @need("qemu-nbd")
    def test_who_writes_is_named_not_who_reads(self):
        image = self.image(size=SIZE)
        reader = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-k", self.path("qemu.sock"), image],
                                  preexec_fn=harness.die_with_parent)
        self.addCleanup(reader.wait)
        self.addCleanup(reader.kill)
        harness.wait_until(lambda: os.path.exists(self.path("qemu.sock")), "qemu-nbd")
        with Server(image) as server:
            self.assertIn(f": bight (process {server.process.pid}) has it open", self.refuse_image(image, "--read-only"))

    @contextlib.contextmanager
    def qemu_holding(self, image, *options):
        process = subprocess.Popen([harness.have("qemu-io"), "-f", "raw", *options, image], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, preexec_fn=harness.die_with_parent)
        with process:
            process.stdin.write("read 0 512\n")
            process.stdin.flush()
            self.assertIn("read 512/512", process.stdout.readline())
            yield
            process.stdin.write("quit\n")

    @need("qemu-io")
    def test_we_are_refused_what_qemu_holds(self):
        image = self.image(harness.pattern(SIZE))
        with self.qemu_holding(image):
            self.refuse_image(image)
            self.refuse_image(image, "--read-only")
        with self.qemu_holding(image, "-r"), Server(image, args=["--read-only"]):
            pass
        with Server(image):
            pass

    def test_a_killed_server_leaves_no_lock(self):
        image = self.image(harness.pattern(SIZE))
        for ring in harness.rings():
            for _ in range(5):
                with Server(image, ring=ring) as server:
                    with server.connect() as client:
                        client.issue(raw.READ, 0, SIZE)
                        server.kill()


class Sockets(ServeCase):
    def setUp(self):
        super().setUp()
        self.image_path = self.image(harness.pattern(SIZE))
        self.sock = self.path("sock")

    def test_the_socket_goes_with_the_server(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with Server(self.image_path, nbd=[f"unix:{self.sock}"]) as server:
                self.assertTrue(stat.S_ISSOCK(os.stat(self.sock).st_mode))
                server.stop(number)
            self.assertFalse(os.path.exists(self.sock))

    def test_a_stale_socket_is_replaced(self):
        with Server(self.image_path, nbd=[f"unix:{self.sock}"]) as server:
            server.kill()
        self.assertTrue(os.path.exists(self.sock))
        with Server(self.image_path, nbd=[f"unix:{self.sock}"]):
            self.assert_serves(self.sock, harness.pattern(SIZE))

    def test_a_live_socket_is_refused(self):
        other = self.image(size=SIZE, name="other")
        with Server(self.image_path, nbd=[f"unix:{self.sock}"]):
            self.refused("serve", other, "--nbd", f"unix:{self.sock}")
            self.assert_serves(self.sock, harness.pattern(SIZE))
        with socket.socket(socket.AF_UNIX) as listener:  # also one that is no NBD server
            listener.bind(self.sock)
            listener.listen(1)
            self.refused("serve", other, "--nbd", f"unix:{self.sock}")
            self.assertTrue(os.path.exists(self.sock))

    def test_a_file_in_the_place_of_the_socket_is_left_alone(self):
        precious = self.image(b"precious", name="precious")
        self.refused("serve", self.image_path, "--nbd", f"unix:{precious}")
        self.assertEqual(harness.read_file(precious), b"precious")

    def test_addresses_that_cannot_be(self):
        for address in (f"unix:{self.path('missing/sock')}", f"unix:{self.path('x' * 120)}", "unix:", "127.0.0.1",
                        "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1:-1", "[::1:10809", "256.1.1.1:0",
                        "host.invalid:0", "", "192.0.2.1:0", "tcp:localhost:0"):
            with self.subTest(address=address):
                done = run(BIGHT, "serve", self.image_path, "--nbd", address, status=None)
                self.assertIn(done.returncode, (1, 2))
                self.assertRegex(done.stderr, r"\Abight: [^\n]+\n\Z")

    def test_a_failed_address_undoes_the_others(self):
        self.refused("serve", self.image_path, "--nbd", f"unix:{self.sock}", "--nbd", f"unix:{self.path('no/sock')}")
        self.assertFalse(os.path.exists(self.sock))
        with Server(self.image_path):
            pass

    def listening(self, server):
        """The (host, port) pairs that -v tells."""
        found = re.findall(r"(\[[0-9a-f:]+\]|\d+(?:\.\d+){3}):(\d+)", server.stderr())
        return [(host.strip("[]"), int(port)) for host, port in found]

    def test_tcp(self):
        for host in ("127.0.0.1", "localhost", ""):
            with self.subTest(host=host), Server(self.image_path, nbd=[f"{host}:0"], args=["-v"]) as server:
                there, port = self.listening(server)[0]
                self.assert_serves(("::1" if there == "::1" else "127.0.0.1", port), harness.pattern(SIZE))

    def test_tcp_over_ipv6(self):
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        for host in ("[::1]", "[::]"):
            with Server(self.image_path, nbd=[f"{host}:0"], args=["-v"]) as server:
                self.assert_serves(("::1", self.listening(server)[0][1]), harness.pattern(SIZE))

    def test_a_port_in_use(self):
        with Server(self.image_path, nbd=["127.0.0.1:0"], args=["-v"]) as server:
            port = self.listening(server)[0][1]
            self.refused("serve", self.image(size=SIZE, name="other"), "--nbd", f"127.0.0.1:{port}")
            self.assert_serves(("127.0.0.1", port), harness.pattern(SIZE))
        with Server(self.image_path, nbd=[f"127.0.0.1:{port}"]):  # free again at once
            self.assert_serves(("127.0.0.1", port), harness.pattern(SIZE))

    def test_several_addresses_at_once(self):
        addresses = [f"unix:{self.sock}", f"unix:{self.sock}2", "127.0.0.1:0"]
        with Server(self.image_path, nbd=addresses, args=["-v"]) as server:
            for address in (self.sock, self.sock + "2", self.listening(server)[0]):
                self.assert_serves(address, harness.pattern(SIZE))

    def test_many_requests_over_tcp(self):
        for ring in harness.rings():
            with Server(self.image_path, nbd=["127.0.0.1:0"], args=["-v"], ring=ring) as server:
                for mode in raw.MODES:
                    with raw.connect(self.listening(server)[0], mode) as client:
                        cookies = [client.issue(raw.READ, at, 64 * K) for at in range(0, SIZE, 64 * K)] * 1
                        for number, cookie in enumerate(cookies):
                            self.assertEqual(client.wait(cookie).data, harness.pattern(SIZE)[number * 64 * K:][:64 * K])
                        client.write(5, harness.pattern(SIZE)[5:])


class Systemd(ServeCase):
    # dup2 to 3 and up, as the service manager does, then become the server
    ACTIVATE = """import os, sys
count = int(sys.argv[1])
for number in range(count):
    os.dup2(int(sys.argv[2 + number]), 100 + number)
for number in range(count):
    os.dup2(100 + number, 3 + number)
    os.close(100 + number)
os.environ.update(LISTEN_FDS=str(count), LISTEN_PID=str(os.getpid() + int(os.environ.get("WRONG", 0))))
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""

    def activate(self, *listeners):
        fds = [listener.fileno() for listener in listeners]
        wrap = ["/usr/bin/python3", "-c", self.ACTIVATE, str(len(fds)), *map(str, fds)]
        return {"wrap": wrap, "pass_fds": fds, "nbd": []}

    def listeners(self):
        one = self.enterContext(socket.socket(socket.AF_UNIX))
        one.bind(self.path("one"))
        two = self.enterContext(socket.socket())
        two.bind(("127.0.0.1", 0))
        for listener in (one, two):
            listener.listen()
        return one, two

    def test_socket_activation(self):
        image = self.image(harness.pattern(SIZE))
        one, two = self.listeners()
        for ring in harness.rings():
            with Server(image, ring=ring, **self.activate(one)):
                self.assert_serves(self.path("one"), harness.pattern(SIZE))
            self.assertTrue(os.path.exists(self.path("one")), "it was not ours to remove")
            with Server(image, ring=ring, **self.activate(one, two)):
                self.assert_serves(self.path("one"), harness.pattern(SIZE))
                self.assert_serves(two.getsockname(), harness.pattern(SIZE))

    def test_a_client_that_came_before_the_server(self):
        one, _ = self.listeners()
        client = self.enterContext(raw.Client(self.path("one")))
        with Server(self.image(harness.pattern(SIZE)), **self.activate(one)):
            client.greet()
            client.go()
            self.assertEqual(client.read(0, 100), harness.pattern(100))

    def test_sockets_meant_for_another_process_are_not_taken(self):
        one, _ = self.listeners()
        options = self.activate(one)
        self.refused("serve", self.image(size=SIZE), status=2, wrap=options["wrap"], pass_fds=options["pass_fds"],
                     env=os.environ | {"WRONG": "1"})

    def test_what_is_no_listening_socket_is_refused(self):
        image = self.image(size=SIZE)
        one, two = self.listeners()
        deaf, datagram = (self.enterContext(socket.socket(socket.AF_UNIX, kind))
                          for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))
        deaf.bind(self.path("deaf"))
        datagram.bind(self.path("datagram"))
        connected, _ = (self.enterContext(end) for end in socket.socketpair())
        with open(image, "rb") as file:
            for wrong in (deaf, datagram, connected, file):
                options = self.activate(one, wrong, two)
                self.assertIn("descriptor 4", self.refused("serve", image, "--nbd", f"unix:{self.path('sock')}",
                                                           wrap=options["wrap"], pass_fds=options["pass_fds"]))
        self.assertFalse(os.path.exists(self.path("sock")))

    def test_sockets_that_are_promised_and_not_passed_are_refused(self):
        script = 'exec 3<&- 4<&-; LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"'
        self.assertIn("descriptor 3", self.refused("serve", self.image(size=SIZE), "--nbd", f"unix:{self.path('sock')}",
                                                   wrap=["/bin/sh", "-c", script, "sh"]))

    def notifications(self, server):
        found = []
        while lines := server.notified():
            found += lines
        return found

    def test_stopping_is_notified(self):
        with Server(self.image(size=SIZE)) as server:  # that has waited for READY=1
            server.stop()
            self.assertIn("STOPPING=1", self.notifications(server))

    def test_an_abstract_notify_socket(self):
        name = f"bight-test-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind("\0" + name)
            notify.settimeout(harness.PATIENCE)
            process = subprocess.Popen([BIGHT, "serve", self.image(size=SIZE), "--nbd", f"unix:{self.path('sock')}"],
                                       env=os.environ | {"NOTIFY_SOCKET": "@" + name},
                                       preexec_fn=harness.die_with_parent)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            self.assertIn("READY=1", notify.recv(4096).decode().split("\n"))
            process.terminate()
            self.assertEqual(process.wait(harness.PATIENCE), 0)

    def test_a_notify_socket_that_is_gone_does_no_harm(self):
        process = subprocess.Popen([BIGHT, "serve", self.image(size=SIZE), "--nbd", f"unix:{self.path('sock')}"],
                                   env=os.environ | {"NOTIFY_SOCKET": self.path("gone")},
                                   preexec_fn=harness.die_with_parent)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        harness.wait_until(lambda: os.path.exists(self.path("sock")), "the socket")
        self.assert_serves(self.path("sock"), bytes(SIZE))
        process.terminate()
        self.assertEqual(process.wait(harness.PATIENCE), 0)


class Signals(ServeCase):
    def test_sigterm_finishes_what_is_in_flight(self):
        for ring in harness.rings():
            for number in (signal.SIGTERM, signal.SIGINT):
                image = self.image(size=SIZE)
                with self.subTest(ring=ring, signal=number), \
                        Server(image, io="fault:write.delay=1:50", ring=ring) as server:
                    client = self.enterContext(server.connect())
                    data = [harness.pattern(512, at) for at in range(64)]
                    messages = [client.request(raw.WRITE, at * 512, data=data[at]) for at in range(64)]
                    client.send(b"".join(message for _, message in messages))
                    client.wait_any()  # so all have come to the server: they were one packet
                    server.process.send_signal(number)
                    answers = [client.wait_any()[1] for _ in range(63)]
                    self.assertEqual({answer.error for answer in answers}, {0})
                    with self.assertRaises(raw.Closed):
                        client.fill()
                    server.wait()
                    self.assertEqual(harness.read_file(image)[:64 * 512], b"".join(data))

    def test_sigterm_with_idle_clients(self):
        for ring in harness.rings():
            with Server(self.image(size=SIZE), ring=ring) as server:
                idle = [self.enterContext(server.connect(mode)) for mode in raw.MODES for _ in range(5)]
                early = self.enterContext(server.client())
                server.stop()
                for client in (*idle, early):
                    with self.assertRaises(raw.Closed):
                        while True:
                            client.fill()

    def test_several_sigterms(self):
        for ring in harness.rings():
            with Server(self.image(size=SIZE), io="fault:any.delay=1:100", ring=ring) as server:
                client = self.enterContext(server.connect())
                client.issue(raw.READ, 0, 4096)
                for _ in range(5):
                    server.process.send_signal(signal.SIGTERM)
                server.wait()

    def test_sigterm_at_any_moment_of_the_start(self):
        """Either it is too early to be caught, or it ends cleanly; the socket and the lock never stay."""
        image = self.image(size=SIZE)
        for number in range(harness.rounds(40)):
            process = subprocess.Popen([BIGHT, "serve", image, "--nbd", f"unix:{self.path('sock')}"],
                                       stderr=subprocess.PIPE, preexec_fn=harness.die_with_parent)
            with process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(number / 2000)
                process.terminate()
                self.assertIn(process.wait(harness.PATIENCE), (0, -signal.SIGTERM))
                self.assertEqual(process.stderr.read(), b"")
        with Server(image, nbd=[f"unix:{self.path('sock')}"]):
            pass

    def test_sigusr1_tells_the_counters(self):
        for ring in harness.rings():
            with Server(self.image(size=SIZE), ring=ring) as server:
                with server.connect() as client:
                    for _ in range(7):
                        client.read(0, 4096)
                    client.write(0, bytes(1000))
                    self.assertEqual(server.stderr(), "")
                    server.process.send_signal(signal.SIGUSR1)
                    harness.wait_until(lambda: server.stderr().endswith("\n"), "the counters")
                    self.assertRegex(server.stderr(), r"\bread\b")
                    self.assertRegex(server.stderr(), r"\b7\b")
                    self.assertEqual(client.read(0, 10), bytes(10))

    def test_sigpipe_of_the_callers_pipe(self):
        """Who starts it with a stderr that nobody reads does not lose the server."""
        ours, theirs = os.pipe()
        process = subprocess.Popen([BIGHT, "serve", "-v", self.image(harness.pattern(SIZE)), "--nbd",
                                    f"unix:{self.path('sock')}"], stderr=theirs, preexec_fn=harness.die_with_parent)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.close(theirs)
        harness.wait_until(lambda: os.path.exists(self.path("sock")), "the socket")
        os.close(ours)
        process.send_signal(signal.SIGUSR1)
        self.assert_serves(self.path("sock"), harness.pattern(SIZE))
        process.terminate()
        self.assertEqual(process.wait(harness.PATIENCE), 0)


def reachable(case):
    """The binary where everybody may run it."""
    path = case.path("bight")
    shutil.copy(BIGHT, path)
    os.chmod(path, 0o755)
    return path


class Surroundings(ServeCase):
    def exercise(self, server):
        for mode in raw.MODES:
            with server.connect(mode) as client:
                client.write(0, harness.pattern(SIZE))
                cookies = [client.issue(raw.READ, at, 8 * K) for at in range(0, SIZE, 8 * K)]
                for number, cookie in enumerate(cookies):
                    self.assertEqual(client.wait(cookie).data, harness.pattern(SIZE)[number * 8 * K:][:8 * K])
                client.expect(0, raw.WRITE_ZEROES, 0, SIZE)
                client.flush()
                client.disconnect()

    def test_verbose_says_which_ring(self):
        for ring in harness.rings():
            with Server(self.image(size=SIZE), ring=ring, args=["-v"]) as server:
                text = server.stop()
                self.assertRegex(text, rf"\b(io_)?{ring}\b")
                self.assertTrue(all(line.startswith("bight: ") for line in text.splitlines()), text)

    def test_silent_without_verbose(self):
        with Server(self.image(size=SIZE)) as server:
            self.exercise(server)
            self.assertEqual(server.stop(), "")

    def test_where_io_uring_is_forbidden(self):
        image = self.image(size=SIZE)
        for ring in ("auto", "threads"):
            for io in harness.IOS:
                with self.subTest(ring=ring, io=io), Server(image, ring=ring, io=io, args=["-v"],
                                                            setup=harness.refuse_io_uring) as server:
                    self.exercise(server)
                    self.assertRegex(server.stop(), r"\bthreads\b")
        self.refuse_image(image, "--ring", "uring", preexec_fn=harness.refuse_io_uring)

    @need_root
    @need("setpriv")
    def test_without_root_and_with_little_locked_memory(self):
        os.chmod(self.dir, 0o777)
        image = self.image(size=SIZE)
        os.chmod(image, 0o666)
        binary = reachable(self)

        # 8M is what Debian gives; less may be too little for a ring, but never for `--ring auto`
        for ring, locked in (("auto", 0), ("auto", 64 * K), *((ring, 8 * M) for ring in harness.rings())):
            for io in harness.IOS:
                with self.subTest(ring=ring, io=io, locked=locked):
                    server = Server(image, ring=ring, io=io, wrap=NOBODY,
                                    setup=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked, locked)))
                    server.command[server.command.index(BIGHT)] = binary
                    with server:
                        self.exercise(server)
                        # what is registered counts for all connections together
                        clients = [self.enterContext(server.connect()) for _ in range(20)]
                        for client in clients:
                            client.write(0, harness.pattern(100000))
                            self.assertEqual(client.read(0, 100000), harness.pattern(100000))

    def test_numbers_of_queues_depth_and_workers(self):
        image = self.image(size=SIZE)
        for ring, io in harness.ways():
            for args in (["--queues", "1"], ["--queues", "4"], ["--depth", "1"], ["--depth", "2", "--queues", "3"],
                         ["--workers", "1"], ["--depth", "1024", "--workers", "64"]):
                with self.subTest(ring=ring, io=io, args=args), \
                        Server(image, ring=ring, io=io, args=args) as server:
                    self.exercise(server)

    def test_options_in_any_place_and_form(self):
        image = self.image(harness.pattern(SIZE))
        path = self.path("sock")
        with Server(image, nbd=[], args=[f"--nbd=unix:{path}", "--io=buffered", "--read-only", "--queues=1"]):
            self.assert_serves(path, harness.pattern(SIZE))
        os.rename(image, self.path("-odd"))
        with Server(nbd=[], args=["--nbd", f"unix:{path}", "--", self.path("-odd")]):
            self.assert_serves(path, harness.pattern(SIZE), "-odd")

    def test_a_closed_stdin_stdout_and_stderr(self):
        """Descriptors 0 to 2 are free then and must not become the image."""
        image, path = self.image(harness.pattern(SIZE)), self.path("sock")
        process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", BIGHT, "serve", "-v", image, "--nbd",
                                    f"unix:{path}"], preexec_fn=harness.die_with_parent)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        harness.wait_until(lambda: os.path.exists(path), "the socket")
        self.assert_serves(path, harness.pattern(SIZE))
        process.send_signal(signal.SIGUSR1)
        with raw.connect(path) as client:
            client.read(0, 10)
        process.terminate()
        self.assertEqual(process.wait(harness.PATIENCE), 0)
        self.assertEqual(harness.read_file(image), harness.pattern(SIZE))


if __name__ == "__main__":
    unittest.main()
