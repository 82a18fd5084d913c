#!/usr/bin/python3
"""vhost-user by hand: what the messages and requests mean, and front-ends and guests that mean no good."""
import contextlib
import mmap
import os
import random
import socket
import struct
import sys
import tempfile
import time
import unittest

import harness
import raw_vhost as v
from harness import K, M, Case, rounds, variant
from attached import Attached
from raw_vhost import Closed, Raw, bits
from test_vhost_user import VhostServer

SIZE = 4 * M
DATA = harness.pattern(SIZE)


class Vhost:
    """After each test a good guest is served, and the server holds no more files than before."""

    ring = None

    def setUp(self):
        super().setUp()
        self.server = self.enterContext(VhostServer(self.image(DATA), ring=self.ring, args=self.args))
        self.good()
        self.fds, self.began = self.server.fds(), time.monotonic()

    args = ()

    def tearDown(self):
        self.good()
        harness.wait_until(lambda: self.server.fds() <= self.fds, "files are closed")
        self.server.assert_alive()
        lines = self.server.stderr().count("\n")
        self.assertLessEqual(lines, 21 * (2 + (time.monotonic() - self.began) // 60), "a guest can fill the log")
        super().tearDown()

    def good(self):
        with self.connect() as raw:
            raw.ready()
            self.assertEqual(raw.request(v.T_IN, 8, into=4096), (v.OK, DATA[4096:8192], 4097))

    def connect(self, **options):
        return Raw(self.server.vhost, **options)


class Meaning(Vhost):
    """What a well-behaved front-end asks for."""

    def test_features_and_configuration(self):
        with self.connect() as raw:
            features = raw.u64(v.GET_FEATURES)
            self.assertEqual(features & bits(v.F_RO), 0)
            wanted = bits(v.F_FLUSH, v.F_CONFIG_WCE, v.F_DISCARD, v.F_WRITE_ZEROES, v.F_INDIRECT, v.F_EVENT_IDX,
                          v.F_PROTOCOL, v.F_VERSION_1, v.F_PACKED)
            self.assertEqual(features & wanted, wanted)
            raw.negotiate()
            self.assertEqual(raw.u64(v.GET_QUEUE_NUM), 64)
            self.assertGreaterEqual(raw.u64(v.GET_MAX_MEM_SLOTS), 8)
            config = raw.ask(v.GET_CONFIG, struct.pack("=III", 0, v.CONFIG_BYTES, 0) + bytes(v.CONFIG_BYTES))
            self.assertEqual(len(config), 12 + v.CONFIG_BYTES)
            capacity, size_max, seg_max = struct.unpack_from("<QII", config, 12)
            self.assertEqual(capacity, SIZE // 512)
            self.assertLessEqual(size_max * seg_max, 32 * M)
            self.assertEqual(config[12 + v.WCE_AT], 1)
            # any part of it, and beyond what is there zeroes; not beyond the largest there can be
            self.assertEqual(raw.ask(v.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8))[12:], config[12:20])
            self.assertEqual(raw.ask(v.GET_CONFIG, struct.pack("=III", 200, 56, 0) + bytes(56))[12:], bytes(56))
            for offset, size in ((200, 57), (0xFFFFFFFF, 8), (8, 0xFFFFFFFF), (257, 0)):
                self.assertEqual(raw.ask(v.GET_CONFIG, struct.pack("=III", offset, size, 0)), b"")

    def test_every_field_of_the_configuration(self):
        names = ("capacity", "size_max", "seg_max", "cylinders", "heads", "sectors", "blk_size", "physical_block_exp",
                 "alignment_offset", "min_io_size", "opt_io_size", "writeback", "unused0", "num_queues",
                 "max_discard_sectors", "max_discard_seg", "discard_sector_alignment", "max_write_zeroes_sectors",
                 "max_write_zeroes_seg", "write_zeroes_may_unmap", "unused1")
        asked = struct.pack("=III", 0, v.CONFIG_BYTES, 0) + bytes(v.CONFIG_BYTES)
        with self.connect() as raw:
            raw.negotiate()
            told = dict(zip(names, struct.unpack("<QIIHBBIBBHIBBHIIIIIB3s", raw.ask(v.GET_CONFIG, asked)[12:])))
            self.assertGreaterEqual(told.pop("num_queues"), 1)
            self.assertEqual(told, {
                "capacity": SIZE // 512, "size_max": 256 * K, "seg_max": 126, "cylinders": 0, "heads": 0, "sectors": 0,
                "blk_size": 512, "physical_block_exp": 3, "alignment_offset": 0, "min_io_size": 8, "opt_io_size": 0,
                "writeback": 1, "unused0": 0, "max_discard_sectors": 1 << 22, "max_discard_seg": 32,
                "discard_sector_alignment": 8, "max_write_zeroes_sectors": 1 << 22, "max_write_zeroes_seg": 32,
                "write_zeroes_may_unmap": 1, "unused1": bytes(3)})
            # who can turn the cache off but cannot flush has none
            self.assertTrue(raw.tell(v.SET_FEATURES, struct.pack("=Q", raw.features & ~bits(v.F_FLUSH))))
            self.assertEqual(raw.ask(v.GET_CONFIG, asked)[12 + v.WCE_AT], 0)
            # all of it can be read by as many bytes as there may be, and what it is made of piece by piece
            whole = raw.ask(v.GET_CONFIG, struct.pack("=III", 0, 256, 0) + bytes(256))[12:]
            self.assertEqual(len(whole), 256)
            self.assertEqual(whole, b"".join(raw.ask(v.GET_CONFIG, struct.pack("=III", i, 4, 0) + bytes(4))[12:]
                                             for i in range(0, 256, 4)))

    def test_every_kind_of_request(self):
        with self.connect() as raw:
            raw.ready()
            self.assertEqual(raw.request(v.T_OUT, 2, out=b"x" * 1024), (v.OK, b"", 1))
            self.assertEqual(raw.request(v.T_IN, 2, into=1024), (v.OK, b"x" * 1024, 1025))
            self.assertEqual(raw.request(v.T_FLUSH)[0], v.OK)
            self.assertEqual(raw.request(v.T_GET_ID, into=20), (v.OK, b"disk.img".ljust(20, b"\0"), 21))
            ranges = struct.pack("<QII", 2, 1, 1) + struct.pack("<QII", 4, 1, 0)
            self.assertEqual(raw.request(v.T_WRITE_ZEROES, out=ranges)[0], v.OK)
            self.assertEqual(raw.request(v.T_IN, 2, into=512)[1], bytes(512))
            self.assertEqual(raw.request(v.T_IN, 3, into=512)[1], b"x" * 512)
            self.assertEqual(raw.request(v.T_IN, 4, into=512)[1], bytes(512))
            self.assertEqual(raw.request(v.T_DISCARD, out=struct.pack("<QII", 16, 8, 0))[0], v.OK)
        with open(self.path("disk.img"), "rb") as file:
            self.assertEqual(file.read(2048)[1024:], bytes(512) + b"x" * 512)

    def test_bad_requests_are_answered(self):
        end = SIZE // 512
        discard = struct.Struct("<QII").pack
        with self.connect() as raw:
            raw.ready()
            for kind, sector, out, into, status in (
                    (v.T_IN, end, b"", 512, v.IOERR), (v.T_IN, end - 1, b"", 1024, v.IOERR),
                    (v.T_IN, 1 << 63, b"", 512, v.IOERR), (v.T_IN, (1 << 64) - 1, b"", 512, v.IOERR),
                    (v.T_IN, 1 << 55, b"", 512, v.IOERR), (v.T_IN, 0, b"", 511, v.IOERR), (v.T_IN, 0, b"", 0, v.IOERR),
                    (v.T_OUT, 0, b"x" * 513, 0, v.IOERR), (v.T_OUT, end, b"x" * 512, 0, v.IOERR),
                    (2, 0, b"", 512, v.UNSUPP), (3, 0, b"", 512, v.UNSUPP), (5, 0, b"", 0, v.UNSUPP),
                    (0xFFFFFFFF, 0, b"", 512, v.UNSUPP), (14, 0, discard(0, 8, 0), 0, v.UNSUPP),
                    (v.T_DISCARD, 0, discard(0, 8, 1), 0, v.UNSUPP), (v.T_DISCARD, 0, discard(0, 8, 2), 0, v.UNSUPP),
                    (v.T_DISCARD, 0, discard(end, 8, 0), 0, v.IOERR), (v.T_DISCARD, 0, b"x" * 15, 0, v.IOERR),
                    (v.T_DISCARD, 0, b"", 0, v.IOERR), (v.T_WRITE_ZEROES, 0, discard(0, 8, 2), 0, v.UNSUPP),
                    (v.T_WRITE_ZEROES, 0, discard((1 << 64) - 1, 0xFFFFFFFF, 0), 0, v.IOERR),
                    (v.T_WRITE_ZEROES, 0, discard(0, 0xFFFFFFFF, 0), 0, v.IOERR),
                    (v.T_WRITE_ZEROES, 0, discard(0, 1, 0) * 33, 0, v.IOERR),
                    (v.T_GET_ID, 0, b"", 0, v.OK), (v.T_GET_ID, 0, b"", 7, v.OK), (v.T_GET_ID, 0, b"", 4096, v.OK)):
                with self.subTest(kind=kind, sector=sector, out=out[:16], into=into):
                    self.assertEqual(raw.request(kind, sector, out, into)[0], status)

    def test_cache_mode_is_kept_until_the_device_is_reset(self):
        def wce(raw):
            return raw.ask(v.GET_CONFIG, struct.pack("=III", v.WCE_AT, 1, 0) + bytes(1))[12]

        with self.connect() as raw:
            raw.ready()
            self.assertTrue(raw.tell(v.SET_CONFIG, struct.pack("=III", v.WCE_AT, 1, 0) + b"\0"))
            self.assertEqual(raw.request(v.T_OUT, 0, out=DATA[:512])[0], v.OK)
        with self.connect() as raw:
            raw.ready()
            self.assertEqual(wce(raw), 0)
            self.assertTrue(raw.tell(v.RESET_DEVICE))
            self.assertEqual(wce(raw), 1)
            for offset, data, flags in ((0, bytes(8), 0), (v.WCE_AT - 1, b"\0\0", 0), (v.WCE_AT, b"\0\0", 0),
                                        (255, b"\0", 0), (0xFFFFFFFF, b"\0", 0), (v.WCE_AT, b"\0", 7)):
                self.assertFalse(raw.tell(v.SET_CONFIG, struct.pack("=III", offset, len(data), flags) + data))
            self.assertEqual(wce(raw), 1)

    def test_a_ring_is_stopped_moved_and_started_again(self):
        with self.connect() as raw:
            raw.ready()
            self.assertEqual(raw.request(v.T_IN, 0, into=512)[0], v.OK)
            self.assertEqual(struct.unpack("=II", raw.ask(v.GET_VRING_BASE, raw.state(0, 0))), (0, 1))
            self.assertTrue(raw.start(base=1))
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])
            self.assertTrue(raw.tell(v.SET_VRING_ENABLE, raw.state(0, 0)))
            self.assertTrue(raw.tell(v.SET_VRING_ENABLE, raw.state(0, 1)))
            self.assertTrue(raw.share())  # all of it again, under the running ring
            self.assertEqual(raw.request(v.T_IN, 16, into=512)[1], DATA[8192:8704])

    def test_a_ring_that_is_taken_over_interrupts_once(self):
        """The server that had it before may have died between what it used and the interrupt for that."""
        with self.connect() as raw:
            raw.ready()
            self.assertFalse(raw.is_signalled(raw.call, 0.1))
            self.assertEqual(raw.request(v.T_IN, 0, into=512)[0], v.OK)
            raw.ask(v.GET_VRING_BASE, raw.state(0, 0))
            self.assertTrue(raw.start(base=1))
            self.assertTrue(raw.is_signalled(raw.call))

    def test_memory_comes_and_goes_by_slots(self):
        with self.connect() as raw:
            raw.negotiate()
            slot = bytes(8) + raw.region()
            self.assertTrue(raw.tell(v.ADD_MEM_REG, slot, [raw.memfd]))
            self.assertFalse(raw.tell(v.ADD_MEM_REG, slot, [raw.memfd]))
            self.assertTrue(raw.start())
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])
            self.assertTrue(raw.tell(v.REM_MEM_REG, slot))
            self.assertTrue(raw.is_signalled(raw.err))
            self.assertFalse(raw.tell(v.REM_MEM_REG, slot))

    def test_without_protocol_features_a_ring_is_enabled_at_once(self):
        with self.connect() as raw:
            raw.send(v.SET_FEATURES, struct.pack("=Q", raw.u64(v.GET_FEATURES)
                                                 & ~bits(v.F_PROTOCOL, v.F_PACKED, v.F_EVENT_IDX)))
            self.assertTrue(raw.share() and raw.start(enable=False))
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])

    @unittest.skipIf(harness.sanitized(), "the thread sanitizer has a thread of its own")
    def test_an_idle_ring_costs_nothing(self):
        def used():
            """Context switches and CPU time of every thread."""
            told = []
            for task in sorted(os.listdir(f"/proc/{self.server.pid}/task")):
                with open(f"/proc/{self.server.pid}/task/{task}/status") as status, \
                        open(f"/proc/{self.server.pid}/task/{task}/schedstat") as times:
                    told.append(([line for line in status if "ctxt" in line], times.read()))
            return told

        def is_idle():
            before = used()
            time.sleep(0.2)
            return used() == before

        with self.connect() as raw:
            raw.ready()
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)
            harness.wait_until(is_idle, "the server is idle")
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)

    def test_a_second_front_end_waits_for_the_first(self):
        with self.connect() as first:
            first.ready()
            second = self.connect()
            second.send(v.GET_FEATURES)
            second.socket.settimeout(0.2)
            with self.assertRaises(TimeoutError):
                second.receive(1)
            second.socket.settimeout(harness.PATIENCE)
            self.assertEqual(first.request(v.T_IN, 8, into=512)[0], v.OK)
        with second:
            second.reply()

    def test_what_a_dead_server_had_in_flight_is_done_first_and_in_order(self):
        """By hand: an inflight region that says that heads 3 and 5 were in flight, 5 the older one."""
        with self.connect() as raw:
            raw.negotiate()
            asked = struct.pack("=QQHHI", 0, 0, 1, raw.size, 0)
            size = struct.unpack_from("=Q", raw.ask(v.GET_INFLIGHT_FD, asked))[0]
            region = raw.passed[0]
            os.pwrite(region, struct.pack("=QHHHH", 0, 1, raw.size, 0, 7), 0)  # used_idx 7
            for head, counter in ((3, 9), (5, 8)):
                os.pwrite(region, struct.pack("=B5xHQ", 1, 0, counter), 16 + 16 * head)
                at = 64 * K + 8192 * head
                raw.header(at, v.T_OUT, 100)
                raw.put(at + 4096, bytes([head]) * 512)
                raw.desc(head, at, 16, v.NEXT, head + 5)
                raw.desc(head + 5, at + 4096, 512, v.NEXT, head + 7 if head == 5 else head + 11)
                raw.desc(head + 7 if head == 5 else head + 11, at + 16, 1, v.WRITE)
            raw.put(raw.used_at + 2, struct.pack("<H", 7))
            raw.put(raw.avail_at + 2, struct.pack("<H", 9))
            raw.used, raw.avail = 7, 9
            self.assertTrue(raw.share())
            self.assertTrue(raw.tell(v.SET_INFLIGHT_FD, struct.pack("=QQHHI", size, 0, 1, raw.size, 0), [region]))
            self.assertTrue(raw.start(base=7))
            self.assertEqual({raw.wait_used()[0], raw.wait_used()[0]}, {3, 5})
            self.assertEqual(raw.memory[64 * K + 8192 * 3 + 16], v.OK)
            self.assertTrue(raw.tell(v.SET_VRING_ENABLE, raw.state(0, 0)))  # so that all of it is published
            for head in (3, 5):
                self.assertEqual(os.pread(region, 1, 16 + 16 * head), b"\0")
            self.assertTrue(raw.tell(v.SET_VRING_ENABLE, raw.state(0, 1)))
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])


class Resize(Attached):
    def test_a_front_end_that_has_asked_is_told_of_another_size(self):
        image = self.image(DATA)
        self.attach(image, "--vhost-user", self.sock("vhost"))
        with Raw(self.sock("vhost")) as raw:
            raw.ready()
            ours, theirs = socket.socketpair()
            self.assertFalse(raw.tell(v.SET_BACKEND_REQ_FD, b"", [raw.memfd]))
            self.assertTrue(raw.tell(v.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]))
            theirs.close()
            self.assertEqual(raw.request(v.T_IN, SIZE // 512, into=512)[0], v.IOERR)
            os.truncate(image, SIZE + M)
            self.bight("resize", "disk")
            ours.settimeout(harness.PATIENCE)
            self.assertEqual(struct.unpack("=III", ours.recv(12)), (2, v.VERSION, 0))
            config = raw.ask(v.GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8))
            self.assertEqual(struct.unpack_from("<Q", config, 12)[0], (SIZE + M) // 512)
            self.assertEqual(raw.request(v.T_IN, SIZE // 512, into=512)[:2], (v.OK, bytes(512)))
            ours.close()
            self.bight("detach", "disk", status=1)
            self.assertIn("virtual machine is connected", self.stderr)


class ReadOnly(Vhost, Case):
    args = ("--read-only",)

    def test_nothing_that_writes_is_offered_or_done(self):
        with self.connect() as raw:
            raw.ready()
            self.assertEqual(raw.features & bits(v.F_RO, v.F_FLUSH, v.F_CONFIG_WCE, v.F_DISCARD, v.F_WRITE_ZEROES),
                             bits(v.F_RO))
            self.assertEqual(raw.request(v.T_OUT, 0, out=b"x" * 512)[0], v.IOERR)
            self.assertEqual(raw.request(v.T_WRITE_ZEROES, out=struct.pack("<QII", 0, 8, 0))[0], v.IOERR)


class Messages(Vhost):
    """Messages that make no sense end the connection, or are answered with a failure."""

    def test_headers(self):
        for request, flags, size in ((0, v.VERSION, 0), (39, v.VERSION, 8), (0xFFFFFFFF, v.VERSION, 0), (6, v.VERSION, 8),
                                     (v.GET_FEATURES, 0, 0), (v.GET_FEATURES, 2, 0), (v.GET_FEATURES, v.VERSION | v.REPLY, 0),
                                     (v.SET_FEATURES, v.VERSION, 0xFFFFFFFF), (v.SET_FEATURES, v.VERSION, 4),
                                     (v.SET_MEM_TABLE, v.VERSION, 4096), (v.SET_VRING_ADDR, v.VERSION, 0)):
            with self.subTest(request=request, flags=flags, size=size), self.connect() as raw:
                with contextlib.suppress(Closed):
                    raw.send(request, bytes(min(size, 4096)), flags=flags, size=size)
                self.assertTrue(raw.is_closed())

    def test_memory_tables(self):
        def table(count, *regions):
            return struct.pack("=II", count, 0) + b"".join(regions)

        with self.connect() as raw:
            raw.negotiate()
            good, top = raw.region(), (1 << 64) - 4096
            for what, payload, fds in (
                    ("2^32-1 regions", table(0xFFFFFFFF, good), 1), ("more than sent", table(2, good), 2),
                    ("fewer files", table(2, good, good), 1), ("more files", table(1, good), 2), ("no file", table(1, good), 0),
                    ("9 regions", table(9, *[good] * 8), 8), ("past the end of the file", table(1, raw.region(size=M)), 1),
                    ("offset past the end", table(1, raw.region(offset=M)), 1),
                    ("offset overflows", table(1, raw.region(offset=top)), 1),
                    ("size overflows", table(1, raw.region(size=(1 << 64) - 1)), 1),
                    ("guest address overflows", table(1, raw.region(guest=top)), 1),
                    ("user address overflows", table(1, raw.region(user=top)), 1), ("empty", table(1, raw.region(size=0)), 1),
                    ("the same twice", table(2, good, good), 2)):
                with self.subTest(what):
                    self.assertFalse(raw.tell(v.SET_MEM_TABLE, payload, [raw.memfd] * fds))
            for kind in ("pipe", "socket", "directory"):
                with self.subTest(kind):
                    fd = {"pipe": lambda: os.pipe()[0], "socket": lambda: socket.socket().detach(),
                          "directory": lambda: os.open("/", os.O_RDONLY)}[kind]()
                    self.assertFalse(raw.tell(v.SET_MEM_TABLE, table(1, good), [fd]))
                    os.close(fd)
            self.assertTrue(raw.share() and raw.start())
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)

    def test_queues(self):
        with self.connect() as raw:
            raw.negotiate()
            self.assertTrue(raw.share())
            for request, num in ((v.SET_VRING_NUM, 0), (v.SET_VRING_NUM, 65536), (v.SET_VRING_NUM, 0xFFFFFFFF),
                                 (v.SET_VRING_ENABLE, 2)):
                self.assertFalse(raw.tell(request, raw.state(0, num)))
            for index in (64, 255, 256, 512, 0x10000, 0xFFFFFFFF):
                for request in (v.SET_VRING_NUM, v.GET_VRING_BASE, v.SET_VRING_ENABLE, v.SET_VRING_BASE):
                    with self.subTest(index=index, request=request), self.connect_next(raw) as other:
                        other.negotiate()
                        with contextlib.suppress(Closed):
                            other.send(request, other.state(index, 1))
                        self.assertTrue(other.is_closed())

    @contextlib.contextmanager
    def connect_next(self, raw):
        """The first has to go."""
        raw.socket.close()
        with self.connect() as other:
            yield other

    def test_eventfds(self):
        with self.connect() as raw:
            raw.negotiate()
            pipe = os.pipe()
            for request in (v.SET_VRING_KICK, v.SET_VRING_CALL, v.SET_VRING_ERR):
                for fd in (pipe[0], pipe[1], raw.memfd, raw.socket.fileno()):
                    self.assertFalse(raw.tell(request, struct.pack("=Q", 0), [fd]))
                self.assertFalse(raw.tell(request, struct.pack("=Q", 0)))
                self.assertFalse(raw.tell(request, struct.pack("=Q", 256), [raw.eventfd()]))
                self.assertTrue(raw.tell(request, struct.pack("=Q", 256)))
            for fd in pipe:
                os.close(fd)
            # without a kick, the ring is looked at all the same
            self.assertTrue(raw.share() and raw.start())
            self.assertTrue(raw.tell(v.SET_VRING_KICK, struct.pack("=Q", 256)))
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)

    def test_an_eventfd_that_blocks_holds_nobody_up(self):
        with self.connect() as raw:
            raw.ready()
            full = os.eventfd(0, 0)
            os.eventfd_write(full, (1 << 64) - 2)
            self.assertTrue(raw.tell(v.SET_VRING_CALL, struct.pack("=Q", 0), [full]))
            self.assertTrue(raw.tell(v.SET_VRING_ERR, struct.pack("=Q", 0), [full]))
            os.set_blocking(full, True)
            for _ in range(3):
                self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)
            raw.make_available(raw.size)  # broken: it is to be told, too
            self.assertEqual(len(raw.ask(v.GET_VRING_BASE, raw.state(0, 0))), 8)
            os.close(full)

    def test_files_in_excess_are_closed(self):
        for count in (2, 8, 9, 64, 200):
            with self.subTest(count), self.connect() as raw:
                raw.negotiate()
                with contextlib.suppress(Closed):
                    raw.send(v.SET_VRING_CALL, struct.pack("=Q", 0), [raw.memfd] * count)
                self.assertTrue(raw.is_closed())
        with self.connect() as raw:  # byte by byte, each with one
            header = struct.pack("=III", v.SET_VRING_CALL, v.VERSION, 8)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for byte in header + bytes(8):
                    socket.send_fds(raw.socket, [bytes([byte])], [raw.memfd])
            self.assertTrue(raw.is_closed())

    def test_a_message_may_come_in_pieces(self):
        with self.connect() as raw:
            for byte in struct.pack("=III", v.GET_FEATURES, v.VERSION, 0):
                raw.socket.send(bytes([byte]))
            self.assertEqual(len(raw.reply()), 8)

    def test_inflight_regions(self):
        with self.connect() as raw:
            raw.negotiate()
            for payload in (struct.pack("=QQHHI", M, 0, 1, 16, 0), struct.pack("=QQHHI", 4096, 1 << 63, 1, 16, 0),
                            struct.pack("=QQHHI", 0, 0, 1, 16, 0), struct.pack("=QQHHI", 4096, 4, 1, 16, 0),
                            struct.pack("=QQHHI", 4096, 0, 65, 16, 0), struct.pack("=QQHHI", (1 << 64) - 1, 8, 1, 16, 0)):
                self.assertFalse(raw.tell(v.SET_INFLIGHT_FD, payload, [raw.memfd]))
            self.assertTrue(raw.share())
            # full of rubbish: the ring may break, and nothing else
            for seed in range(rounds(12)):
                rubbish = random.Random(seed).randbytes(8192)
                fd = os.memfd_create("rubbish")
                os.write(fd, struct.pack("=QHHHH", 0, 1, raw.size, seed * 7, seed) + rubbish)
                self.assertTrue(raw.tell(v.SET_INFLIGHT_FD, struct.pack("=QQHHI", 8192, 0, 2, raw.size, 0), [fd]))
                os.close(fd)
                raw.start(base=seed)
                raw.start(index=1)
                raw.ask(v.GET_VRING_BASE, raw.state(0, 0))
                raw.ask(v.GET_VRING_BASE, raw.state(1, 0))

    def test_inflight_regions_that_change_while_they_are_recovered(self):
        """Packed: what the entries say is checked when the ring starts, and not true any more when they are taken."""
        for seed in range(rounds(20)):
            with self.connect() as raw:
                raw.negotiate(off=())
                raw.header(64 * K, v.T_GET_ID)
                self.assertTrue(raw.share())
                with os.fdopen(os.memfd_create("inflight"), "r+b") as file:
                    file.truncate(8192)
                    with contextlib.closing(mmap.mmap(file.fileno(), 8192)) as region:
                        def entries(num, region=region):
                            for i in range(0, 16, 8):
                                struct.pack_into("=BBHHHQHHIQ", region, 32 + 32 * i, 1, 0, i + 1, i, num, i, i, 2, 1,
                                                 v.GUEST)
                        struct.pack_into("=QHHHHHHBB", region, 0, 0, 1, raw.size, 16, 16, 0, 0, 1, 1)
                        entries(1)
                        self.assertTrue(raw.tell(v.SET_INFLIGHT_FD, struct.pack("=QQHHI", 8192, 0, 1, raw.size, 0),
                                                 [file.fileno()]))
                        raw.acks = False
                        raw.start(base=0x8000)
                        for num in (60000, 0, 100, 17, seed):
                            entries(num)
                        raw.acks = True
                        self.assertEqual(len(raw.ask(v.GET_VRING_BASE, raw.state(0, 0))), 8)

    def test_every_message_in_every_state_of_every_size_with_every_file(self):
        """A message has its connection to itself, in one of three states, and is followed by the end of it."""
        chance = random.Random(harness.SEED)
        sizes = (0, 1, 4, 7, 8, 9, 11, 12, 13, 20, 24, 40, 41, 48, 264, 268, 269, 272, 4096)
        cases = [(request, size, count, state) for request in range(48) for size in sizes for count in (0, 1, 2, 9)
                 for state in range(3)]
        for request, size, count, state in chance.sample(cases, rounds(600)):
            with self.connect() as raw, contextlib.suppress(Closed):
                if state:
                    raw.negotiate(off=() if chance.random() < 0.5 else (v.F_PACKED, v.F_EVENT_IDX),
                                  acks=chance.random() < 0.5)
                if state == 2:
                    raw.share()
                    raw.start()
                words = raw.state(chance.choice([0, 1, 63, 64]), chance.choice([0, 1, 16, 64]))
                payload = chance.choice([bytes(size), b"\xff" * size, chance.randbytes(size),
                                         (words + raw.region() * 9).ljust(size, b"\0")[:size]])
                kinds = (raw.memfd, raw.eventfd(), raw.socket.fileno(), 0)
                raw.send(request, payload, [chance.choice(kinds) for _ in range(count)],
                         v.VERSION | chance.choice([0, v.NEED_REPLY]), chance.choice([size, size, size + 1]))
                if chance.random() < 0.5:
                    raw.socket.shutdown(socket.SHUT_WR)
                    raw.is_closed()

    def test_messages_cut_off_anywhere(self):
        for request, size in ((v.SET_MEM_TABLE, 40), (v.SET_VRING_KICK, 8), (v.ADD_MEM_REG, 40),
                              (v.SET_INFLIGHT_FD, 24), (v.SET_BACKEND_REQ_FD, 0), (v.GET_CONFIG, 72)):
            message = struct.pack("=III", request, v.VERSION, size) + bytes(size)
            for cut in range(1, len(message), 1 if not harness.QUICK else 5):
                with self.connect() as raw:
                    raw.negotiate()
                    socket.send_fds(raw.socket, [message[:cut]], [raw.memfd])

    def test_the_channel_for_messages_of_ours(self):
        """It cannot be one that keeps the connection open when the front-end has gone."""
        with self.connect() as raw, self.connect() as other:
            raw.negotiate()
            for fd in (raw.socket.fileno(), other.socket.fileno(), raw.memfd, raw.eventfd()):
                self.assertFalse(raw.tell(v.SET_BACKEND_REQ_FD, b"", [fd]))
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
                with socket.socket(socket.AF_UNIX, kind) as alone:
                    self.assertFalse(raw.tell(v.SET_BACKEND_REQ_FD, b"", [alone.fileno()]))
            # handed over inside of it: it is closed as soon as it holds something
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self.assertTrue(raw.tell(v.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]))
                socket.send_fds(ours, [b"x"], [raw.socket.fileno()])
            for _ in range(3):  # one after the other
                ours, theirs = socket.socketpair()
                with theirs:
                    self.assertTrue(raw.tell(v.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]))
                raw.stack.callback(ours.close)
            before = self.server.fds()
            ours.close()
            harness.wait_until(lambda: self.server.fds() < before, "the channel is closed")

    def test_two_sockets_are_served_at_once(self):
        second = self.path("second")
        with VhostServer(self.image(DATA, name="two.img"), ring=self.ring, args=("--vhost-user", second)) as server:
            with Raw(server.vhost) as one, Raw(second) as two:
                one.ready()
                two.ready()
                for raw in (one, two):
                    self.assertEqual(raw.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])
                one.make_available(one.size)  # the one breaks, the other does not
                self.assertTrue(one.is_signalled(one.err))
                self.assertEqual(two.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])
                one.tell(v.SET_MEM_TABLE, struct.pack("=II", 0xFFFFFFFF, 0) + one.region(), [one.memfd])
                self.assertEqual(two.request(v.T_IN, 8, into=512)[1], DATA[4096:4608])

    def test_random_messages(self):
        for seed in range(rounds(60)):
            chance = random.Random(harness.SEED + seed)
            with self.subTest(seed=harness.SEED + seed), self.connect() as raw, contextlib.suppress(Closed):
                raw.negotiate()
                if chance.random() < 0.7:
                    raw.share()
                    raw.start()
                for _ in range(20):
                    payload = chance.choice([chance.randbytes(chance.randrange(0, 300)), raw.region(), raw.state(0, 1),
                                             bytes(8) + raw.region(), raw.addr(), struct.pack("=Q", chance.randrange(600))])
                    fds = [chance.choice([raw.memfd, raw.eventfd()]) for _ in range(chance.choice([0, 0, 1, 1, 2]))]
                    raw.send(chance.randrange(1, 39), payload, fds)


class Guests(Vhost):
    """Rings that make no sense break that queue alone."""

    def broken(self, prepare, **options):
        with self.connect() as raw:
            raw.ready(**options)
            raw.header(64 * K, v.T_IN, 8)
            raw.desc(0, 64 * K, 16, v.NEXT, 1)
            raw.desc(1, 64 * K + 4096, 4096, v.NEXT | v.WRITE, 2)
            raw.desc(2, 64 * K + 16, 1, v.WRITE)
            prepare(raw)
            self.assertTrue(raw.is_signalled(raw.err), "the err eventfd is not signalled")
            self.assertEqual(len(raw.ask(v.GET_VRING_BASE, raw.state(0, 0))), 8)

    def test_indexes(self):
        self.broken(lambda raw: raw.make_available(raw.size))
        self.broken(lambda raw: raw.make_available(0xFFFF))
        self.broken(lambda raw: raw.make_available(0, index=raw.size + 1))
        self.broken(lambda raw: raw.make_available(0, index=0x8000))

    def chain(self, *descs):
        def prepare(raw):
            for i, desc in enumerate(descs):
                raw.desc(i, *desc)
            raw.make_available(0)
        self.broken(prepare)

    def test_chains(self):
        header, status, at = (64 * K, 16, v.NEXT, 1), (64 * K + 16, 1, v.WRITE), 64 * K + 4096
        far = (1 << 64) - v.GUEST
        self.chain((64 * K, 16, v.NEXT, 0))  # a loop
        self.chain(header, (at, 512, v.NEXT, 0))
        self.chain((64 * K, 16, v.NEXT, 16))
        self.chain((64 * K, 16, v.NEXT, 0xFFFF))
        self.chain((64 * K, 16))  # no status
        self.chain((64 * K, 16, v.WRITE))  # no header
        self.chain((64 * K, 15, v.NEXT, 1), status)
        self.chain((64 * K, 0, v.NEXT, 1), status)
        self.chain(header, (at, 0, v.NEXT | v.WRITE, 2), status)
        self.chain(header, (64 * K + 16, 1, v.WRITE | v.NEXT, 2), (at, 512))  # reads behind writes
        self.chain(header, (256 * K - 100, 512, v.NEXT | v.WRITE, 2), status)  # over the end
        self.chain(header, (at, 0xFFFFFFFF, v.NEXT | v.WRITE, 2), status)
        self.chain(header, (M, 512, v.NEXT | v.WRITE, 2), status)
        self.chain(header, (far - 256, 512, v.NEXT | v.WRITE, 2), status)  # around the end of all addresses
        self.chain(header, (1000 * M, 512, v.NEXT | v.WRITE, 2), status)

    def table(self, *entries, length=None, flags=v.INDIRECT, at=128 * K):
        def prepare(raw):
            for i, (where, size, entry_flags, following) in enumerate(entries):
                raw.put(128 * K + 16 * i, struct.pack("<QIHH", v.GUEST + where, size, entry_flags, following))
            raw.desc(0, at, 16 * len(entries) if length is None else length, flags, 1)
            raw.make_available(0)
        self.broken(prepare)

    def test_indirect_tables(self):
        header, status = (64 * K, 16, v.NEXT, 1), (64 * K + 16, 1, v.WRITE, 0)
        self.table(header, status, length=0)
        self.table(header, status, length=17)
        self.table(header, status, length=16 * 65536)
        self.table(header, status, at=M)
        self.table(header, status, at=256 * K - 16)
        self.table(header, status, flags=v.INDIRECT | v.NEXT)
        self.table((64 * K, 16, v.NEXT, 0))  # a loop
        self.table((64 * K, 16, v.NEXT, 2), status)  # behind its end
        self.table((128 * K, 16, v.INDIRECT, 0), status)  # another table
        self.table(*[(64 * K, 16, v.NEXT, i + 1) for i in range(400)], status)  # too many

    def test_rings_that_are_not_in_memory(self):
        with self.connect() as raw:
            raw.negotiate()
            self.assertTrue(raw.share())
            end, user = v.USER + raw.bytes, v.USER
            for addr in (raw.addr(desc=end - 16), raw.addr(used=end - 4), raw.addr(avail=end - 2), raw.addr(desc=0),
                         raw.addr(used=(1 << 64) - 4), raw.addr(desc=user + 8), raw.addr(avail=user + 1), raw.addr(used=user + 2)):
                raw.start(addr=addr)
                self.assertTrue(raw.is_signalled(raw.err))
            self.assertFalse(raw.tell(v.SET_VRING_ADDR, raw.addr(flags=1)))  # logging was not offered
            raw.start(num=3)
            self.assertTrue(raw.is_signalled(raw.err))
            self.assertTrue(raw.start())
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)

    def test_memory_that_is_cut_off(self):
        for keep in (0, 4096):
            with self.connect() as raw:
                raw.ready()
                self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)
                os.truncate(raw.memfd, keep)
                os.eventfd_write(raw.kick, 1)
                if keep:  # the ring is there, what it leads to is not
                    raw.desc(0, 64 * K, 16, v.NEXT, 1)
                    raw.desc(1, 64 * K + 16, 1, v.WRITE)
                    raw.make_available(0)
                self.assertTrue(raw.is_signalled(raw.err))
        with self.connect() as raw:  # and while it is being read into
            raw.ready()
            raw.header(64 * K, v.T_IN, 0)
            raw.desc(0, 64 * K, 16, v.NEXT, 1)
            raw.desc(1, 128 * K, 64 * K, v.NEXT | v.WRITE, 2)
            raw.desc(2, 64 * K + 16, 1, v.WRITE)
            os.truncate(raw.memfd, 100 * K)
            raw.make_available(0)
            raw.wait_used()

    def test_whatever_happens_while_requests_are_in_flight(self):
        """A ring full of requests, of which some go by way of a bounce buffer, and then one of these at once."""
        table = struct.pack("=II", 1, 0)
        actions = {
            "the front-end goes": lambda raw: raw.socket.close(),
            "memory is cut off": lambda raw: os.truncate(raw.memfd, 0),
            "memory is cut off in the middle": lambda raw: os.truncate(raw.memfd, 132 * K),
            "a hole": lambda raw: os.truncate(raw.memfd, 4096) or os.truncate(raw.memfd, raw.bytes),
            "memory is removed": lambda raw: raw.tell(v.REM_MEM_REG, bytes(8) + raw.region()),
            "other memory": lambda raw: raw.tell(v.SET_MEM_TABLE, table + raw.region(guest=0), [raw.memfd]),
            "memory without sense": lambda raw: raw.tell(v.SET_MEM_TABLE, table + raw.region(size=M), [raw.memfd]),
            "the ring stops": lambda raw: raw.ask(v.GET_VRING_BASE, raw.state(0, 0)),
            "the ring is disabled": lambda raw: raw.tell(v.SET_VRING_ENABLE, raw.state(0, 0)),
            "the ring moves": lambda raw: raw.tell(v.SET_VRING_ADDR, raw.addr(used=v.USER + raw.bytes - 8)),
            "the ring grows": lambda raw: raw.tell(v.SET_VRING_NUM, raw.state(0, 32768)),
            "the ring goes back": lambda raw: raw.tell(v.SET_VRING_BASE, raw.state(0, 40000)),
            "the device is reset": lambda raw: raw.tell(v.RESET_DEVICE),
            "the owner goes": lambda raw: raw.tell(v.RESET_OWNER),
            "packed rings": lambda raw: raw.tell(v.SET_FEATURES, struct.pack("=Q", raw.features | bits(v.F_PACKED))),
            "an inflight region": lambda raw: raw.tell(
                v.SET_INFLIGHT_FD, struct.pack("=QQHHI", 4096, 0, 1, raw.size, 0), [raw.memfd]),
            "the available index jumps": lambda raw: raw.make_available(0, index=0x7FFF),
            "kicks without end": lambda raw: os.eventfd_write(raw.kick, 0xFFFFFFFFFFFFFFF0),
            "nonsense": lambda raw: raw.send(99, b"x" * 100),
        }
        for what, act in actions.items():
            for turn in range(rounds(4)):
                with self.subTest(what), self.connect() as raw:
                    raw.ready()
                    for i in range(0, 15, 3):
                        at = 64 * K + 1024 * i
                        raw.header(at, chosen := v.T_IN if turn % 2 else v.T_OUT, 1000 + 8 * i)
                        raw.desc(i, at, 16, v.NEXT, i + 1)
                        direction = v.WRITE if chosen == v.T_IN else 0
                        raw.desc(i + 1, 128 * K + (i & 1), 64 * K, v.NEXT | direction, i + 2)
                        raw.desc(i + 2, at + 16, 1, v.WRITE)
                    for n in range(16):
                        raw.put(raw.avail_at + 4 + 2 * n, struct.pack("<H", n % 5 * 3))
                    raw.put(raw.avail_at + 2, struct.pack("<H", 16))
                    os.eventfd_write(raw.kick, 1)
                    act(raw)

    def test_one_broken_queue_leaves_the_other_alone(self):
        with self.connect() as raw:
            raw.ready()
            ring, raw.ring = raw.kick, None
            err = raw.err
            self.assertTrue(raw.start(index=1, addr=raw.addr(1, v.USER + 32 * K, v.USER + 40 * K, v.USER + 36 * K)))
            raw.put(36 * K + 2, struct.pack("<H", 999))
            os.eventfd_write(raw.kick, 1)
            self.assertTrue(raw.is_signalled(raw.err))
            raw.kick, raw.err = ring, err
            self.assertEqual(raw.request(v.T_IN, 8, into=512)[0], v.OK)

    def test_random_rings(self):
        for seed in range(rounds(80)):
            chance = random.Random(harness.SEED + seed)
            off = () if chance.random() < 0.5 else (v.F_PACKED, v.F_EVENT_IDX)
            with self.subTest(seed=harness.SEED + seed), self.connect() as raw:
                raw.ready(off=off)
                if off == ():  # a packed ring begins with its wrap counters set
                    raw.ask(v.GET_VRING_BASE, raw.state(0, 0))
                    raw.start(base=0x8000)
                for _ in range(6):
                    for i in range(16):
                        flags = chance.choice([0, v.NEXT, v.WRITE, v.NEXT | v.WRITE, v.INDIRECT, 0x80, 0x81, 0x83, 0x82])
                        where = chance.choice([64 * K, 64 * K + 16, 128 * K, chance.randrange(300 * K)])
                        raw.desc(i, where, chance.choice([1, 16, 512, 4096, chance.randrange(1 << 32)]), flags, chance.choice(
                            [i + 1, chance.randrange(20)]) if not flags & 0x80 or off else flags)
                    for i in range(64):
                        raw.put(128 * K + 16 * i, chance.randbytes(16) if chance.random() < 0.2 else struct.pack(
                            "<QIHH", v.GUEST + 64 * K, 16, chance.choice([1, 3, 2]), i + 1))
                    raw.header(64 * K, chance.choice([0, 1, 4, 8, 11, 13, 99]), chance.randrange(10000))
                    raw.make_available(chance.randrange(16))
                raw.ask(v.GET_VRING_BASE, raw.state(0, 0))
        harness.write_file(self.path("disk.img"), DATA)


for _ring in harness.rings():
    for _tests in (Meaning, Messages, Guests):
        variant(globals(), _tests, Case, ring=_ring)
del Meaning, Messages, Guests

if __name__ == "__main__":
    sys.exit(unittest.main())
