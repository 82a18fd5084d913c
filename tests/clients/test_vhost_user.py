#!/usr/bin/python3
"""virtio disks over vhost-user: the load generator's other half (bench/vu_client.c) against the real program."""
import json
import os
import sys

import harness
from harness import BIGHT, K, M, Case, Server, rounds, variant

LOAD = os.path.join(os.environ.get("BIGHT_BUILD") or os.path.dirname(BIGHT), "vu_load")
SHAPES = ((), ("--packed",), ("--no-event-idx", "--regions", "5"), ("--packed", "--no-event-idx", "--inflight"),
          ("--inflight", "--regions", "8", "--queues", "2"), ("--packed", "--regions", "3", "--queues", "3"),
          ("--no-flush", "--no-indirect", "--ring-size", "1024"), ("--poll", "--packed", "--ring-size", "200"))


class VhostServer(Server):
    """A server whose one address is a vhost-user socket."""

    def __init__(self, *images, args=(), **options):
        super().__init__(*images, args=args, nbd=[], **options)
        self.vhost = os.path.join(self.dir, "vhost.sock")
        self.command += ["--vhost-user", self.vhost]

    def load(self, *args):
        done = harness.run(LOAD, "--socket", self.vhost, *args)
        return json.loads(done.stdout)


class Model:
    """Random requests, in random pieces and shapes, against a model of the disk."""

    def test_all_is_as_written(self):
        for seed, shape in enumerate(SHAPES, 1):
            image = self.image(size=4 * M + 512, name=f"disk{seed}.img")
            with self.subTest(shape=shape), VhostServer(image, ring=self.ring, io=self.io) as server:
                told = server.load("--verify", rounds(400), "--depth", 16, "--seed", seed, *shape)
                self.assertTrue(told["verified"])


for _ring, _io in harness.ways():
    variant(globals(), Model, Case, ring=_ring, io=_io)


class Load(Case):
    def test_requests_are_counted_and_none_fails(self):
        image = self.image(size=4 * M)
        with VhostServer(image) as server:
            for args in (("--rw", "randrw"), ("--rw", "read", "--bs", 128 * K, "--depth", 4), ("--depth", 1, "--poll")):
                told = server.load("--seconds", 0.2, "--ramp", 0, *args)
                self.assertGreater(told["requests"], 0)
                self.assertEqual(told["errors"], 0)

    def test_null_answers_without_an_image_behind_it(self):
        with VhostServer(self.image(size=4 * M), io="null", args=("--queues", 2)) as server:
            self.assertEqual(server.load("--seconds", 0.2, "--queues", 2)["errors"], 0)

    def test_writes_to_a_read_only_disk_fail(self):
        with VhostServer(self.image(size=4 * M), args=("--read-only",)) as server:
            done = harness.run(LOAD, "--socket", server.vhost, "--rw", "randwrite", "--seconds", 0.2, "--ramp", 0,
                               status=1)
            told = json.loads(done.stdout)
            self.assertEqual(told["errors"], told["requests"])


if __name__ == "__main__":
    sys.exit(harness.unittest.main())
