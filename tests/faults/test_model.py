#!/usr/bin/python3
"""Random operations against a shadow copy of the image.

Operations in flight together do not overlap (what overlapping ones leave is anybody's guess), but they touch the same
blocks all the time. BIGHT_SEED repeats the choice of operations; their interleaving is the server's.
"""
import contextlib
import itertools
import os
import random
import select
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "clients"))
import harness
import raw
from harness import IOS, WRITEBACK, K, M, Server, rounds

SIZE = 2 * M + 777
IN_FLIGHT = 24


class Shadow:
    """What every byte of the image may be: known, old or zero (trimmed), or anything (a write to it failed)."""

    KNOWN, TRIMMED, UNKNOWN = 0, 1, 2

    def __init__(self, data):
        self.data = bytearray(data)
        self.state = bytearray(len(data))

    def write(self, offset, data):
        self.data[offset:offset + len(data)] = data
        self.state[offset:offset + len(data)] = bytes(len(data))

    def trim(self, offset, length):
        # a byte that is unknown stays so: its old value is not the one in data
        part = self.state[offset:offset + length]
        trimmed = bytes([self.TRIMMED, self.TRIMMED, self.UNKNOWN]) + bytes(253)
        self.state[offset:offset + length] = part.translate(trimmed)

    def forget(self, offset, length):
        self.state[offset:offset + length] = bytes([self.UNKNOWN]) * length

    def mismatch(self, offset, data):
        """The first offset where `data` cannot be, or None."""
        expected = self.data[offset:offset + len(data)]
        if data == expected:
            return None
        for at, (found, right) in enumerate(zip(data, expected)):
            state = self.state[offset + at]
            if found != right and not (state == self.UNKNOWN or state == self.TRIMMED and found == 0):
                return offset + at
        return None

    def may_be_zero(self, offset, length):
        return self.mismatch(offset, bytes(length)) is None


class Model:
    """Several connections that keep a number of operations in flight."""

    def __init__(self, case, server, shadow, seed, modes=raw.MODES, errors=(), aligned=1):
        self.case, self.shadow, self.errors, self.aligned = case, shadow, errors, aligned
        self.chance = random.Random(seed)
        self.size = len(shadow.data)
        self.clients = [case.enterContext(server.connect(mode)) for mode in modes]
        self.poller = select.poll()
        self.by_fd = {}
        for client in self.clients:
            self.poller.register(client.sock, select.POLLIN)
            self.by_fd[client.sock.fileno()] = client
        self.flying = {}  # (client, cookie) -> (request, data)
        self.log = []

    def pick_range(self):
        chance = self.chance
        length = min(int(2 ** chance.uniform(0, 16.5)), self.size)
        offset = chance.randrange(self.size)
        align = chance.choice((1, 1, 512, 4096))
        if chance.random() < 0.3:  # where it is crowded: neighbours in the same few blocks
            offset = chance.choice((chance.randrange(64 * K), max(0, self.size - chance.randrange(1, 6000))))
            length = min(length, chance.randrange(1, 600))
        align = max(align, self.aligned)
        offset -= offset % align
        length = max(align, length - length % align)
        if offset + length > self.size:
            length = self.size - offset
            length -= length % self.aligned
        return offset, length

    def overlaps(self, offset, length, writes):
        return any(offset < request.offset + request.length and request.offset < offset + length
                   for request, _, other_writes in self.flying.values() if writes or other_writes)

    def start(self):
        """Issue one more operation if one is found that can run beside the others."""
        chance = self.chance
        client = chance.choice(self.clients)
        command = chance.choices((raw.READ, raw.WRITE, raw.WRITE_ZEROES, raw.TRIM, raw.FLUSH, raw.BLOCK_STATUS,
                                  raw.CACHE), (30, 45, 10, 5, 1, 3, 1))[0]
        flags, data, writes = 0, b"", command in (raw.WRITE, raw.WRITE_ZEROES, raw.TRIM)
        if command == raw.BLOCK_STATUS and client.mode == "simple":
            return
        if command == raw.FLUSH:
            offset = length = 0
        else:
            offset, length = self.pick_range()
            if not length or self.overlaps(offset, length, writes):
                return
        if writes and chance.random() < 0.05:
            flags |= raw.FUA
        if command == raw.WRITE:
            data = chance.randbytes(length)
        elif command == raw.WRITE_ZEROES:
            flags |= chance.choice((0, 0, raw.NO_HOLE)) | chance.choice((0, 0, 0, raw.FAST_ZERO))
        elif command == raw.READ and client.mode != "simple":
            flags |= chance.choice((0, 0, raw.DF))
        elif command == raw.BLOCK_STATUS:
            flags |= chance.choice((0, raw.REQ_ONE))
        cookie = client.issue(command, offset, length, flags, data)
        self.flying[client, cookie] = client.pending[cookie], data, writes
        self.log.append(str(client.pending[cookie]))

    def fail(self, request, what):
        at = len(self.log) - 40
        self.case.fail(f"{request}: {what}; the last operations:\n" + "\n".join(self.log[max(0, at):]))

    def finish(self, client, cookie, answer):
        request, data, writes = self.flying.pop((client, cookie))
        offset, length, shadow = request.offset, request.length, self.shadow
        if answer.error:
            refused = request.flags & raw.FAST_ZERO and answer.error == raw.ENOTSUP
            if not refused and answer.error not in self.errors:
                self.fail(request, f"error {answer.error}")
            if writes and not refused:
                shadow.forget(offset, length)
        elif request.command == raw.READ:
            at = shadow.mismatch(offset, answer.data)
            if at is not None:
                self.fail(request, f"byte {at} is {answer.data[at - offset]:#x}, not {shadow.data[at]:#x}")
        elif request.command == raw.WRITE:
            shadow.write(offset, data)
        elif request.command == raw.WRITE_ZEROES:
            shadow.write(offset, bytes(length))
        elif request.command == raw.TRIM:
            shadow.trim(offset, length)
        elif request.command == raw.BLOCK_STATUS:
            for size, flags in answer.extents:
                size = min(size, request.offset + request.length - offset)
                if flags & raw.STATE_ZERO and not shadow.may_be_zero(offset, size):
                    self.fail(request, f"{offset}+{size} is said to be zero")
                offset += size

    def reap(self):
        """Take in what has been answered; waits for at least one."""
        if not any(client.finished or client.buffer for client in self.clients):
            events = self.poller.poll(harness.PATIENCE * 1000)
            if not events:
                self.case.fail("no answer; in flight:\n" + "\n".join(str(entry[0]) for entry in self.flying.values()))
            for fd, _ in events:
                self.by_fd[fd].step()
        for client in self.clients:
            while client.buffer:  # the rest of what has begun is on its way
                client.step()
            while client.finished:
                self.finish(client, *client.finished.popitem())

    def run(self, count):
        for _ in range(count):
            self.start()
            while len(self.flying) >= IN_FLIGHT:
                self.reap()
            if self.chance.random() < 0.01:
                self.drain()
        self.drain()

    def drain(self):
        while self.flying:
            self.reap()

    def check_whole(self, data):
        at = self.shadow.mismatch(0, data)
        if at is not None:
            self.case.fail(f"at the end byte {at} is {data[at]:#x}, not {self.shadow.data[at]:#x}")


class Random(unittest.TestCase):
    """Every ring and kind of I/O on every kind of image."""

    @contextlib.contextmanager
    def images(self):
        """(what, path, alignment of requests) of a file on the usual file system and, as root, on others."""
        with contextlib.ExitStack() as stack:
            found = [("file", os.path.join(stack.enter_context(harness.scratch_dir()), "disk.img"))]
            if os.geteuid() == 0:
                for kind, sector in (("ext4", 512), ("xfs", 512), ("ext4", 4096)):
                    with contextlib.suppress(unittest.SkipTest):
                        point = stack.enter_context(harness.filesystem(kind, 512 * M, sector))
                        found.append((f"{kind} on {sector}", os.path.join(point, "disk.img")))
                for sector in (512, 4096):
                    with contextlib.suppress(unittest.SkipTest):
                        found.append((f"loop {sector}", stack.enter_context(harness.loop_device(3 * M, sector))))
            yield found

    def each(self, count, faults=None, errors=(), kinds=None):
        with self.images() as images:
            for what, path in images:
                if kinds and not any(what.startswith(kind) for kind in kinds):
                    continue
                for ring, io in harness.ways(IOS if faults else IOS + (WRITEBACK,)):
                    with self.subTest(what=what, ring=ring, io=io, BIGHT_SEED=harness.SEED):
                        self.one(path, ring, io, rounds(count), faults, errors)

    def one(self, path, ring, io, count, faults, errors):
        seed = harness.SEED
        is_device = path.startswith("/dev/")
        shadow = Shadow(random.Random(seed).randbytes(3 * M if is_device else SIZE))
        if is_device:
            with open(path, "r+b") as device:
                device.write(shadow.data)
        else:
            harness.write_file(path, shadow.data)
        spec = f"fault:io={io},seed={seed & 0xFFFF},{faults}" if faults else io
        with Server(path, ring=ring, io=spec, args=["--queues", "4", "--name", "model"]) as server:
            model = Model(self, server, shadow, seed, raw.MODES * 2, errors)
            model.run(count)
            with server.connect() as client:
                if not errors:
                    client.flush()
                    model.check_whole(client.read(0, model.size))
            for client in model.clients:
                client.disconnect()
            if errors:
                server.kill()
        model.check_whole(harness.read_file(path))

    def test_operations_of_all_kinds(self):
        self.each(2500)

    def test_with_short_and_late_io(self):
        self.each(1000, "read.short=0.2,write.short=0.2,any.delay=0.02:5",
                  kinds=("file", "xfs", "ext4 on 4096", "loop 4096"))

    def test_with_errors(self):
        self.each(1500, "read.error=0.05,write.error=0.05,write.torn=0.05,discard.error=0.2,write_zeroes.error=0.2,"
                  "read.short=0.1,write.short=0.1", (raw.EIO,), ("file", "xfs", "loop 4096"))

    def test_with_few_tags_and_one_worker(self):
        with harness.scratch_dir() as path:
            for ring, io in harness.ways():
                for args in (["--depth", "1"], ["--depth", "3", "--workers", "1", "--queues", "2"]):
                    with self.subTest(ring=ring, io=io, args=args, BIGHT_SEED=harness.SEED):
                        shadow = Shadow(bytes(SIZE))
                        image = harness.write_file(os.path.join(path, "disk.img"), size=SIZE)
                        with Server(image, ring=ring, io=io, args=args) as server:
                            model = Model(self, server, shadow, harness.SEED)
                            model.run(rounds(1000))
                        model.check_whole(harness.read_file(image))

    def test_with_a_block_size(self):
        with harness.scratch_dir() as path:
            for ring, io in harness.ways():
                for block in (512, 4096):
                    with self.subTest(ring=ring, io=io, block=block, BIGHT_SEED=harness.SEED):
                        shadow = Shadow(bytes(2 * M))
                        image = harness.write_file(os.path.join(path, "disk.img"), size=2 * M)
                        with Server(image, ring=ring, io=io, args=["--block-size", block]) as server:
                            model = Model(self, server, shadow, harness.SEED, aligned=block)
                            model.run(rounds(1000))
                        model.check_whole(harness.read_file(image))


class Neighbours(unittest.TestCase):
    """Writes of bytes that share a block, at once and on several queues: none brings back a neighbour's old bytes."""

    # the blocks that are fought for
    AREA = 16 * K
    OWNERS = 8

    def each_image(self):
        """Files and devices, with small sectors and with large ones."""
        with contextlib.ExitStack() as stack:
            yield "file", os.path.join(stack.enter_context(harness.scratch_dir()), "disk.img")
            if os.geteuid() == 0:
                for sector in (4096, 512):
                    with contextlib.suppress(unittest.SkipTest):
                        yield f"loop {sector}", stack.enter_context(harness.loop_device(M, sector))
                with contextlib.suppress(unittest.SkipTest):
                    point = stack.enter_context(harness.filesystem("ext4", 128 * M, 4096))
                    yield "ext4 on 4096", os.path.join(point, "disk.img")

    def each(self, pieces_of, count, faults=""):
        for what, path in self.each_image():
            for ring, io in harness.ways(IOS if faults else IOS + (WRITEBACK,)):
                with self.subTest(what=what, ring=ring, io=io, BIGHT_SEED=harness.SEED):
                    if not path.startswith("/dev/"):
                        harness.write_file(path, size=M)
                    chance = random.Random(harness.SEED)
                    pieces = pieces_of(chance)
                    with Server(path, ring=ring, io=f"fault:io={io},{faults}" if faults else io,
                                args=["--queues", "4"]) as server:
                        self.check(server, self.fight(server, pieces, rounds(count), chance), pieces)

    def fight(self, server, pieces, rounds_of_all, chance):
        """Every owner writes its own pieces again and again, all in flight together; returns what must be there."""
        clients = [self.enterContext(server.connect(raw.MODES[number % 3])) for number in range(self.OWNERS)]
        expected = bytearray(self.AREA)
        for number in range(rounds_of_all):
            cookies = []
            order = list(enumerate(pieces))
            chance.shuffle(order)
            for piece, (offset, length) in order:
                client = clients[piece % self.OWNERS]
                if chance.random() < 0.1:
                    data = bytes(length)
                    cookie = client.issue(raw.WRITE_ZEROES, offset, length, chance.choice((0, raw.NO_HOLE)))
                else:
                    data = bytes([number % 255 + 1]) * length
                    cookie = client.issue(raw.WRITE, offset, data=data)
                expected[offset:offset + length] = data
                cookies.append((client, cookie))
            for client, cookie in cookies:
                self.assertEqual(client.wait(cookie).error, 0)
        return expected

    def check(self, server, expected, pieces):
        with server.connect() as client:
            found = client.read(0, self.AREA)
        lost = [piece for piece in pieces if found[piece[0]:sum(piece)] != expected[piece[0]:sum(piece)]]
        self.assertFalse(lost, f"{len(lost)} of {len(pieces)} pieces have lost their last write")

    def test_pieces_of_random_sizes(self):
        def pieces(chance):
            cuts = sorted(chance.sample(range(1, self.AREA), 120))
            return [(start, end - start) for start, end in zip([0] + cuts, cuts + [self.AREA])]

        self.each(pieces, 40)

    def test_single_bytes(self):
        self.each(lambda _: [(offset, 1) for offset in range(4000, 4200)], 20)

    def test_sectors_of_512_and_blocks_beside_them(self):
        """Aligned for a small sector, a part of a large one; with whole blocks before and behind."""
        sectors = [(4096 + 512 * number, 512) for number in range(8)]
        self.each(lambda _: [(0, 4096), *sectors, (8192, 4196), (12388, 3996)], 100)

    def test_small_writes_within_large_ones(self):
        """Where two overlap either may win, but outside of the small one only the large one's bytes are right."""
        block, large, small = 4 * K, self.AREA, [(100, 50), (4095, 2), (6000, 1000), (12288, 512), (self.AREA - 3, 3)]
        for what, path in self.each_image():
            for (ring, io), number in itertools.product(harness.ways(), range(rounds(4))):
                with self.subTest(what=what, ring=ring, io=io):
                    if not path.startswith("/dev/"):
                        harness.write_file(path, size=M)
                    # a new server each time: the first unaligned write of all is a special case
                    with Server(path, ring=ring, io=io, args=["--queues", "4"]) as server:
                        clients = [self.enterContext(server.connect()) for _ in range(4)]
                        for value in range(1, 30):
                            cookies = [(clients[at // block % 4], at) for at in range(0, large, block)]
                            cookies = [(c, c.issue(raw.WRITE, at, data=bytes([value]) * block)) for c, at in cookies]
                            cookies += [(c, c.issue(raw.WRITE, offset, data=bytes([value + 100]) * length))
                                        for c, (offset, length) in zip(clients * 2, small[number % 5:] or small)]
                            for client, cookie in cookies:
                                self.assertEqual(client.wait(cookie).error, 0)
                            found = clients[0].read(0, large)
                            for offset, length in small:
                                self.assertLessEqual(set(found[offset:offset + length]), {value, value + 100})
                                found = found[:offset] + bytes([value]) * length + found[offset + length:]
                            self.assertEqual(set(found), {value}, "bytes of an earlier round are back")

    @harness.need_root
    def test_the_end_of_a_file_within_a_sector_beside_whole_ones(self):
        """The last bytes are in the page cache: what is dirty there while a neighbour's direct write ends is an EIO."""
        for kind in ("xfs", "ext4"):
            with harness.filesystem(kind) as point:
                for (ring, io), mode in itertools.product(harness.ways(IOS + (WRITEBACK,)), (raw.FUA, 0)):
                    path = harness.write_file(os.path.join(point, "disk.img"), size=M + 777)
                    with self.subTest(kind=kind, ring=ring, io=io, FUA=mode), Server(path, ring=ring, io=io) as server:
                        sector, rest = self.enterContext(server.connect()), self.enterContext(server.connect())
                        for number in range(rounds(300)):
                            byte = bytes([number % 255 + 1])
                            cookies = [(sector, sector.issue(raw.WRITE, M, data=byte * 512)),
                                       (rest, rest.issue(raw.WRITE, M + 512, data=byte * 265)),
                                       (sector, sector.issue(raw.WRITE_ZEROES, M + 100, 200)),
                                       (rest, rest.issue(raw.WRITE_ZEROES, M + 700, 10)),
                                       (sector, sector.issue(raw.WRITE, flags=mode, data=byte * 4 * K))]
                            for client, cookie in cookies:
                                self.assertEqual(client.wait(cookie).error, 0)
                        self.assertEqual(rest.read(M + 512, 265)[:180], byte * 180)

    def test_with_slow_io(self):
        """A delay between the reading and the writing of a block is where bytes get lost."""
        self.each(lambda _: [(offset, 100) for offset in range(0, 8000, 100)], 8, "any.delay=0.2:2")


if __name__ == "__main__":
    unittest.main()
