#!/usr/bin/python3
"""What a client was told is kept, whatever dies; and what could not be kept is told."""
import os
import random
import shutil
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "clients"))
import harness
import raw
from harness import IOS, WRITEBACK, K, M, Case, Server, need, need_root, rounds, run

SIZE = 8 * M
BLOCK = 4 * K


class Kills(Case):
    def load(self, client, chance, confirm, state):
        """Write until the server dies. `state` has for each block what may be there: what was confirmed, and later."""
        flying = {}
        with_fua = confirm == "fua"
        try:
            for number in range(1, 1 << 30):
                block = chance.randrange(SIZE // BLOCK)
                if block in flying.values():
                    continue
                data = harness.pattern(BLOCK, number % 251)
                state[block].append(data)
                flying[client.issue(raw.WRITE, block * BLOCK, flags=raw.FUA if with_fua else 0, data=data)] = block
                if len(flying) < 16:
                    continue
                finished = [client.wait_any()]
                if not with_fua and number % 50 == 0:
                    finished += [(cookie, client.wait(cookie)) for cookie in list(flying) if cookie != finished[0][0]]
                for cookie, answer in finished:
                    self.assertEqual(answer.error, 0)
                    block = flying.pop(cookie)
                    if with_fua:
                        del state[block][:-1]
                if not flying:
                    client.flush()
                    for block in range(SIZE // BLOCK):
                        del state[block][:-1]
                yield
        except (raw.Closed, TimeoutError):
            pass

    def test_a_killed_server_loses_nothing_that_it_confirmed(self):
        for ring, io in harness.ways(IOS + (WRITEBACK,)):
            for confirm in ("flush", "fua"):
                chance = random.Random(harness.SEED)
                with self.subTest(ring=ring, io=io, confirm=confirm, seed=harness.SEED):
                    image = self.image(size=SIZE)
                    state = [[bytes(BLOCK)] for _ in range(SIZE // BLOCK)]
                    for _ in range(rounds(3)):
                        with Server(image, ring=ring, io=io) as server:
                            client = self.enterContext(server.connect(chance.choice(raw.MODES)))
                            steps = chance.randrange(1000)
                            for step, _ in enumerate(self.load(client, chance, confirm, state)):
                                if step == steps:
                                    server.kill()
                        data = harness.read_file(image)
                        for block, allowed in enumerate(state):
                            found = data[block * BLOCK:(block + 1) * BLOCK]
                            # a write that was not confirmed may be there, not, or in part
                            self.assertTrue(found in allowed or len(allowed) > 1 and self.is_mixed(found, allowed),
                                            f"block {block} has lost what was confirmed")
                            state[block] = [found]

    def is_mixed(self, found, allowed):
        return all(found[at:at + 512] in [data[at:at + 512] for data in allowed] for at in range(0, BLOCK, 512))

    def test_a_killed_client_harms_nobody(self):
        """Half of a payload has come when the client dies: none of it may spoil what others have written."""
        for ring, io in harness.ways(IOS + (WRITEBACK,)):
            with self.subTest(ring=ring, io=io), Server(self.image(harness.pattern(SIZE)), ring=ring, io=io) as server:
                with server.connect() as good:
                    good.read(0, 64 * K)  # what a connection makes for its reads stays its own
                    fds = server.fds()
                    for number in range(rounds(20)):
                        child = os.fork()
                        if not child:
                            self.die_in_the_middle_of_writing(server, number)
                        os.waitpid(child, 0)
                        data = harness.pattern(64 * K, number)
                        good.write(4 * M + number * 64 * K, data, raw.FUA)
                        self.assertEqual(good.read(4 * M + number * 64 * K, 64 * K), data)
                    harness.wait_until(lambda: server.fds() <= fds, "the dead clients' connections")
                    self.assertEqual(good.read(2 * M, 2 * M), harness.pattern(SIZE)[2 * M:4 * M])

    def die_in_the_middle_of_writing(self, server, number):
        """In a child: SIGKILL with whole requests in flight and the next one cut."""
        try:
            client = server.connect(raw.MODES[number % 3])
            for at in range(0, M, 64 * K):
                client.send(client.request(raw.WRITE, at, data=bytes(64 * K))[1])
            client.send(client.request(raw.WRITE, M, data=bytes(M))[1][:1000 + number * 5000])
        finally:
            os.kill(os.getpid(), 9)


@need_root
class PowerCuts(Case):
    """The device below is copied at once when the server has confirmed, as if the power had failed just then."""

    def cut(self, ring, io, kind, actions):
        """Run `actions` on a fresh file system; returns the image as it is found after the power cut."""
        backing = os.path.join("/dev/shm", os.path.basename(self.dir) + "-disk")
        self.addCleanup(lambda: os.path.exists(backing) and os.unlink(backing))
        harness.write_file(backing, size=320 * M)
        with harness.loop_device(0, backing=backing) as device:
            run(*harness.MKFS[kind], device)
            # nothing is to reach the device but what is asked for
            with harness.mounted(device, kind, "commit=300" if kind == "ext4" else "") as point:
                image = harness.write_file(os.path.join(point, "disk.img"), size=SIZE)
                run("sync", "-f", point)
                with Server(image, ring=ring, io=io) as server, server.connect() as client:
                    actions(client)
                    copy = self.path("copy")
                    run("cp", "--sparse=always", backing, copy)
        os.unlink(backing)
        with harness.loop_device(0, backing=copy) as device, harness.mounted(device, kind) as point:
            data = harness.read_file(os.path.join(point, "disk.img"))
        os.unlink(copy)
        return data

    def check(self, actions, expected):
        for kind in ("ext4", "xfs"):
            if not harness.have(harness.MKFS[kind][0]):
                continue
            for ring, io in harness.ways(IOS + (WRITEBACK,)):
                with self.subTest(kind=kind, ring=ring, io=io):
                    data = self.cut(ring, io, kind, actions)
                    self.assertEqual(len(data), SIZE)
                    for offset, content in expected.items():
                        self.assertTrue(data[offset:offset + len(content)] == content, f"lost: {offset}+{len(content)}")

    def test_flush(self):
        def actions(client):
            client.write(0, harness.pattern(M))
            client.write(3 * M + 17, harness.pattern(5000))
            client.expect(0, raw.WRITE_ZEROES, M // 2, 4 * K)
            client.flush()

        data = bytearray(harness.pattern(M))
        data[M // 2:M // 2 + 4 * K] = bytes(4 * K)
        self.check(actions, {0: bytes(data), 3 * M + 17: harness.pattern(5000), 3 * M: bytes(17)})

    # each with nothing after it that would flush it too

    def test_fua_writes(self):
        def actions(client):
            client.write(0, harness.pattern(M), raw.FUA)
            client.write(3 * M, harness.pattern(64 * K), raw.FUA)

        self.check(actions, {0: harness.pattern(M), 3 * M: harness.pattern(64 * K), M: bytes(2 * M)})

    def test_an_unaligned_fua_write(self):
        def actions(client):
            client.write(3 * M + 17, harness.pattern(5000), raw.FUA)

        self.check(actions, {3 * M: bytes(17) + harness.pattern(5000) + bytes(1000)})

    def test_fua_write_zeroes(self):
        for flags in (0, raw.NO_HOLE):
            def actions(client):
                client.write(0, harness.pattern(M))
                client.flush()
                client.expect(0, raw.WRITE_ZEROES, M // 2, 4 * K, raw.FUA | flags)

            self.check(actions, {0: harness.pattern(M)[:M // 2] + bytes(4 * K) + harness.pattern(M)[M // 2 + 4 * K:]})

    def test_unaligned_fua_write_zeroes(self):
        def actions(client):
            client.write(0, harness.pattern(M))
            client.flush()
            client.expect(0, raw.WRITE_ZEROES, 1000, 100, raw.FUA)

        self.check(actions, {0: harness.pattern(M)[:1000] + bytes(100) + harness.pattern(M)[1100:]})

    def test_a_flush_covers_other_connections(self):
        """What multi-conn promises."""
        def actions(client):
            with raw.connect(client.sock.getpeername(), "extended") as other:
                other.write(0, harness.pattern(M))
                other.write(2 * M + 1, harness.pattern(1000))
                client.flush()

        self.check(actions, {0: harness.pattern(M), 2 * M + 1: harness.pattern(1000)})

    def test_the_end_of_the_server_flushes(self):
        for ring, io in harness.ways(IOS + (WRITEBACK,)):
            backing = os.path.join("/dev/shm", os.path.basename(self.dir) + "-disk")
            self.addCleanup(lambda: os.path.exists(backing) and os.unlink(backing))
            harness.write_file(backing, size=64 * M)
            with self.subTest(ring=ring, io=io), harness.loop_device(0, backing=backing) as device:
                run(*harness.MKFS["ext4"], device)
                with harness.mounted(device, "ext4", "commit=300") as point:
                    image = harness.write_file(os.path.join(point, "disk.img"), size=SIZE)
                    run("sync", "-f", point)
                    with Server(image, ring=ring, io=io) as server, server.connect() as client:
                        client.write(0, harness.pattern(M))
                        server.stop()
                        shutil.copy(backing, self.path("copy"))
                copy = harness.loop_device(0, backing=self.path("copy"))
                with copy as device, harness.mounted(device, "ext4") as point:
                    self.assertTrue(harness.read_file(os.path.join(point, "disk.img"))[:M] == harness.pattern(M))


@need_root
class Full(Case):
    @need("mkfs.ext4")
    def test_a_full_file_system_is_told_as_enospc(self):
        for ring, io in harness.ways(IOS + (WRITEBACK,)):
            with self.subTest(ring=ring, io=io), harness.filesystem("ext4", 24 * M) as point:
                image = harness.write_file(os.path.join(point, "disk.img"), size=64 * M)
                with Server(image, ring=ring, io=io) as server:
                    for mode in raw.MODES:
                        with server.connect(mode) as client:
                            written = []
                            errors = set()
                            for at in range(0, 64 * M, M):
                                answer = client.command(raw.WRITE, at, M, 0, harness.pattern(M, at))
                                errors.add(answer.error)
                                if not answer.error:
                                    written.append(at)
                            self.assertEqual(errors, {0, raw.ENOSPC})
                            client.expect(raw.ENOSPC, raw.WRITE_ZEROES, 32 * M, 32 * M, raw.NO_HOLE)
                            client.flush()
                            for at in written:  # the connection and all that was confirmed are good
                                self.assertTrue(client.read(at, M) == harness.pattern(M, at))
                            client.expect(0, raw.TRIM, 0, 64 * M)
                            client.write(50 * M, harness.pattern(M))
                            self.assertEqual(client.read(50 * M, M), harness.pattern(M))
                            client.expect(0, raw.TRIM, 0, 64 * M)


class Faults(Case):
    def test_errors_reach_the_client_by_name(self):
        image = self.image(harness.pattern(M))
        told = {"EIO": raw.EIO, "ENOSPC": raw.ENOSPC, "EDQUOT": raw.ENOSPC, "ENOMEM": raw.ENOMEM, "EPERM": raw.EPERM,
                "EROFS": raw.EPERM, "ETIMEDOUT": raw.EIO, "EINVAL": raw.EINVAL}
        requests = {"read": (raw.READ, b""), "write": (raw.WRITE, b"x" * BLOCK), "flush": (raw.FLUSH, b""),
                    "discard": (raw.TRIM, b""), "write_zeroes": (raw.WRITE_ZEROES, b"")}
        for ring, io in harness.ways():
            for name, error in told.items():
                operation = random.Random(name + ring + io).choice(list(requests)) if name != "EIO" else None
                for which in [operation] if operation else requests:
                    command, data = requests[which]
                    with self.subTest(ring=ring, io=io, operation=which, error=name), \
                            Server(image, io=f"fault:io={io},{which}.error=1:{name}", ring=ring) as server:
                        for mode in raw.MODES:
                            with server.connect(mode) as client:
                                client.expect(error, command, 0, 0 if command == raw.FLUSH else BLOCK, 0, data)
                                if command != raw.READ:
                                    self.assertEqual(len(client.read(0, M)), M)
                        server.kill()  # a failed flush makes the end fail as well: its own test

    def test_errors_begin_after_so_many_requests(self):
        with Server(self.image(size=M), io="fault:read.error=1,after=10") as server, server.connect() as client:
            self.assertEqual([client.command(raw.READ, 0, 512).error for _ in range(13)], [0] * 10 + [raw.EIO] * 3)

    def test_the_default_error_is_eio(self):
        with Server(self.image(size=M), io="fault:any.error=1") as server, server.connect() as client:
            client.expect(raw.EIO, raw.READ, 0, 512)
            client.expect(raw.EIO, raw.WRITE, 0, 512, 0, bytes(512))
            server.kill()

    def test_a_seed_repeats_the_faults(self):
        def run_of(seed):
            io = f"fault:seed={seed},read.error=0.5"
            with Server(self.image(size=M), io=io, args=["--queues", "1"]) as server, server.connect() as client:
                return [client.command(raw.READ, 0, 512).error for _ in range(64)]

        first = run_of(1)
        self.assertEqual(set(first), {0, raw.EIO})
        self.assertEqual(run_of(1), first)
        self.assertNotEqual(run_of(2), first)

    def test_short_io_is_continued(self):
        for ring, io in harness.ways():
            spec = f"fault:io={io},seed={harness.SEED},read.short=0.7,write.short=0.7"
            image = self.image(size=SIZE)
            with self.subTest(ring=ring, io=io, spec=spec), Server(image, io=spec, ring=ring) as server:
                for mode in raw.MODES:
                    with server.connect(mode) as client:
                        for offset, length in ((0, M), (M + 13, 100000), (2 * M - 1, 3), (3 * M, SIZE - 3 * M)):
                            data = harness.pattern(length, offset)
                            client.write(offset, data)
                            self.assertTrue(client.read(offset, length) == data, (offset, length))

    def test_delays_keep_the_answers_apart(self):
        """Answers overtake each other; each keeps its cookie and its data."""
        for ring, io in harness.ways():
            with self.subTest(ring=ring, io=io), Server(self.image(harness.pattern(SIZE)), ring=ring,
                                                        io=f"fault:io={io},seed=3,read.delay=0.3:20") as server:
                for mode in raw.MODES:
                    with server.connect(mode) as client:
                        cookies = [client.issue(raw.READ, at * 1000, 1000) for at in range(200)]
                        for number, cookie in enumerate(cookies):
                            self.assertEqual(client.wait(cookie).data, harness.pattern(SIZE)[number * 1000:][:1000])

    def test_a_torn_write_is_an_error_and_spoils_only_its_own_range(self):
        for ring, io in harness.ways():
            image = self.image(harness.pattern(M))
            with self.subTest(ring=ring, io=io), Server(image, io=f"fault:io={io},write.torn=1", ring=ring) as server:
                with server.connect() as client:
                    for offset, length in ((8192, 8192), (100001, 5000), (200, 3), (M - 1000, 1000)):
                        before = client.read(0, M)
                        client.expect(raw.EIO, raw.WRITE, offset, length, 0, bytes(length))
                        after = client.read(0, M)
                        self.assertEqual(after[:offset], before[:offset])
                        self.assertEqual(after[offset + length:], before[offset + length:])

    def test_a_failed_flush_fails_every_later_one(self):
        """The page cache forgets what could not be written: a later fsync that succeeds says nothing."""
        for ring, io in harness.ways():
            image = self.image(size=M)
            server = self.enterContext(Server(image, io=f"fault:io={io},seed=1,flush.error=0.5", ring=ring))
            with self.subTest(ring=ring, io=io):
                clients = [self.enterContext(server.connect(mode)) for mode in raw.MODES]
                errors = []
                for number in range(200):
                    clients[number % 3].write(number * 100, b"x")
                    errors.append(clients[(number + 1) % 3].command(raw.FLUSH).error)
                self.assertIn(raw.EIO, errors)
                first = errors.index(raw.EIO)
                self.assertEqual(set(errors[first:]), {raw.EIO})
                self.enterContext(server.connect()).expect(raw.EIO, raw.FLUSH)
                self.assertEqual(clients[0].read(0, 1), b"x")  # all else goes on
                # and the end cannot claim that all is well
                server.process.terminate()
                server.wait(status=1)
                self.assertRegex(server.stderr(), r"bight: [^\n]+\n\Z")
            with Server(image, ring=ring, io=io) as again, again.connect() as client:
                client.flush()  # attached anew

    def test_no_sticky_error_from_a_failed_write(self):
        for ring, io in harness.ways():
            with Server(self.image(size=M), io=f"fault:io={io},write.error=0.5,seed=2", ring=ring) as server:
                with server.connect() as client:
                    errors = {client.command(raw.WRITE, 0, 512, 0, b"x" * 512).error for _ in range(50)}
                    self.assertEqual(errors, {0, raw.EIO})
                    client.flush()


if __name__ == "__main__":
    unittest.main()
