#!/usr/bin/python3
"""Hostile and broken clients: the server answers by the protocol or drops them, and serves the others."""
import contextlib
import fcntl
import os
import random
import resource
import socket
import struct
import sys
import termios
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from harness import K, M, rounds

SIZE = 8 * M + 321
# what one connection may hold on to is bounded, and so is what is left of hundreds of them
MEMORY = 96 * M


def nr_unread_bytes(sock):
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]


def handshake_bytes(mode, export=""):
    options = {"simple": [], "structured": [raw.OPT_STRUCTURED_REPLY], "extended": [raw.OPT_EXTENDED_HEADERS]}[mode]
    stream = struct.pack(">I", 3) + b"".join(raw.option_bytes(option) for option in options)
    if mode != "simple":
        stream += raw.option_bytes(raw.OPT_SET_META_CONTEXT, raw.meta_data(export, ["base:allocation"]))
    return stream + raw.option_bytes(raw.OPT_GO, raw.info_data(export, (raw.INFO_BLOCK_SIZE,)))


def request_stream(mode):
    """Every command once; the writes do not change the image."""
    extended = mode == "extended"
    payload = raw.PAYLOAD_LEN if extended else 0
    requests = [raw.request_bytes(raw.READ, 10, 30, 0, 1, extended=extended),
                raw.request_bytes(raw.WRITE, 4000, 40, payload, 2, harness.pattern(4040)[4000:], extended=extended),
                raw.request_bytes(raw.CACHE, 0, 4096, 0, 4, extended=extended),
                raw.request_bytes(raw.FLUSH, 0, 0, 0, 5, extended=extended),
                raw.request_bytes(raw.BLOCK_STATUS, 0, 65536, 0, 6, extended=extended),
                raw.request_bytes(raw.TRIM, SIZE, 1, 0, 7, extended=extended),
                raw.request_bytes(raw.WRITE_ZEROES, SIZE, 1, 0, 8, extended=extended),
                raw.request_bytes(raw.DISC, 0, 0, 0, 9, extended=extended)]
    return b"".join(requests)


class Malformed:
    """After each test a good client is served, and the server holds no more files and memory than before."""

    ring = io = None

    @classmethod
    def setUpClass(cls):
        cls.dir = cls.enterClassContext(harness.scratch_dir())
        cls.image = harness.write_file(os.path.join(cls.dir, "disk.img"), harness.pattern(SIZE))
        cls.server = cls.enterClassContext(harness.Server(cls.image, ring=cls.ring, io=cls.io))
        with cls.server.connect() as client:  # what is made once is made now
            client.read(0, SIZE)
            client.disconnect()

    def setUp(self):
        self.server.assert_alive()
        self.random = random.Random(harness.SEED)
        self.enterContext(self.seed_on_failure())
        self.fds, self.rss = self.server.fds(), self.server.rss()
        self.addCleanup(self.assert_unharmed)

    @contextlib.contextmanager
    def seed_on_failure(self):
        try:
            yield
        finally:
            if self._outcome and not self._outcome.success:
                print(f"{self.id()}: BIGHT_SEED={harness.SEED}", flush=True)

    def assert_unharmed(self):
        self.server.assert_alive()
        self.assert_served()
        harness.wait_until(lambda: self.server.fds() <= self.fds, f"no more than {self.fds} open files")
        if not harness.sanitized():
            self.assertLess(self.server.rss() - self.rss, MEMORY, "the server keeps memory")

    def assert_served(self):
        """A good client, all the way; the image is what it was."""
        with self.server.connect(self.random.choice(raw.MODES)) as client:
            self.assertTrue(client.read(0, SIZE) == harness.pattern(SIZE), "the image has changed")
            client.write(5, harness.pattern(25)[5:], raw.FUA)
            client.disconnect()

    def throw(self, data, reset=False):
        """Send it, say that this was all, and wait until the server has closed. The next client finds a live server."""
        with self.server.client() as client:
            with contextlib.suppress(raw.Closed):
                client.send(data)
                if reset:
                    client.reset()
                    return
                with contextlib.suppress(OSError):
                    client.sock.shutdown(socket.SHUT_WR)
            client.drain()

    # every message cut short and changed

    def test_streams_cut_after_every_byte(self):
        for mode in raw.MODES:
            stream = handshake_bytes(mode) + request_stream(mode)
            for cut in range(0, len(stream) + 1, 1 if not harness.QUICK else 3):
                self.throw(stream[:cut], reset=cut % 2)

    def test_streams_with_every_byte_changed(self):
        """Nothing that is changed may alter the image but a write's offset and payload, and these are left alone."""
        for mode in raw.MODES:
            opening, stream = handshake_bytes(mode), request_stream(mode)
            header = 32 if mode == "extended" else 28
            write = range(header, 2 * header + 40)
            for at in range(0, len(opening) + len(stream), 1 if not harness.QUICK else 3):
                if at - len(opening) in write:
                    continue
                for change in (lambda b: b ^ 0x80, lambda b: 0xFF, lambda b: b ^ 1):
                    broken = bytearray(opening + stream)
                    broken[at] = change(broken[at])
                    self.throw_harmless(broken, len(opening), header)

    def throw_harmless(self, stream, opening, header):
        """Not what has become a write, trim or zeroing of the image: that is no malformed request."""
        at = opening
        while at + header <= len(stream):
            command = struct.unpack(">H", stream[at + 6:at + 8])[0]
            if command in (raw.TRIM, raw.WRITE_ZEROES) and struct.unpack(">Q", stream[at + 16:at + 24])[0] != SIZE:
                return
            if command == raw.WRITE and at != opening + header:
                return
            at += header + (40 if at == opening + header else 0)
        self.throw(bytes(stream))

    def test_option_headers_with_extreme_fields(self):
        extremes = (0, 1, 2, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
        for option in (*range(0, 13), *extremes):
            for length in extremes:
                for tail in (b"", bytes(64), b"\xff" * 64):
                    self.throw(struct.pack(">I", 3) + raw.option_bytes(option, tail, length=length))

    def test_request_headers_with_extreme_fields(self):
        """Commands that cannot change anything, with every extreme in every field."""
        extremes = (0, 1, 511, SIZE - 1, SIZE, SIZE + 1, 0x7FFFFFFF, 0xFFFFFFFF)
        wide = (*extremes, 1 << 63, (1 << 64) - 1, (1 << 64) - 512)
        for mode in raw.MODES:
            extended = mode == "extended"
            stream = []
            for command in (raw.READ, raw.FLUSH, raw.CACHE, raw.BLOCK_STATUS, 8, 0x8000, 0xFFFF):
                for flags in (0, 1, 0x1F, 0xFFDF):
                    for offset in wide:
                        for length in (wide if extended else extremes):
                            stream.append(raw.request_bytes(command, offset, length, flags, 1, extended=extended))
            for part in range(0, len(stream), 200):
                self.throw(handshake_bytes(mode) + b"".join(stream[part:part + 200]))

    def test_writes_with_extreme_fields_change_nothing(self):
        for mode in raw.MODES:
            extended = mode == "extended"
            for offset in (SIZE, SIZE - 1, 1 << 63, (1 << 64) - 1):
                for length in (2, 4096, raw.MAX_PAYLOAD, raw.MAX_PAYLOAD + 1, 0x7FFFFFFF, 0xFFFFFFFF):
                    for flags in (0, raw.FUA, 0xFFFF):
                        flags |= raw.PAYLOAD_LEN if extended else 0
                        self.throw(handshake_bytes(mode) + bytes(raw.request_bytes(raw.WRITE, offset, length, flags, 1,
                                                                                   b"\xee" * 10000, extended)))

    def test_wrong_request_magic_closes_the_connection(self):
        for mode in raw.MODES:
            extended = mode == "extended"
            for magic in (0, 0xFFFFFFFF, 0x12560953, 0x25609514, raw.SIMPLE_REPLY_MAGIC,
                          raw.REQUEST_MAGIC if extended else raw.EXT_REQUEST_MAGIC):
                with self.subTest(mode=mode, magic=hex(magic)), self.server.connect(mode) as client:
                    good = client.issue(raw.READ, 0, 100)
                    self.assertEqual(client.wait(good).data, harness.pattern(100))
                    client.send(raw.request_bytes(raw.READ, 0, 100, 0, 1, extended=extended, magic=magic))
                    with self.assertRaises(raw.Closed):
                        client.fill()

    def test_good_requests_before_rubbish_are_answered_or_dropped_whole(self):
        for mode in raw.MODES:
            with self.server.connect(mode) as client:
                stream = [client.request(raw.READ, 1000 * number, 1000)[1] for number in range(100)]
                with contextlib.suppress(raw.Closed):
                    client.send(b"".join(stream) + self.random.randbytes(50000))
                    while client.pending:
                        client.step()  # strict: no answer is cut, wrong or to somebody else
                for number, answer in client.finished.items():
                    self.assertEqual(answer.data, harness.pattern(SIZE)[1000 * (number - 1):1000 * number])

    def test_random_bytes(self):
        for _ in range(rounds(200)):
            rubbish = self.random.randbytes(self.random.choice((1, 17, 100, 5000, 100000)))
            stage = self.random.randrange(4)
            if stage == 0:
                self.throw(rubbish)
            elif stage == 1:
                self.throw(struct.pack(">I", 3) + struct.pack(">Q", raw.IHAVEOPT) + rubbish)
            else:
                self.throw(handshake_bytes(self.random.choice(raw.MODES)) + rubbish, reset=stage == 2)

    # floods

    def test_an_option_that_announces_gigabytes(self):
        for option in (raw.OPT_EXPORT_NAME, raw.OPT_LIST, raw.OPT_GO, raw.OPT_SET_META_CONTEXT, 77):
            with self.server.client() as client:
                client.greet()
                with contextlib.suppress(raw.Closed):
                    client.send(raw.option_bytes(option, length=0xFFFFFFF0))
                    for _ in range(32):
                        client.send(bytes(M))
                self.assert_memory_bounded()

    def test_giant_option_data(self):
        client = self.enterContext(self.server.client())
        client.greet()
        client.set_mode("structured")
        errors = {raw.REP_ERR_INVALID, raw.REP_ERR_TOO_BIG, raw.REP_ERR_UNKNOWN}
        with contextlib.suppress(raw.Closed):
            for option, data in ((raw.OPT_GO, raw.info_data("x" * M)),
                                 (raw.OPT_INFO, raw.info_data("", [4] * 60000)),
                                 (raw.OPT_LIST_META_CONTEXT, raw.meta_data("", ["x-a:b"] * 100000)),
                                 (raw.OPT_SET_META_CONTEXT, raw.meta_data("", ["base:allocation"] * 100000))):
                kind = client.option(option, data)[-1][0]
                self.assertIn(kind, errors | {raw.REP_ACK})
            client.go()
            self.assertEqual(client.read(0, 512), harness.pattern(512))
        self.assert_memory_bounded()

    def test_a_flood_of_options_is_answered_or_dropped(self):
        for option in (raw.OPT_LIST, 77, raw.OPT_INFO):
            data = raw.info_data() if option == raw.OPT_INFO else b""
            with self.server.client() as client, contextlib.suppress(raw.Closed):
                client.greet()
                for _ in range(rounds(100)):
                    client.send(raw.option_bytes(option, data) * 100)
                    for _ in range(100):
                        client.option_replies(option)

    def test_a_flood_of_options_whose_answers_nobody_reads(self):
        for option in (raw.OPT_LIST, 77):
            with self.server.client() as client:
                client.greet()
                self.push(client, raw.option_bytes(option) * 1000, 64 * M)
                self.assert_served()
                self.assert_memory_bounded()

    def push(self, client, data, limit):
        """Send the same again and again without reading, until the server takes no more or `limit` bytes are sent."""
        sent = 0
        with contextlib.suppress(raw.Closed, BrokenPipeError, ConnectionResetError):
            for _ in range(3):
                while sent < limit:
                    try:
                        # from where it stopped, else the stream would be rubbish
                        sent += client.sock.send(memoryview(data)[sent % len(data):], socket.MSG_NOSIGNAL)
                    except BlockingIOError:
                        break
                time.sleep(0.01)
        return sent

    def assert_memory_bounded(self):
        if not harness.sanitized():
            self.assertLess(self.server.rss() - self.rss, MEMORY)

    def test_requests_whose_answers_nobody_reads(self):
        """The server stops taking requests of that client, and of that client only."""
        for mode in raw.MODES:
            extended = mode == "extended"
            with self.server.connect(mode) as client:
                data = raw.request_bytes(raw.READ, 0, 4 * M, 0, 1, extended=extended)
                sent = self.push(client, data * 1000, 1 << 30)
                self.assertLess(sent, 1 << 30)
                for _ in range(5):
                    self.assert_served()

    def test_many_clients_that_never_read(self):
        with contextlib.ExitStack() as stack:
            for number in range(30):
                client = stack.enter_context(self.server.connect(raw.MODES[number % 3]))
                extended = client.mode == "extended"
                self.push(client, raw.request_bytes(raw.READ, 0, 64 * K, 0, 1, extended=extended) * 100, 64 * K)
            self.assert_served()

    def test_clients_stalled_in_the_middle_of_a_payload(self):
        with contextlib.ExitStack() as stack:
            for number in range(40):
                client = stack.enter_context(self.server.connect(raw.MODES[number % 3]))
                message = client.request(raw.WRITE, 0, data=harness.pattern(M))[1]
                client.send(message[:self.random.choice((len(message) // 2, 33, len(message) - 1))])
            for _ in range(5):
                self.assert_served()

    def test_payloads_that_are_announced_and_never_sent_cost_no_memory(self):
        with contextlib.ExitStack() as stack:
            for number in range(100):
                client = stack.enter_context(self.server.connect(raw.MODES[number % 3]))
                client.send(client.request(raw.WRITE, 0, raw.MAX_PAYLOAD)[1])
            self.assert_served()
            self.assert_memory_bounded()

    def test_clients_stalled_in_the_handshake(self):
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                client = stack.enter_context(self.server.client())
                client.send(handshake_bytes("structured")[:self.random.randrange(60)])
            self.assert_served()

    def test_clients_that_close_with_answers_under_way(self):
        for number in range(rounds(100)):
            client = self.server.connect(raw.MODES[number % 3])
            for at in range(self.random.randrange(1, 60)):
                client.send(client.request(raw.READ, at * 100 * K, 100 * K)[1])
            (client.reset if number % 2 else client.close)()

    def test_clients_that_close_with_writes_under_way(self):
        for number in range(rounds(100)):
            client = self.server.connect(raw.MODES[number % 3])
            with contextlib.suppress(raw.Closed):
                for at in range(0, M, 64 * K):
                    client.send(client.request(raw.WRITE, at, data=harness.pattern(M)[at:at + 64 * K])[1])
            (client.reset if number % 2 else client.close)()

    def test_a_storm_of_connections(self):
        def storm():
            for number in range(rounds(500)):
                with contextlib.suppress(raw.Closed, OSError), self.server.client() as client:
                    if number % 3 == 0:
                        client.send(handshake_bytes("structured"))
                    if number % 2:
                        client.reset()

        threads = [threading.Thread(target=storm) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                self.assert_served()
        finally:
            for thread in threads:
                thread.join()

    def test_more_connections_than_are_allowed(self):
        """The default is 1,000. The others are told off or wait; who is in is served, and who leaves makes room."""
        harness.usable_fds(2000)
        with contextlib.ExitStack() as stack:
            inside = [stack.enter_context(self.server.connect()) for _ in range(1000)]
            outside = []
            for _ in range(20):
                client = stack.enter_context(raw.Client(self.server.socket, timeout=0.1))
                with contextlib.suppress(raw.Closed, TimeoutError):
                    client.fill()
                    self.fail("a connection too many is served")
                outside.append(client)
            for number in range(0, 1000, 37):
                self.assertEqual(inside[number].read(number, 100), harness.pattern(SIZE)[number:number + 100])
            for client in outside:
                client.close()
            for client in inside[:50]:
                client.disconnect()
            harness.wait_until(self.is_served, "a free place")

    def is_served(self):
        try:
            self.assert_served()
            return True
        except (raw.Closed, OSError):
            return False


class Limits:
    ring = None

    def test_a_limit_of_four_connections(self):
        server = self.serve(self.image(harness.pattern(M)), args=["--connections", 4], ring=self.ring)
        clients = [self.enterContext(server.connect()) for _ in range(4)]
        with raw.Client(server.socket, timeout=0.2) as fifth, contextlib.suppress(raw.Closed, TimeoutError):
            fifth.fill()
            self.fail("the fifth of four is served")
        clients[0].disconnect()

        def sixth():
            try:
                with raw.connect(server.socket, timeout=5) as client:
                    return client.read(0, 10) == harness.pattern(10)
            except (raw.Closed, OSError):
                return False

        harness.wait_until(sixth, "the place of who left")
        self.assertEqual(clients[1].read(0, 10), harness.pattern(10))

    def test_running_out_of_files(self):
        """accept() fails with EMFILE: the server goes on, and serves again when there is room."""
        def few_files():
            resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

        server = self.serve(self.image(harness.pattern(M)), ring=self.ring, setup=few_files)
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(server.connect())
            for _ in range(150):
                stack.enter_context(raw.Client(server.socket))
            for _ in range(20):
                self.assertEqual(first.read(0, 10), harness.pattern(10))
        with server.connect() as client:
            self.assertEqual(client.read(0, 10), harness.pattern(10))

    def test_a_stop_with_hostile_clients_connected(self):
        """Neither who stalls nor who does not read can hold up the end."""
        server = self.serve(self.image(harness.pattern(SIZE)), ring=self.ring)
        with contextlib.ExitStack() as stack:
            for mode in raw.MODES:
                stalled = stack.enter_context(server.connect(mode))
                stalled.send(stalled.request(raw.WRITE, 0, data=bytes(M))[1][:M // 2])
                deaf = stack.enter_context(server.connect(mode))
                with contextlib.suppress(BlockingIOError):
                    deaf.sock.send(raw.request_bytes(raw.READ, 0, 4 * M, 0, 1, extended=mode == "extended") * 20)
                stack.enter_context(server.client())
            server.stop()


class Piped:
    """Large reads of what the page cache has: pages of it go into the socket, and nobody waits for who does not read."""

    ring = None

    def setUp(self):
        super().setUp()
        self.data = random.Random(harness.SEED).randbytes(SIZE)
        self.disk = self.image(self.data)
        self.server = self.serve(self.disk, ring=self.ring, io="buffered")
        with open(self.disk, "rb") as image:  # tmpfs, or cached by being written; read once for the others
            image.read()

    def nr_pipes(self):
        fds, count = f"/proc/{self.server.process.pid}/fd", 0
        for fd in os.listdir(fds):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                count += os.readlink(os.path.join(fds, fd)).startswith("pipe:")
        return count

    def assert_piped(self, before):
        with open("/proc/sys/kernel/osrelease") as release:
            version = tuple(int(n) for n in release.read().split("-")[0].split(".")[:2])
        if version >= (6, 5) and not harness.sanitized():  # valgrind does not know the call
            self.assertGreater(self.nr_pipes(), before)

    def test_every_length_place_and_mode(self):
        rand, before = random.Random(harness.SEED), self.nr_pipes()
        for mode in raw.MODES:
            with self.server.connect(mode) as client:
                asked = {}
                for _ in range(rounds(200)):
                    length = rand.choice((1, 4 * K, 64 * K, 128 * K, 256 * K, 256 * K + 1, M, rand.randrange(1, 300 * K)))
                    offset = rand.choice((rand.randrange(SIZE - length), rand.randrange((SIZE - length) // 4096) * 4096,
                                          SIZE - length))
                    flags = raw.DF if mode != "simple" and rand.random() < 0.5 else 0
                    asked[client.issue(raw.READ, offset, length, flags)] = offset, length
                    if rand.random() < 0.05:
                        asked[client.issue(raw.READ, SIZE - 64 * K, 128 * K)] = None
                    if rand.random() < 0.1:
                        data = rand.randbytes(length)
                        for cookie in list(asked):
                            self.check(client.wait(cookie), asked.pop(cookie))
                        client.write(offset, data)
                        self.data = self.data[:offset] + data + self.data[offset + length:]
                        self.assertEqual(client.read(offset, length), data)
                    for cookie in list(client.finished):
                        self.check(client.finished.pop(cookie), asked.pop(cookie))
                for cookie, place in asked.items():
                    self.check(client.wait(cookie), place)
                if mode == "simple":
                    self.assert_piped(before)

    def check(self, answer, place):
        if place is None:
            self.assertEqual(answer.error, raw.EINVAL)
        else:
            self.assertEqual(answer.error, 0)
            self.assertTrue(answer.data == self.data[place[0]:place[0] + place[1]], f"other data at {place}")

    def test_who_does_not_read_keeps_nobody_waiting_and_gets_all_in_the_end(self):
        with contextlib.ExitStack() as stack:
            deaf = [stack.enter_context(self.server.connect(mode)) for mode in raw.MODES * 3]
            cookies = [[client.issue(raw.READ, at * 128 * K, 128 * K) for at in range(60)] for client in deaf]
            for _ in range(20):
                with self.server.connect() as client:
                    self.assertEqual(client.read(0, 128 * K), self.data[:128 * K])
            self.assertLessEqual(self.nr_pipes(), 2 * 64 + 4)
            for client, asked in zip(deaf[:6], cookies):
                for at, cookie in enumerate(asked):
                    self.check(client.wait(cookie), (at * 128 * K, 128 * K))
        self.server.stop()

    def test_what_is_zeroed_beside_a_read_is_not_in_its_answer(self):
        """Pages that are still on their way to the client: file systems zero and drop more than they are asked to."""
        zeroed = [(raw.TRIM, 32 * K, 512, 0), (raw.WRITE_ZEROES, 48 * K + 100, 700, 0),
                  (raw.WRITE_ZEROES, 65 * K, 1536, raw.NO_HOLE), (raw.WRITE_ZEROES, 79 * K, 10 * K, 0)]
        for kind in ("ext4", "xfs"):
            with self.subTest(kind=kind), harness.filesystem(kind, 512 * M) as point:
                image = harness.write_file(f"{point}/disk.img", self.data)
                server = self.serve(image, ring=self.ring, io="buffered")
                with server.connect() as slow, server.connect() as other:
                    self.assertEqual(other.read(0, 256 * K), self.data[:256 * K])
                    cookie = slow.issue(raw.READ, 0, 128 * K)
                    harness.wait_until(lambda: nr_unread_bytes(slow.sock) > 128 * K, "the answer")
                    for command, offset, length, flags in zeroed:
                        other.expect(0, command, offset, length, flags)
                    answer, after = slow.wait(cookie).data, bytearray(self.data[:128 * K])
                    for _, offset, length, _ in zeroed:  # each of these bytes is zero by then or not
                        for at in range(offset, offset + length):
                            after[at] &= answer[at] and 0xFF
                    self.assertEqual([at for at in range(0, 128 * K, 512) if answer[at:at + 512] != after[at:at + 512]], [])
                    for _, offset, length, _ in zeroed[1:]:  # a TRIM may do nothing
                        self.assertEqual(other.read(offset, length), bytes(length))
                server.stop()

    def test_pipes_are_closed_with_their_connection(self):
        first = self.enterContext(self.server.connect())
        first.read(0, 512)  # who has served that is past telling that it is ready, by a socket
        before, fds = self.nr_pipes(), self.server.fds()
        for number in range(rounds(60)):
            with self.server.connect(raw.MODES[number % 3]) as client:
                for at in range(40):
                    client.issue(raw.READ, at * 128 * K, 128 * K)
                for _ in range(number % 5):
                    client.step()
                if number % 2:
                    client.reset()
        harness.wait_until(lambda: (self.nr_pipes(), self.server.fds()) == (before, fds), "what the connections had to be closed")

    def test_an_image_that_was_cut_short(self):
        with self.server.connect() as client:
            client.read(0, 256 * K)
            os.truncate(self.disk, 200 * K + 7)
            for offset in (0, 100 * K + 1, 200 * K - 5, 200 * K + 7, 250 * K):
                end = max(offset, 200 * K + 7)
                expected = self.data[offset:end] + bytes(256 * K - (end - offset))
                self.assertTrue(client.read(offset, 256 * K) == expected, f"at {offset}")

    def test_errors_under_way(self):
        self.server.stop()
        server = self.serve(self.disk, ring=self.ring, io="fault:io=buffered,read.error=0.3,read.short=0.3,seed=5")
        with server.connect("structured") as client:
            failed = 0
            for at in range(rounds(200)):
                answer = client.wait(client.issue(raw.READ, at * 1000, 128 * K))
                failed += answer.error == raw.EIO
                if not answer.error:
                    self.assertTrue(answer.data == self.data[at * 1000:at * 1000 + 128 * K])
            self.assertGreater(failed, 0)


for _ring in harness.rings():
    harness.variant(globals(), Malformed, unittest.TestCase, ring=_ring)
    harness.variant(globals(), Limits, harness.Case, ring=_ring)
    harness.variant(globals(), Piped, harness.Case, ring=_ring)
# the data of large reads goes another way there
harness.variant(globals(), Malformed, unittest.TestCase, ring=harness.rings()[0], io="buffered")

if __name__ == "__main__":
    unittest.main()
