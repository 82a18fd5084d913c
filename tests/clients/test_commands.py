#!/usr/bin/python3
"""Every command of the transmission phase, in every header style, on both rings and both kinds of I/O."""
import contextlib
import os
import random
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from harness import G, K, M

# no multiple of 512: the last sector is a part of one
SIZE = 4 * M + 1000
BIG = 6 * G
HUGE = (1 << 64) - 1
KNOWN_FLAGS = {raw.READ: raw.DF, raw.WRITE: 0, raw.FLUSH: 0, raw.TRIM: 0, raw.CACHE: 0,
               raw.WRITE_ZEROES: raw.NO_HOLE | raw.FAST_ZERO, raw.BLOCK_STATUS: raw.REQ_ONE}
RANGED = (raw.READ, raw.WRITE, raw.TRIM, raw.CACHE, raw.WRITE_ZEROES, raw.BLOCK_STATUS)
UNALIGNED = ((0, 1), (1, 1), (511, 2), (4095, 2), (4096, 4096), (1, 4096), (4097, 12289), (65535, 65538), (100, 3800),
             (M - 3, 7), (SIZE - 1, 1), (SIZE - 1000, 1000), (SIZE - 5000, 5000), (SIZE - 1001, 3))


class Commands:
    """What holds in every header style; the classes made below say in which, on which ring and with which I/O."""

    ring = io = None
    mode = "simple"

    @classmethod
    def setUpClass(cls):
        cls.dir = cls.enterClassContext(harness.scratch_dir())
        cls.small = os.path.join(cls.dir, "small.img")
        cls.big = harness.write_file(os.path.join(cls.dir, "big.img"), size=BIG)
        harness.write_file(cls.small, size=SIZE)
        cls.server = cls.enterClassContext(harness.Server(cls.small, cls.big, ring=cls.ring, io=cls.io))

    def setUp(self):
        self.server.assert_alive()
        self.shadow = bytearray(harness.pattern(SIZE))
        self.client = self.connect()
        self.client.write(0, self.shadow)

    def ranged(self):
        """The commands with a range that this header style has."""
        return [command for command in RANGED if command != raw.BLOCK_STATUS or self.mode != "simple"]

    def connect(self, export="small.img", meta=True):
        return self.enterContext(self.server.connect(self.mode, export, meta))

    def assert_image(self, client):
        """Both the client and the file see what the shadow says."""
        data = client.read(0, SIZE)
        if data != self.shadow:
            wrong = [at for at in range(SIZE) if data[at] != self.shadow[at]]
            self.fail(f"{len(wrong)} bytes differ, from {wrong[0]} to {wrong[-1]}")
        client.flush()
        self.assertTrue(harness.read_file(self.small) == self.shadow, "the file differs from what is served")

    def test_read_at_any_offset(self):
        client = self.client
        self.assertEqual(client.size, SIZE)
        for offset, length in UNALIGNED:
            self.assertEqual(client.read(offset, length), self.shadow[offset:offset + length], (offset, length))

    def test_read_the_whole_image_at_once(self):
        client = self.client
        self.assert_image(client)

    def test_write_at_any_offset_keeps_the_neighbours(self):
        client = self.client
        for number, (offset, length) in enumerate(UNALIGNED):
            data = harness.pattern(length, number + 100)
            client.write(offset, data)
            self.shadow[offset:offset + length] = data
            around = slice(max(0, offset - 5000), offset + length + 5000)
            self.assertEqual(client.read(around.start, min(SIZE, around.stop) - around.start), self.shadow[around])
        self.assert_image(client)

    def test_write_with_fua_is_in_the_file(self):
        client = self.client
        for offset, length in UNALIGNED:
            data = harness.pattern(length, offset)
            client.write(offset, data, raw.FUA)
            self.shadow[offset:offset + length] = data
        self.assertTrue(harness.read_file(self.small) == self.shadow)

    def test_largest_payload(self):
        data = harness.pattern(raw.MAX_PAYLOAD, 5)
        client = self.connect("big.img")
        offset = 4 * G + 12345
        client.write(offset, data)
        self.assertTrue(client.read(offset, len(data)) == data)
        client.expect(0, raw.TRIM, offset, len(data))

    def test_read_over_holes(self):
        client = self.client
        for at in range(0, 2 * M, 64 * K):
            client.expect(0, raw.WRITE_ZEROES, at, 32 * K)
            self.shadow[at:at + 32 * K] = bytes(32 * K)
        self.assert_image(client)
        for offset, length in ((1, 2 * M), (31 * K, 2 * K), (63 * K + 5, 2 * K), (5, 3)):
            self.assertEqual(client.read(offset, length), self.shadow[offset:offset + length])

    def test_writes_of_neighbouring_bytes_in_flight_together(self):
        client = self.client
        start, count = 8000, 600
        data = harness.pattern(count, 9)
        cookies = [client.issue(raw.WRITE, start + at, data=data[at:at + 1]) for at in range(count)]
        for cookie in cookies:
            self.assertEqual(client.wait(cookie).error, 0)
        self.shadow[start:start + count] = data
        self.assert_image(client)

    def test_flush(self):
        client = self.client
        client.flush()
        client.expect(0, raw.FLUSH, 0, 0, raw.FUA)

    def test_trim_keeps_what_is_outside(self):
        client = self.client
        for offset, length in ((M, M), (M + 1, 4095), (2 * M + 511, 8193), (3 * M, 1), (SIZE - 700, 700)):
            client.expect(0, raw.TRIM, offset, length)
            after = client.read(offset, length)
            self.assertTrue(all(new in (0, old) for new, old in zip(after, self.shadow[offset:offset + length])))
            self.shadow[offset:offset + length] = after
        self.assert_image(client)

    def test_trim_gives_space_back(self):
        client = self.client
        client.write(0, harness.pattern(SIZE))
        client.flush()
        before = harness.allocated(self.small)
        client.expect(0, raw.TRIM, M, 2 * M)
        client.flush()
        self.assertLessEqual(harness.allocated(self.small), before - 2 * M + 64 * K)
        self.assertEqual(client.read(M, 2 * M), bytes(2 * M))

    def test_write_zeroes_at_any_offset(self):
        client = self.client
        for flags in (0, raw.NO_HOLE, raw.FUA, raw.NO_HOLE | raw.FUA):
            data = harness.pattern(SIZE, flags + 50)
            client.write(0, data)
            self.shadow[:] = data
            for offset, length in UNALIGNED + ((M, M), (2 * M + 1, M)):
                client.expect(0, raw.WRITE_ZEROES, offset, length, flags)
                self.shadow[offset:offset + length] = bytes(length)
            self.assert_image(client)

    def test_write_zeroes_gives_space_back_unless_told_not_to(self):
        client = self.client
        for flags, freed in ((0, True), (raw.NO_HOLE, False)):
            client.write(0, harness.pattern(SIZE))
            client.flush()
            before = harness.allocated(self.small)
            client.expect(0, raw.WRITE_ZEROES, M, 2 * M, flags)
            client.flush()
            now = harness.allocated(self.small)
            if freed:
                self.assertLessEqual(now, before - 2 * M + 64 * K)
            else:
                self.assertGreaterEqual(now, before - 64 * K)

    def test_no_hole_allocates_what_was_a_hole(self):
        client = self.connect("big.img")
        offset = G
        client.expect(0, raw.WRITE_ZEROES, offset, 8 * M)
        client.flush()
        before = harness.allocated(self.big)
        client.expect(0, raw.WRITE_ZEROES, offset, 8 * M, raw.NO_HOLE)
        client.flush()
        self.assertGreaterEqual(harness.allocated(self.big), before + 8 * M - 64 * K)
        self.assertEqual(client.read(offset, 8 * M), bytes(8 * M))
        client.expect(0, raw.TRIM, offset, 8 * M)

    def test_fast_zero_zeroes_or_refuses_and_changes_nothing(self):
        client = self.client
        for offset, length in ((M, M), (M + 7, 5000), (0, 1), (SIZE - 1000, 1000)):
            for flags in (raw.FAST_ZERO, raw.FAST_ZERO | raw.NO_HOLE):
                data = harness.pattern(length, 31)
                client.write(offset, data)
                error = client.expect((0, raw.ENOTSUP), raw.WRITE_ZEROES, offset, length, flags).error
                self.assertEqual(client.read(offset, length), data if error else bytes(length))

    def test_zeroes_and_trim_longer_than_a_payload(self):
        client = self.connect("big.img")
        marks = [10 * M, 2 * G, 3 * G + 4095 * M // 4096]
        for at in marks:
            client.write(at, b"mark")
        client.expect(0, raw.WRITE_ZEROES, marks[0] + 2, marks[2] - marks[0])
        self.assertEqual([client.read(at, 4) for at in marks], [b"ma\0\0", bytes(4), b"\0\0rk"])
        client.expect(0, raw.TRIM, 0, 0xFFFFF000)

    def test_cache(self):
        client = self.client
        for offset, length in UNALIGNED + ((0, SIZE),):
            client.expect(0, raw.CACHE, offset, length)
        self.assert_image(client)

    def test_block_status_without_a_context_is_invalid(self):
        client = self.connect(meta=False)
        client.expect(raw.EINVAL, raw.BLOCK_STATUS, 0, 4096)

    def test_beyond_the_end(self):
        ends = ((SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (SIZE + 4096, 512), (1 << 63, 512), (HUGE, 1),
                (HUGE - 511, 512), (HUGE - 4095, 8192))
        client = self.client
        for command in self.ranged():
            for offset, length in ends:
                error = raw.ENOSPC if command in (raw.WRITE, raw.WRITE_ZEROES) else raw.EINVAL
                client.expect(error, command, offset, length, 0, bytes(length) if command == raw.WRITE else b"")
        self.assert_image(client)

    def test_zero_length_is_harmless(self):
        client = self.client
        for command in self.ranged():
            for offset in (0, 1, 4096, SIZE):
                client.expect((0, raw.EINVAL, raw.ENOSPC), command, offset, 0)
        self.assert_image(client)

    def test_read_longer_than_the_largest_payload(self):
        client = self.connect("big.img")
        for length in (raw.MAX_PAYLOAD + 1, 64 * M, 0x7FFFFFFF, 0xFFFFFFFF):
            client.expect((raw.EINVAL, raw.EOVERFLOW), raw.READ, 0, length)
            if self.mode != "simple":
                client.expect((raw.EINVAL, raw.EOVERFLOW), raw.READ, 0, length, raw.DF)

    def test_unknown_commands(self):
        client = self.client
        for command in (8, 9, 255, 0x7FFF, 0x8000, 0xFFFF):
            client.expect(raw.EINVAL, command, 0, 0)
            client.expect(raw.EINVAL, command, 4096, 512)
        self.assert_image(client)

    def test_flags_that_do_not_belong(self):
        client = self.client
        for command in (raw.FLUSH, *self.ranged()):
            known = KNOWN_FLAGS[command] & (raw.NO_HOLE | raw.FAST_ZERO if self.mode == "simple" else 0xFFFF)
            length = 0 if command == raw.FLUSH else 512
            for bit in range(1, 16):
                # with extended headers that bit says that a payload follows: it has its own test
                if not known & 1 << bit and not (self.mode == "extended" and 1 << bit == raw.PAYLOAD_LEN):
                    client.expect(raw.EINVAL, command, 0, length, 1 << bit, bytes(512) if command == raw.WRITE else b"")
        self.assert_image(client)

    def test_write_longer_than_the_largest_payload(self):
        """Either its bytes are skipped or the connection ends; nothing is written."""
        length = raw.MAX_PAYLOAD + 1
        client = self.connect("big.img")
        client.expect(0, raw.WRITE_ZEROES, 0, M)
        with contextlib.suppress(raw.Closed):
            client.expect((raw.EINVAL, raw.EOVERFLOW, raw.ENOSPC), raw.WRITE, 0, length, 0, b"\xee" * length)
        self.assertEqual(self.connect("big.img").read(0, M), bytes(M))

    def test_flush_with_a_range_does_not_close(self):
        client = self.client
        client.expect((0, raw.EINVAL), raw.FLUSH, 4096, 512)

    def test_a_thousand_requests_in_one_packet(self):
        client = self.client
        chance = random.Random(self.mode)
        places = [(chance.randrange(SIZE - 5000), chance.randrange(1, 5000)) for _ in range(1000)]
        messages = [client.request(raw.READ, offset, length) for offset, length in places]
        client.send(b"".join(message for _, message in messages))
        for (cookie, _), (offset, length) in zip(messages, places):
            self.assertEqual(client.wait(cookie).data, self.shadow[offset:offset + length])

    def test_a_thousand_requests_of_all_kinds_in_one_packet(self):
        client = self.client
        chance = random.Random(self.mode)
        expected, stream = {}, []
        for number, at in enumerate(range(0, 1000 * 4 * K, 4 * K)):
            command = chance.choice((raw.READ, raw.WRITE, raw.WRITE_ZEROES, raw.CACHE, raw.FLUSH, 99))
            offset, length = (0, 0) if command == raw.FLUSH else (at + chance.randrange(4), chance.randrange(1, 4000))
            data = harness.pattern(length, number) if command == raw.WRITE else b""
            cookie, message = client.request(command, offset, length, 0, data)
            stream.append(message)
            expected[cookie] = bytes(self.shadow[offset:offset + length]) if command == raw.READ else None
            if command in (raw.WRITE, raw.WRITE_ZEROES):
                self.shadow[offset:offset + length] = data or bytes(length)
        client.send(b"".join(stream))
        for cookie, data in expected.items():
            answer = client.wait(cookie)
            self.assertEqual(answer.error, raw.EINVAL if answer.command == 99 else 0)
            self.assertEqual(answer.data, data)
        self.assert_image(client)

    def test_requests_one_byte_at_a_time(self):
        client = self.client
        data = harness.pattern(600, 3)
        stream = [client.request(raw.WRITE, 5000, data=data), client.request(raw.FLUSH),
                  client.request(raw.READ, 4990, 20)]
        for byte in b"".join(message for _, message in stream):
            client.send(bytes([byte]))
        for cookie, _ in stream:
            self.assertEqual(client.wait(cookie).error, 0)
        self.shadow[5000:5600] = data
        self.assert_image(client)

    def test_any_cookie_comes_back(self):
        client = self.client
        for cookie in (0, 1, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, HUGE, 0x6744669800000000):
            client.issue(raw.READ, 3, 5, cookie=cookie)
        self.assertEqual({client.wait_any()[0] for _ in range(6)},
                         {0, 1, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, HUGE, 0x6744669800000000})

    def test_connections_see_each_others_writes(self):
        client = self.client
        with self.server.connect("structured", "small.img") as other:
            for number in range(50):
                data = harness.pattern(700, number)
                client.write(1000 * number, data)
                self.assertEqual(other.read(1000 * number, 700), data)

    def test_disc_finishes_what_is_in_flight(self):
        client = self.client
        for at in range(0, M, 8 * K):
            data = harness.pattern(8 * K, at)
            client.send(client.request(raw.WRITE, at, data=data)[1])
            self.shadow[at:at + 8 * K] = data
        client.send(client.request(raw.DISC)[1])
        client.drain()
        self.assert_image(self.connect())

    def test_disc_closes(self):
        self.client.disconnect()


class Structured(Commands):
    """What needs structured replies or extended headers."""

    mode = "structured"

    def test_unfragmented_read_over_holes(self):
        self.client.expect(0, raw.WRITE_ZEROES, M, M)
        self.shadow[M:2 * M] = bytes(M)
        client = self.client
        for offset, length in ((M - 10000, 65536), (M - 1, 2), (2 * M - 30000, 65536), (M, 65536)):
            answer = client.expect(0, raw.READ, offset, length, raw.DF)
            self.assertEqual(answer.data, self.shadow[offset:offset + length])

    def test_zeroes_travel_as_holes(self):
        self.client.expect(0, raw.WRITE_ZEROES, M, 2 * M)
        answer = self.client.expect(0, raw.READ, 0, 4 * M)
        holes = sum(length for kind, _, length in answer.chunks if kind == raw.REPLY_HOLE)
        self.assertEqual(holes, 2 * M)
        self.assertEqual(answer.data, self.shadow[:M] + bytes(2 * M) + self.shadow[3 * M:4 * M])

    def test_fua_is_accepted_on_every_command(self):
        client = self.client
        for command in KNOWN_FLAGS:
            length = 0 if command == raw.FLUSH else 4096
            client.expect(0, command, 0, length, raw.FUA, b"x" * 4096 if command == raw.WRITE else b"")

    def test_block_status_covers_the_image_and_tells_the_truth(self):
        client = self.client
        client.write(0, harness.pattern(SIZE))
        for at in range(M, 2 * M, 128 * K):
            client.expect(0, raw.WRITE_ZEROES, at, 64 * K)
            client.expect(0, raw.WRITE_ZEROES, at + 64 * K, 32 * K, raw.NO_HOLE)
        client.flush()
        extents = client.allocation()
        self.assertEqual(sum(length for _, length, _ in extents), SIZE)
        for offset, length, flags in extents:
            if flags & raw.STATE_ZERO:
                self.assertEqual(client.read(offset, length), bytes(length), (offset, length, flags))
        # what is allocated but unwritten may be called a hole too: SEEK_HOLE does
        holes = {offset: length for offset, length, flags in extents if flags == raw.STATE_HOLE | raw.STATE_ZERO}
        for at in range(M, 2 * M, 128 * K):
            self.assertIn(holes.get(at), (64 * K, 96 * K))

    def test_a_hole_is_told_as_hole_and_zero(self):
        client = self.connect("big.img")
        client.expect(0, raw.WRITE_ZEROES, 5 * G, M)
        client.write(5 * G + 256 * K, harness.pattern(64 * K))
        client.flush()
        self.assertEqual(client.allocation(5 * G, M),
                         [(5 * G, 256 * K, 3), (5 * G + 256 * K, 64 * K, 0), (5 * G + 320 * K, 704 * K, 3)])
        client.expect(0, raw.TRIM, 5 * G, M)

    def test_block_status_with_req_one(self):
        client = self.client
        client.expect(0, raw.WRITE_ZEROES, M, M)
        for offset, length in ((0, 1), (0, SIZE), (M - 1, 2), (M, 100), (M + 5, 2 * M), (SIZE - 1, 1)):
            extents = client.block_status(offset, length, raw.REQ_ONE)
            self.assertLessEqual(extents[0][0], length)

    def test_block_status_at_any_offset(self):
        client = self.client
        for offset, length in UNALIGNED:
            self.assertTrue(client.block_status(offset, length))

    def test_block_status_of_more_than_32_bits(self):
        client = self.connect("big.img")
        client.expect(0, raw.TRIM, 0, 0xFFFFF000)
        self.assertEqual(sum(length for _, length, _ in client.allocation()), BIG)


class Extended(Structured):
    """What needs extended headers."""

    mode = "extended"

    def test_an_extent_of_more_than_32_bits(self):
        client = self.connect("big.img")
        client.expect(0, raw.WRITE_ZEROES, 0, BIG)
        client.flush()
        self.assertEqual(client.block_status(0, BIG, raw.REQ_ONE), [(BIG, 3)])

    def test_zeroes_trim_and_cache_of_more_than_32_bits(self):
        client = self.connect("big.img")
        client.write(0, b"first")
        client.write(BIG - 4, b"last")
        client.expect(0, raw.WRITE_ZEROES, 0, BIG)
        self.assertEqual(client.read(0, 5) + client.read(BIG - 4, 4), bytes(9))
        client.expect(0, raw.TRIM, 1, BIG - 1)
        client.expect((0, raw.EINVAL, raw.EOVERFLOW), raw.CACHE, 0, BIG)

    def test_effect_lengths_that_overflow(self):
        client = self.client
        for command in (raw.READ, raw.TRIM, raw.CACHE, raw.WRITE_ZEROES, raw.BLOCK_STATUS):
            for offset, length in ((0, HUGE), (1, HUGE), (HUGE, HUGE), (4096, HUGE - 4095), (0, 1 << 63), (0, 1 << 32)):
                client.expect((raw.EINVAL, raw.ENOSPC, raw.EOVERFLOW), command, offset, length)
        self.assert_image(client)

    def test_payload_of_a_command_that_takes_none_is_skipped(self):
        client = self.client
        for command in (raw.READ, raw.FLUSH, raw.TRIM, raw.CACHE, raw.WRITE_ZEROES, raw.BLOCK_STATUS, 8, 0xFFFF):
            for length in (1, 28, 512, 100000):
                client.expect(raw.EINVAL, command, 0, length, raw.PAYLOAD_LEN, b"\xa5" * length)
        self.assert_image(client)

    def test_extended_write_without_payload_flag(self):
        """Against the rules. The server may take it for what it must mean, refuse it, or give up the connection."""
        self.client.pending[7] = raw.Request(raw.WRITE, 0, 512, 0)
        with contextlib.suppress(raw.Closed):
            self.client.send(raw.request_bytes(raw.WRITE, 0, 512, 0, 7, bytes(512), extended=True))
            if self.client.wait(7).error == 0:
                self.shadow[:512] = bytes(512)
            self.assertEqual(self.client.read(0, 512), self.shadow[:512])
        self.assert_image(self.connect())


class ReadOnly:
    """What a read-only export refuses and what not."""

    ring = io = None

    def test_writing_is_refused_and_all_else_served(self):
        data = harness.pattern(SIZE)
        image = self.image(data)
        with harness.Server(image, args=["--read-only"], ring=self.ring, io=self.io) as server:
            for mode in raw.MODES:
                with self.subTest(mode=mode), server.connect(mode) as client:
                    for flags in (0, raw.FUA):
                        client.expect(raw.EPERM, raw.WRITE, 5, 5000, flags, bytes(5000))
                        client.expect(raw.EPERM, raw.TRIM, 0, 4096, flags)
                        client.expect(raw.EPERM, raw.WRITE_ZEROES, 0, 4096, flags)
                    client.expect((0, raw.EINVAL), raw.FLUSH)
                    client.expect(0, raw.CACHE, 0, 4096)
                    self.assertEqual(client.read(0, SIZE), data)
                    if mode != "simple":
                        self.assertTrue(client.allocation())
        self.assertEqual(harness.read_file(image), data)

    def test_an_image_that_may_only_be_read(self):
        image = self.image(harness.pattern(SIZE))
        os.chmod(image, 0o444)
        with harness.Server(image, args=["--read-only"], ring=self.ring, io=self.io) as server:
            with server.connect() as client:
                client.expect(raw.EPERM, raw.WRITE, 0, 1, 0, b"x")
                self.assertEqual(client.read(0, SIZE), harness.pattern(SIZE))


class BlockSize:
    """--block-size is enforced."""

    ring = io = None

    def test_requests_below_the_block_size_are_invalid(self):
        for size in (512, 4096):
            with harness.Server(self.image(harness.pattern(M)), args=["--block-size", size], ring=self.ring,
                                io=self.io) as server:
                for mode in raw.MODES:
                    with self.subTest(size=size, mode=mode), server.connect(mode) as client:
                        for command in RANGED:
                            if command == raw.BLOCK_STATUS and mode == "simple":
                                continue
                            for offset, length in ((0, size // 2), (size // 2, size), (1, size), (size, size + 1)):
                                client.expect(raw.EINVAL, command, offset, length, 0,
                                              bytes(length) if command == raw.WRITE else b"")
                            client.expect(0, command, size, size, 0, bytes(size) if command == raw.WRITE else b"")
                        self.assertEqual(client.read(2 * size, size), harness.pattern(M)[2 * size:3 * size])


for _ring, _io in harness.ways():
    for _tests in (Commands, Structured, Extended):
        harness.variant(globals(), _tests, unittest.TestCase, ring=_ring, io=_io)
    for _tests in (ReadOnly, BlockSize):
        harness.variant(globals(), _tests, harness.Case, ring=_ring, io=_io)

if __name__ == "__main__":
    unittest.main()
