#!/usr/bin/python3
"""bight attach, list, show, set, switch, resize, detach, stats: as people use them, and when things die."""
import concurrent.futures
import contextlib
import glob
import importlib.util
import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import unittest
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import raw
from attached import Attached, Load, SwitchLoad, alive, qemu_io
from harness import K, M

NOBODY = 65534


class Devices:
    """Attaching and detaching, as root and as nobody in particular."""

    def test_a_device_is_printed_listed_shown_and_detached(self):
        image = self.image(size=8 * M)
        os.chmod(image, 0o666)
        uri = self.attach(image, "--nbd", f"unix:{self.sock('sock')}")
        self.assertRegex(uri, r"^nbd\+unix:///\?socket=/.*/socks/sock$")
        self.assertEqual(list(self.list()), ["disk"])
        shown = self.show("disk")
        self.assertEqual((shown["name"], shown["state"], shown["image"], shown["size_bytes"], shown["device"]),
                         ("disk", "running", image, 8 * M, uri))
        for text in ("disk", uri, image):
            self.assertEqual(self.show(text)["name"], "disk")
        table = self.bight("list")
        self.assertRegex(table, r"(?m)^NAME +STATE +SIZE +DEVICE +IMAGE *$")
        self.assertRegex(table, rf"(?m)^disk +running +8 MiB +{re.escape(uri)} +{re.escape(image)}$")
        qemu_io(uri, "write -P 7 0 1M", "flush", "read -P 7 0 1M")
        self.bight("detach", uri)
        self.assertEqual(self.list(), {})
        self.assertEqual(os.listdir(self.run_dir), [])
        self.assertEqual(harness.read_file(image)[:M], b"\7" * M)
        harness.wait_until(lambda: not alive(shown["pid"]) and not alive(shown["worker_pid"]), "the end of both")

    def test_without_a_transport_one_is_chosen(self):
        image = self.image(harness.pattern(64 * K))
        os.chmod(image, 0o666)
        device = self.attach(image)
        shown = self.show("disk")
        self.assertEqual(shown["device"], device)
        if device.startswith("nbd"):
            qemu_io(device, "read 0 64k")
        else:
            self.assertEqual(harness.read_file(device), harness.pattern(64 * K))

    def test_json_is_what_show_says(self):
        image = self.image(size=M)
        os.chmod(image, 0o666)
        told = json.loads(self.attach(image, "--json", "--nbd", f"unix:{self.sock('sock')}"))
        self.assertEqual((told["name"], told["device"], told["transports"][0]["uri"]),
                         ("disk", self.show("disk")["device"], self.show("disk")["device"]))
        self.assertTrue(alive(told["pid"]))

    def test_names_are_chosen_and_stay(self):
        paths = []
        for folder in ("a", "b", "c"):
            os.mkdir(self.path(folder))
            os.chmod(self.path(folder), 0o777)
            paths.append(harness.write_file(self.path(f"{folder}/disk.img"), size=M))
            os.chmod(paths[-1], 0o666)
            self.attach(paths[-1], "--nbd", f"unix:{self.sock(folder)}")
        self.assertEqual({name: shown["image"] for name, shown in self.list().items()},
                         dict(zip(("disk", "disk-2", "disk-3"), paths)))
        self.bight("detach", "disk-2")
        self.assertEqual(list(self.list()), ["disk", "disk-3"])
        self.attach(paths[1], "--nbd", f"unix:{self.sock('b')}")
        self.assertEqual(self.show("disk-2")["image"], paths[1])

    def test_a_name_that_is_taken_is_refused(self):
        images = [self.image(size=M, name=name) for name in ("a.img", "b.img")]
        for image in images:
            os.chmod(image, 0o666)
        self.attach(images[0], "--name", "x", "--nbd", f"unix:{self.sock('a')}")
        self.attach(images[1], "--name", "x", "--nbd", f"unix:{self.sock('b')}", status=1)
        self.assertRegex(self.stderr, r"^bight: x: is attached already; .*bight detach x\n$")
        for name in ("", ".x", "-x", "a/b", "..", "x" * 65, "ä"):
            self.attach(images[1], f"--name={name}", status=2)


class Root(Devices, Attached):
    """As whoever runs the tests."""


@unittest.skipIf(os.geteuid(), "needs root to become another user")
class OtherUser(Devices, Attached):
    """Without privileges."""

    uid = NOBODY

    def test_devices_are_in_the_runtime_directory(self):
        image = self.image(size=M)
        os.chmod(image, 0o666)
        runtime = self.path("runtime")
        os.mkdir(runtime)
        os.chown(runtime, NOBODY, NOBODY)
        env = {key: value for key, value in os.environ.items() if key != "BIGHT_RUN_DIR"} | {"XDG_RUNTIME_DIR": runtime}
        for command in (("attach", image, "--nbd", f"unix:{runtime}/sock"), ("list",), ("detach", "disk")):
            done = harness.run(*self.as_user(), harness.BIGHT, *command, env=env)
            if command[0] != "detach":
                self.assertIn("disk", done.stdout + str(os.listdir(f"{runtime}/bight")))
        self.assertEqual(os.listdir(f"{runtime}/bight"), [])

    def test_somebody_elses_device_is_not_asked(self):
        """root may, the owner may, nobody else."""
        image = self.image(size=M)
        os.chmod(image, 0o666)
        self.attach(image, "--nbd", f"unix:{self.sock('sock')}")
        path = os.path.join(self.run_dir, "disk")
        os.chmod(path, 0o755)
        os.chmod(os.path.join(path, "control"), 0o777)  # whatever the modes say
        command = [harness.BIGHT, "show", "disk"]
        self.assertIn("running", harness.run(*command, env=self.env()).stdout)
        other = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        self.assertNotIn("running", harness.run(*other, *command, env=self.env(), status=None).stdout)


class Images(Attached):
    def nbd(self, name="sock"):
        return ("--nbd", f"unix:{self.sock(name)}")

    def test_a_second_attach_for_writing_is_refused_and_names_the_first(self):
        image = self.image(size=M)
        self.attach(image, "--name", "first", *self.nbd())
        for args in ((), ("--read-only",)):
            self.attach(image, *args, *self.nbd("other"), status=1)
            self.assertRegex(self.stderr, rf"^bight: {re.escape(image)}: bight:first \(process \d+\) has it open for writing")
        self.assertEqual(list(self.list()), ["first"])
        self.kill_worker("first")
        self.attach(image, *self.nbd("other"), status=1)
        self.assertIn("bight:first", self.stderr)

    def test_readers_share(self):
        image = self.image(size=M)
        self.attach(image, "--read-only", *self.nbd("a"))
        self.attach(image, "--read-only", *self.nbd("b"))
        self.attach(image, *self.nbd("c"), status=1)
        self.assertEqual(sorted(self.list()), ["disk", "disk-2"])

    @harness.need("qemu-storage-daemon")
    def test_qemu_and_we_refuse_each_other(self):
        image = self.image(size=M)
        pid = self.path("pid")
        args = ("--blockdev", f"file,node-name=f,filename={image}", "--blockdev", "raw,node-name=r,file=f",
                "--nbd-server", f"addr.type=unix,addr.path={self.path('qsd')}",
                "--export", "nbd,id=e,node-name=r,writable=on")
        qemu = subprocess.Popen(["qemu-storage-daemon", *args, "--pidfile", pid], stderr=subprocess.PIPE,
                                preexec_fn=harness.die_with_parent)
        self.addCleanup(qemu.wait)
        self.addCleanup(qemu.kill)
        harness.wait_until(lambda: os.path.exists(pid), "qemu-storage-daemon")
        self.attach(image, *self.nbd(), status=1)
        self.assertRegex(self.stderr, rf"qemu-storage-d\w* \(process {qemu.pid}\) has it open")
        qemu.kill()
        qemu.wait()
        self.attach(image, *self.nbd())
        self.assertIn("lock", harness.run("qemu-storage-daemon", *args, status=1).stderr)

    def test_what_cannot_be_attached_says_why_and_leaves_nothing(self):
        image = self.image(size=M)
        os.symlink("round", self.path("round"))
        for args, text in (((self.path("none"),), "create it first"), ((self.dir,), "directory"),
                           ((self.path("round"),), "symbolic links; name a file that you can reach"),
                           ((image, "--io", "x"), "--io: x"), ((image, "--offset", "2M"), "--offset"),
                           ((image, image), "one IMAGE"), ((image, "--nbd", "x"), "--nbd: x"),
                           ((image, "--nbd", "unix:/no/such/dir/sock"), "/no/such/dir"),
                           ((image, *self.nbd(), "--metrics", "nothing"), "--metrics: nothing")):
            with self.subTest(args):
                done = harness.run(harness.BIGHT, "attach", *args, env=self.env(), status=None)
                self.assertIn(done.returncode, (1, 2))
                self.assertEqual(done.stdout, "")
                self.assertRegex(done.stderr, rf"^bight: [^\n]*{re.escape(text)}[^\n]*\n$")
                self.assertEqual(os.listdir(self.run_dir), [])

    def test_tables_have_a_line_a_device_whatever_its_image_is_called(self):
        """Nor does a name command the terminal."""
        self.attach(self.image(size=M, name="a\n\x1b[2J\"ü.img"), *self.nbd("sock"))
        self.assertRegex(self.bight("list"), r'^NAME .*\n.*/a\?\?\[2J"ü\.img$')
        name = next(iter(self.list()))
        self.assertIn('/a??[2J"ü.img\n', self.bight("show", name))
        self.assertTrue(self.show(name)["image"].endswith('/a\n\x1b[2J"ü.img'))

    def test_an_image_may_be_called_by_bytes_that_are_no_text(self):
        """JSON is text all the same."""
        image = os.fsencode(self.dir) + b"/a\xff\xc3.img"
        with open(image, "wb") as file:
            file.truncate(M)
        other = os.fsencode(self.dir) + b"/other\xff.img"
        with open(other, "wb") as file:
            file.truncate(M)
        self.assertEqual(json.loads(self.attach("--json", os.fsdecode(image), *self.nbd()))["name"], "a__")
        self.assertEqual(self.list()["a__"]["state"], "running")
        self.assertEqual(self.show("a__")["image"], self.path("a??.img"))
        self.assertEqual(self.show(os.fsdecode(image))["name"], "a__")
        self.bight("switch", os.fsdecode(image), os.fsdecode(other))
        self.assertEqual(self.show("a__")["image"], self.path("other?.img"))
        self.bight("detach", os.fsdecode(other))

    @harness.need_root
    def test_a_run_directory_without_room_is_refused_and_left_empty(self):
        """For what is remembered; for the control socket."""
        full = self.path("full")
        os.mkdir(full)
        for room in ("size=4k", "nr_inodes=4"):
            harness.run("mount", "-t", "tmpfs", "-o", room, "none", full)
            self.addCleanup(harness.run, "umount", full)
            harness.write_file(os.path.join(full, "fill"), bytes(4 * K))
            done = harness.run(harness.BIGHT, "attach", self.image(size=M), *self.nbd(), status=1,
                               env=self.env() | {"BIGHT_RUN_DIR": full})
            self.assertRegex(done.stderr, f"^bight: {full}/.*: No space left on device; make room, or set BIGHT_RUN_DIR\n$")
            self.assertEqual(os.listdir(full), ["fill"])

    def test_the_caller_may_have_no_standard_files(self):
        command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", harness.BIGHT, "attach", self.image(size=M), *self.nbd()]
        harness.run(*command, env=self.env())
        self.assertEqual(self.list()["disk"]["state"], "running")

    def test_what_cannot_be_printed_is_an_error(self):
        self.attach(self.image(size=M), *self.nbd())
        with open("/dev/full", "wb") as full:
            for command in (("list",), ("show", "disk"), ("stats", "--json", "disk")):
                done = harness.run(harness.BIGHT, *command, status=1, env=self.env(), stdout=full)
                self.assertEqual(done.stderr, "bight: standard output: No space left on device; "
                                              "what was to be printed is lost\n")

    def test_what_the_caller_has_open_is_not_kept_open(self):
        ours, theirs = os.pipe()
        command = [harness.BIGHT, "attach", self.image(size=M), *self.nbd()]
        subprocess.run(command, env=self.env(), pass_fds=(theirs,), stdout=subprocess.DEVNULL, check=True)
        os.close(theirs)
        self.assertEqual(os.read(ours, 1), b"")  # its end, and no wait for the device's
        os.close(ours)

    def test_directories_of_others_are_neither_devices_nor_cleaned_up(self):
        theirs = os.path.join(self.run_dir, "theirs")
        os.mkdir(theirs)
        harness.write_file(os.path.join(theirs, "state"), b"precious")
        self.assertEqual(self.list(), {})
        self.bight("detach", "--all", "--force")
        self.bight("detach", "--force", "theirs", status=None)
        self.assertEqual(harness.read_file(os.path.join(theirs, "state")), b"precious")
        os.unlink(os.path.join(theirs, "state"))
        os.rmdir(theirs)

    def test_many_at_once(self):
        count = 20 if harness.QUICK or harness.sanitized() else 500 if os.environ.get("BIGHT_TEST_LONG") == "1" else 40
        images = [self.image(size=M, name="disk.img" if i == 0 else f"{i}-disk.img") for i in range(count)]
        for i, image in enumerate(images):  # the same name for all
            os.mkdir(self.path(str(i)))
            os.rename(image, self.path(f"{i}/disk.img"))
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            jobs = [pool.submit(harness.run, harness.BIGHT, "attach", self.path(f"{i}/disk.img"), "--queues", "1",
                                *self.nbd(str(i)), env=self.env()) for i in range(count)]
            self.assertEqual(len({job.result().stdout for job in jobs}), count)
        self.assertEqual(sorted(self.list()), sorted(["disk", *(f"disk-{i}" for i in range(2, count + 1))]))
        self.assertEqual({device["state"] for device in self.list().values()}, {"running"})


class Changes(Attached):
    SIZE = 32 * M

    def setUp(self):
        super().setUp()
        self.disk = self.image(size=self.SIZE)
        self.uri = self.attach(self.disk, "--nbd", f"unix:{self.sock('sock')}")

    def test_settings(self):
        self.bight("set", "disk", "readonly=on", "io=buffered")
        self.assertEqual([self.show("disk")[key] for key in ("read_only", "io")], [True, "buffered"])
        qemu_io(self.uri, "write 0 4k", status=1)
        self.bight("set", "disk", "readonly=off", "io=direct")
        qemu_io(self.uri, "write -P 3 0 4k", "read -P 3 0 4k")

    def test_wrong_settings_are_refused_as_a_whole(self):
        for args in (("x=1",), ("readonly=maybe",), ("io=buffered", "depth=3"), ("io=null",), ("map=circular",),
                     ("nothing",), ()):
            with self.subTest(args):
                self.bight("set", "disk", *args, status=2)
                self.assertRegex(self.stderr, r"^bight: [^\n]+; [^\n]+\n$")
        for setting in ("io=fault:nonsense", "io=fault", "map=fastfs"):  # what only opening it can tell
            self.bight("set", "disk", "readonly=on", setting, status=None)
            if not self.stderr:  # it can be had here
                self.bight("set", "disk", "readonly=off", "io=direct", "map=linear")
        shown = self.show("disk")
        self.assertEqual([shown[key] for key in ("io", "map", "read_only", "restarts")], ["direct", "linear", False, 0])

    @harness.need("fio")
    def test_changes_under_load_show_no_error(self):
        other = self.image(size=self.SIZE, name="other.img")
        with Load(self.uri, "1m", extra=("--offset=16m",)):
            for _ in range(harness.rounds(6)):
                for io in ("buffered", "direct"):
                    self.bight("set", "disk", f"io={io}")
                os.truncate(self.disk, 2 * self.SIZE)
                self.assertEqual(self.bight("resize", "disk"), str(2 * self.SIZE))
                os.truncate(self.disk, self.SIZE)
                self.assertEqual(self.bight("resize", "disk"), str(self.SIZE))
        # The load verifies what it has written: the images have to be the same where it does.
        with Load(self.uri, "1m", extra=("--do_verify=0", "--verify=0")):
            for _ in range(harness.rounds(6)):
                self.bight("switch", "disk", other)
                self.bight("switch", "disk", self.disk)
        self.assertEqual(self.show("disk")["image"], self.disk)

    def test_write_back_is_turned_on_and_off_while_clients_write(self):
        self.assertNotIn("writeback_bytes", self.show("disk"))
        stop, wrong = threading.Event(), []

        def write():
            with raw.connect(self.sock("sock"), "extended") as client:
                number = 0
                while not stop.is_set():
                    number += 1
                    at = number * 7919 % 1000 * 4 * K
                    data = harness.pattern(4 * K, number % 251)
                    client.write(at, data)
                    if client.read(at, 4 * K) != data:
                        wrong.append(at)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(harness.rounds(8)):
            self.bight("set", "disk", "writeback=1M")
            self.assertEqual(self.show("disk")["writeback_bytes"], M)
            self.bight("set", "disk", "writeback=off")
            self.assertNotIn("writeback_bytes", self.show("disk"))
        self.bight("set", "disk", "writeback=on")
        stop.set()
        writer.join()
        self.assertEqual(wrong, [])
        with raw.connect(self.sock("sock"), "extended") as client:
            client.write(M, harness.pattern(64 * K))
            shown = self.show("disk")
            self.assertGreaterEqual(shown["writeback_dirty_bytes"], 64 * K)
            self.assertEqual(shown["writeback_failed_bytes"], 0)
            self.bight("set", "disk", "writeback=off")  # brings it below
            self.assertEqual(harness.read_file(self.disk)[M:M + 64 * K], harness.pattern(64 * K))

    def test_switches_under_load_tear_nothing(self):
        images = {letter: self.image(SwitchLoad.contents(letter), SwitchLoad.SIZE, f"{letter}.img") for letter in "AB"}
        for io in ("direct", "buffered"):
            for path in images.values():
                harness.write_file(path, SwitchLoad.contents(path[-5]), SwitchLoad.SIZE)
            name = f"switched-{io}"
            self.attach(images["A"], "--io", io, "--name", name, "--nbd", f"unix:{self.sock(name)}")
            load = SwitchLoad(lambda: raw.connect(self.sock(name), "structured", "", False))
            load.run(lambda letter: self.bight("switch", name, images[letter]), "AB", harness.rounds(5))
            self.bight("detach", "--force", name)
            load.check({letter: harness.read_file(path) for letter, path in images.items()})

    def test_a_switch_survives_the_worker(self):
        other = self.image(size=self.SIZE, name="other.img")
        qemu_io(self.uri, "write -P 1 0 64k", "flush")
        self.bight("switch", "disk", other)
        self.bight("set", "disk", "io=buffered")
        qemu_io(self.uri, "write -P 2 0 64k", "flush")
        self.kill_worker("disk")
        shown = self.show("disk")
        self.assertEqual((shown["image"], shown["io"]), (other, "buffered"))
        qemu_io(self.uri, "read -P 2 0 64k")
        self.assertEqual(harness.read_file(self.disk)[:64 * K], b"\1" * 64 * K)
        self.attach(other, status=1)  # it is locked by who came after
        self.attach(self.disk, "--nbd", f"unix:{self.sock('again')}")  # and the first is free

    def test_switches_that_cannot_be(self):
        small = self.image(size=M, name="small.img")
        taken = self.image(size=self.SIZE, name="taken.img")
        self.attach(taken, "--nbd", f"unix:{self.sock('taken')}")
        for image, text in ((small, "sizes have to match"), (taken, "bight:taken"), (self.path("none"), "No such file")):
            self.bight("switch", "disk", image, status=1)
            self.assertIn(text, self.stderr)
        self.bight("switch", "disk", self.disk)  # which is there: nothing to do
        os.truncate(self.disk, 2 * self.SIZE)
        self.bight("switch", "disk", self.disk, status=1)
        self.assertIn("another size; use bight resize", self.stderr)
        os.truncate(self.disk, self.SIZE)
        qemu_io(self.uri, "write -P 5 0 64k", "read -P 5 0 64k")
        self.assertEqual(harness.read_file(self.disk)[:64 * K], b"\5" * 64 * K)

    def test_a_new_size_is_for_new_connections_and_requests_beyond_it_fail(self):
        os.truncate(self.disk, M)
        self.assertEqual(self.bight("resize", "disk"), str(M))
        self.assertEqual(self.show("disk")["size_bytes"], M)
        qemu_io(self.uri, "read 2M 4k", status=1)
        os.truncate(self.disk, 64 * M)
        self.bight("resize", "disk")
        qemu_io(self.uri, "write -P 9 63M 1M", "read -P 9 63M 1M")

    def test_a_resize_brings_what_is_dirty_below(self):
        self.bight("set", "disk", "writeback=on")
        with raw.connect(self.sock("sock"), "extended") as client:
            client.write(M + 5, harness.pattern(64 * K))
            os.truncate(self.disk, 2 * self.SIZE)
            self.bight("resize", "disk")
            self.assertEqual(harness.read_file(self.disk)[M + 5:M + 5 + 64 * K], harness.pattern(64 * K))
        with raw.connect(self.sock("sock"), "extended") as client:
            client.write(2 * self.SIZE - 4 * K, b"e" * 4 * K)
            client.flush()
            self.assertEqual(harness.read_file(self.disk)[-4 * K:], b"e" * 4 * K)

    def test_stats(self):
        qemu_io(self.uri, "write 0 1M", "read 0 64k", "flush")
        stats = json.loads(self.bight("stats", "--json", "disk"))
        self.assertGreaterEqual(stats["ops"]["write"]["bytes"], M)
        self.assertGreater(stats["ops"]["read"]["latency_ns"]["p99"], 0)
        self.assertRegex(self.bight("stats", "disk"), r"(?m)^write +\d+ +1\.0 +0 ")
        self.check_openmetrics(self.bight("stats", "--openmetrics", "disk"))
        watch = subprocess.Popen([harness.BIGHT, "stats", "--watch", "disk"], env=self.env(), text=True,
                                 stdout=subprocess.PIPE, preexec_fn=harness.die_with_parent)
        self.assertRegex(watch.stdout.readline(), r"^\d+ in flight$")
        self.assertRegex(watch.stdout.readline(), r"IOPS")
        watch.kill()
        watch.wait()
        watch.stdout.close()

    def test_latencies_that_are_watched_are_of_the_second(self):
        """Not of all that came before."""
        qemu_io(self.uri, *["write 0 4k"] * 100)
        self.bight("set", "disk", "io=fault:write.delay=1:100")
        watch = subprocess.Popen([harness.BIGHT, "stats", "--watch", "disk"], env=self.env(), text=True,
                                 stdout=subprocess.PIPE, preexec_fn=harness.die_with_parent)
        try:
            qemu_io(self.uri, *["write 0 4k"] * 10)
            for line in watch.stdout:
                if re.match(r"write +[1-9]", line):
                    break
            self.assertGreaterEqual(float(line.split()[4]), 100_000)
        finally:
            watch.kill()
            watch.wait()
            watch.stdout.close()

    def check_openmetrics(self, text):
        self.assertTrue(text.rstrip().endswith("# EOF"))
        types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M))
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            name, labels = re.match(r'^(\w+)\{((?:\w+="[^"]*",?)+)\} [0-9.e+-]+$', line).groups()
            family = re.sub(r"_(total|bucket|count|sum)$", "", name)
            self.assertTrue(family in types or name in types, line)
            self.assertIn('device="disk"', labels)
        counts = re.findall(r'bight_latency_seconds_bucket\{device="disk",op="write",le="([^"]+)"\} (\d+)', text)
        self.assertEqual([int(n) for _, n in counts], sorted(int(n) for _, n in counts))
        self.assertEqual(counts[-1][0], "+Inf")
        if importlib.util.find_spec("prometheus_client"):
            from prometheus_client.openmetrics.parser import text_string_to_metric_families
            self.assertEqual({metric.name for metric in text_string_to_metric_families(text)}, set(types))

    def test_metrics_by_http(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        image = self.image(size=M, name="m.img")
        self.attach(image, "--name", "disk2", "--metrics", f"127.0.0.1:{port}", "--nbd", f"unix:{self.sock('m')}")
        for _ in range(2):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=harness.PATIENCE) as answer:
                self.assertIn("openmetrics-text", answer.headers["Content-Type"])
                self.check_openmetrics(answer.read().decode().replace("disk2", "disk"))
            self.kill_worker("disk2")  # the port stays
        with self.assertRaises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=harness.PATIENCE)

    def test_only_metrics_need_the_http_library(self):
        with open(self.path("libmicrohttpd.so.12"), "wb"):
            pass
        args = ("attach", self.image(size=M, name="m.img"), "--nbd", f"unix:{self.sock('m')}")
        env = {**self.env(), "LD_LIBRARY_PATH": self.dir}
        done = harness.run(harness.BIGHT, *args, "--metrics", "127.0.0.1:0", env=env, status=1)
        self.assertRegex(done.stderr, r"^bight: --metrics: [^\n]*libmicrohttpd.so.12[^\n]*install it[^\n]*\n$")
        harness.run(harness.BIGHT, *args, env=env)


class Users(Attached):
    def test_detach_while_in_use_names_who(self):
        image = self.image(size=M)
        self.attach(image, "--nbd", f"unix:{self.sock('sock')}")
        with harness.raw.connect(self.sock('sock'), "structured", "", False) as client:
            self.bight("detach", "disk", status=1)
            self.assertRegex(self.stderr, rf"^bight: disk: 1 NBD client is connected \(process {os.getpid()}\); ")
            client.read(0, 4096)
            self.bight("detach", "--lazy", "disk")
            self.assertEqual(self.show("disk")["state"], "detaching")
            client.read(0, 4096)
        harness.wait_until(lambda: not os.listdir(self.run_dir), "the lazy detach")

    @harness.need_root
    def test_detach_of_a_file_that_is_open_names_who(self):
        image, path = self.image(size=M), self.path("device")
        self.attach(image, "--fuse", path)
        with open(path, "rb") as file:
            self.bight("detach", "disk", status=1)
            self.assertRegex(self.stderr, rf"^bight: disk: {path}: opened by .* \({os.getpid()}\); ")
            self.assertEqual(file.read(10), bytes(10))
        self.bight("detach", "disk")
        self.assertFalse(os.path.exists(path))

    def test_detach_with_data_that_cannot_be_written_says_how_much(self):
        image = self.image(size=M)
        self.attach(image, "--nbd", f"unix:{self.sock('sock')}", "--writeback", "--io", "fault:write.error=1:ENOSPC")
        with harness.raw.connect(self.sock("sock"), "structured", "", False) as client:
            client.write(64 * K, bytes(8 * K))
        harness.wait_until(lambda: self.bight("detach", "disk", status=1) or "connected" not in self.stderr,
                           "the end of the client")
        self.assertRegex(self.stderr, r"^bight: disk: 8192 bytes cannot be written to its image: No space left")
        self.assertEqual(self.show("disk")["state"], "running")
        self.bight("detach", "--force", "disk", status=1)
        self.assertRegex(self.stderr, r"^bight: disk: what was written last may be lost; see the log\n$")
        self.assertEqual(self.list(), {})

    def test_detach_by_force(self):
        image = self.image(size=M)
        self.attach(image, "--nbd", f"unix:{self.sock('sock')}")
        with harness.raw.connect(self.sock('sock'), "structured", "", False):
            self.bight("detach", "--force", "disk")
        self.assertEqual(self.list(), {})

    def test_detach_of_what_is_not_there(self):
        self.bight("detach", "disk", status=1)
        self.assertRegex(self.stderr, r"^bight: disk: no attached device, image or name; see bight list\n$")
        self.bight("detach", status=2)
        self.bight("detach", "--all", "disk", status=2)
        self.bight("detach", "--all")


class Deaths(Attached):
    def setUp(self):
        super().setUp()
        self.disk = self.image(size=16 * M)
        self.uri = self.attach(self.disk, "--nbd", f"unix:{self.sock('sock')}")

    def test_what_was_flushed_outlives_the_worker(self):
        for number in range(4):
            qemu_io(self.uri, f"write -P {number + 1} {number}M 1M", "flush")
            self.kill_worker("disk")
            for before in range(number + 1):
                qemu_io(self.uri, f"read -P {before + 1} {before}M 1M")
        shown = self.show("disk")
        self.assertEqual(shown["restarts"], 4)
        self.assertIn("SIGKILL", shown["reason"])

    def test_what_was_flushed_outlives_the_worker_under_write_back(self):
        self.bight("set", "disk", "writeback=on")
        lost = {bytes(4 * K)}
        for number in range(3):
            with raw.connect(self.sock("sock"), "extended") as client:
                client.write(number * M + 5, harness.pattern(64 * K, number))
                client.flush()
                lost.add(bytes([number + 1]) * 4 * K)
                client.write(8 * M, bytes([number + 1]) * 4 * K)  # not flushed: it may be there
            self.kill_worker("disk")
            with raw.connect(self.sock("sock"), "extended") as client:
                for before in range(number + 1):
                    self.assertEqual(client.read(before * M + 5, 64 * K), harness.pattern(64 * K, before))
                self.assertIn(client.read(8 * M, 4 * K), lost)
        self.assertEqual(self.show("disk")["writeback_bytes"], 64 * M)

    def test_a_worker_that_dies_again_and_again_is_given_up(self):
        for _ in range(4):
            self.kill_worker("disk")
        os.kill(self.show("disk")["worker_pid"], signal.SIGKILL)
        harness.wait_until(lambda: self.list()["disk"]["state"] == "failed", "giving up")
        self.assertRegex(self.list()["disk"]["reason"], r"SIGKILL.*5th time")
        self.assertIn("5th time", self.bight("list"))
        self.bight("stats", "disk", status=1)
        self.assertIn("failed", self.stderr)
        self.bight("detach", "disk")
        self.assertEqual(os.listdir(self.run_dir), [])

    def test_the_device_outlives_the_supervisor(self):
        shown = self.show("disk")
        self.kill(shown["pid"])
        qemu_io(self.uri, "write -P 4 0 64k", "flush", "read -P 4 0 64k")
        self.assertEqual(self.show("disk")["state"], "unsupervised")
        self.bight("detach", "disk")
        self.assertEqual(os.listdir(self.run_dir), [])
        harness.wait_until(lambda: not alive(shown["worker_pid"]), "the end of the worker")

    def test_both_are_killed(self):
        shown = self.show("disk")
        self.kill(shown["pid"], shown["worker_pid"])
        harness.wait_until(lambda: self.list()["disk"]["state"] == "dead", "a dead device")
        self.assertEqual(self.list()["disk"]["image"], self.disk)
        self.bight("set", "disk", "readonly=on", status=1)
        self.assertIn("bight detach disk cleans up", self.stderr)
        self.bight("detach", "disk")
        self.assertEqual(os.listdir(self.run_dir), [])
        self.attach(self.disk, "--nbd", f"unix:{self.sock('sock')}")

    def test_a_stopped_worker_is_listed_and_keeps_the_others_waiting_no_longer_than_that(self):
        os.kill(self.show("disk")["worker_pid"], signal.SIGSTOP)
        try:
            self.attach(self.image(size=M, name="other.img"), "--nbd", f"unix:{self.sock('other')}")
            listed = self.list()
        finally:
            self.kill(json.loads(harness.read_file(os.path.join(self.run_dir, "disk", "state")))["worker_pid"])
        self.assertEqual((listed["disk"]["state"], listed["disk"]["image"]), ("silent", self.disk))
        self.assertEqual(listed["other"]["state"], "running")
        harness.wait_until(lambda: self.show("disk")["state"] == "running", "another worker")

    def test_force_kills_who_does_not_answer(self):
        """A worker; a worker and its supervisor; a worker without one; a supervisor."""
        cases = {"a": (("worker_pid",), ()), "b": (("pid", "worker_pid"), ()), "c": (("worker_pid",), ("pid",)),
                 "d": (("pid",), ())}
        for name, (stopped, killed) in cases.items():
            self.attach(self.image(size=M, name=name), "--nbd", f"unix:{self.sock(name)}")
            shown = self.show(name)
            for key in stopped:
                os.kill(shown[key], signal.SIGSTOP)
            self.kill(*[shown[key] for key in killed])
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for name, done in zip(cases, pool.map(lambda name: harness.run(harness.BIGHT, "detach", "--force", name,
                                                                           status=None, env=self.env()), cases)):
                self.assertEqual(done.stderr, f"bight: {name}: did not answer, and was killed; "
                                              "what was written last may be lost\n")
                self.assertEqual(done.returncode, 1)
        self.assertLess(time.monotonic() - begin, 60)
        self.assertEqual(os.listdir(self.run_dir) + os.listdir(self.path("socks")), ["disk", "sock"])

    def test_a_name_of_the_dead_is_free(self):
        image = self.image(size=M, name="x.img")
        self.attach(image, "--name", "x", "--nbd", f"unix:{self.sock('x')}")
        shown = self.show("x")
        self.kill(shown["pid"], shown["worker_pid"])
        self.attach(image, "--name", "x", "--nbd", f"unix:{self.sock('x')}")
        self.assertEqual(self.show("x")["state"], "running")

    def test_sigterm_ends_it_as_detach_does(self):
        for who in ("pid", "worker_pid"):
            image = self.image(size=M, name="t.img")
            self.attach(image, "--nbd", f"unix:{self.sock('t')}")
            shown = self.show("t")
            os.kill(shown[who], signal.SIGTERM)
            harness.wait_until(lambda: not os.path.exists(os.path.join(self.run_dir, "t")), f"the end by {who}")
            self.assertFalse(os.path.exists(self.sock('t')))

    @harness.need("fio")
    def test_flushed_writes_survive_twenty_deaths(self):
        """Each round writes and flushes a new pattern while another writer keeps the worker busy."""
        data = {}
        for number in range(20 if not harness.QUICK else 6):
            with harness.raw.connect(self.sock('sock'), "structured", "", False) as client:
                block = harness.pattern(256 * K, number)
                client.write(number % 8 * M, block)
                client.flush()
                data[number % 8] = block
                for at in range(64):
                    client.issue(harness.raw.WRITE, 12 * M + at * 4096, data=bytes(4096))
                self.kill_worker("disk")
            with harness.raw.connect(self.sock('sock'), "structured", "", False) as client:
                for at, block in data.items():
                    self.assertTrue(client.read(at * M, 256 * K) == block)
        self.assertEqual(self.show("disk")["restarts"], number + 1)

    @unittest.skipUnless(os.environ.get("BIGHT_TEST_LONG") == "1", "takes long; set BIGHT_TEST_LONG=1")
    def test_a_worker_that_dies_again_and_again_is_given_up_also_when_it_serves(self):
        def killed():
            with harness.raw.connect(self.sock('sock'), "structured", "", False) as client:
                client.read(0, 4096)
                worker = self.show_or_none("disk").get("worker_pid")
                if worker:
                    os.kill(worker, signal.SIGKILL)
                    harness.wait_until(lambda: not alive(worker), "the worker's end")

        deaths = 0
        while self.show_or_none("disk").get("state") != "failed":
            with contextlib.suppress(OSError, harness.raw.Closed):
                killed()
                deaths += 1
        self.assertIn("100th time in 60 seconds", self.show("disk")["reason"])
        self.assertEqual(deaths, 100)

    def test_counters_outlive_the_worker(self):
        qemu_io(self.uri, "write 0 1M", "flush")
        before = json.loads(self.bight("stats", "--json", "disk"))["ops"]["write"]
        self.kill_worker("disk")
        after = json.loads(self.bight("stats", "--json", "disk"))
        self.assertEqual(after["ops"]["write"], before)
        self.assertEqual(after["in_flight"], 0)


class Protocol(Attached):
    """The control socket gets what nobody should send."""

    def setUp(self):
        super().setUp()
        self.attach(self.image(size=M), "--nbd", f"unix:{self.sock('sock')}")
        self.control = os.path.join(self.run_dir, "disk", "control")

    def connect(self):
        client = self.enterContext(socket.socket(socket.AF_UNIX))
        client.settimeout(harness.PATIENCE)
        client.connect(self.control)
        return client

    def answer(self, data):
        client = self.connect()
        try:
            client.sendall(data)
            line = client.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        return json.loads(line) if line else None

    def test_malformed_requests_are_answered_or_closed(self):
        deep = b'{"bight":1,"verb":' + b"[" * 1000 + b"]" * 1000 + b"}\n"
        for data in (b"\n", b"{}\n", b"null\n", b"[]\n", b"1\n", b'"x"\n', b"{\n", b'{"bight":2,"verb":"show"}\n',
                     b'{"bight":1}\n', b'{"bight":1,"verb":3}\n', b'{"bight":1,"verb":null}\n',
                     b'{"bight":1,"verb":"nothing"}\n', b'{"bight":1,"verb":"show"}x\n', b"\0\0\0\n", b"\xff\xfe\n", deep,
                     b'{"bight":1,"verb":"set"}\n', b'{"bight":1,"verb":"set","settings":[]}\n',
                     b'{"bight":1,"verb":"set","settings":{"io":{"a":1}}}\n',
                     b'{"bight":1,"verb":"set","settings":{"io":null}}\n',
                     b'{"bight":1,"verb":"switch"}\n', b'{"bight":1,"verb":"switch","image":"relative"}\n',
                     b'{"bight":1,"verb":"switch","image":7}\n',
                     b'{"bight":1,"verb":"show' + b"x" * 100000 + b'"}\n', b"x" * 200000):
            with self.subTest(data[:60]):
                answer = self.answer(data)
                self.assertTrue(answer is None or (answer["ok"] is False and answer["error"]), answer)
        shown = self.show("disk")
        self.assertEqual((shown["io"], shown["restarts"]), ("direct", 0))

    def test_requests_in_pieces_and_in_a_row(self):
        client = self.connect()
        for byte in b'{"bight":1,"verb":"show"}\n':
            client.sendall(bytes([byte]))
        reader = client.makefile("rb")
        self.assertTrue(json.loads(reader.readline())["ok"])
        client.sendall(b'{"bight":1,"verb":"show"}\n' * 3)
        for _ in range(3):
            self.assertEqual(json.loads(reader.readline())["name"], "disk")

    def test_who_connects_and_says_nothing_keeps_nobody_out_for_ever(self):
        idle = [self.connect() for _ in range(100)]
        for client in idle[50:]:
            client.close()
        for client in idle[:50]:
            client.close()
        harness.wait_until(lambda: self.show_or_none("disk").get("state") == "running", "an answer")

    def test_the_directory_is_private(self):
        self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(self.control)).st_mode), 0o700)


class ServiceManager(Attached):
    """What systemd gives: NOTIFY_SOCKET, LISTEN_FDS, the foreground."""

    def notify_socket(self):
        notify = self.enterContext(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(self.path("notify"))
        notify.settimeout(harness.PATIENCE)
        return notify

    def test_foreground_tells_when_it_is_ready_and_ends_by_sigterm(self):
        notify, image = self.notify_socket(), self.image(size=M)
        process = subprocess.Popen([harness.BIGHT, "attach", "--foreground", "--name", "vm", image, "--nbd",
                                    f"unix:{self.sock('sock')}"], env=self.env() | {"NOTIFY_SOCKET": self.path("notify")},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=harness.die_with_parent)
        self.assertEqual(notify.recv(100), b"READY=1")
        self.assertEqual(self.show("vm")["pid"], process.pid)
        process.terminate()
        out, err = process.communicate(timeout=harness.PATIENCE)
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertRegex(out, r"^nbd\+unix:///\?socket=.*/socks/sock\n$")
        self.assertEqual(notify.recv(100), b"STOPPING=1")
        self.assertEqual(os.listdir(self.run_dir), [])

    def test_a_socket_that_is_passed(self):
        image, path = self.image(size=M), self.sock('activated')
        listener = self.enterContext(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        notify = self.notify_socket()

        def prepare():
            harness.die_with_parent()
            os.dup2(listener.fileno(), 3)
            os.set_inheritable(3, True)
            os.environ["LISTEN_PID"] = str(os.getpid())

        command = 'export LISTEN_PID=$$; exec "$@"'
        process = subprocess.Popen(["/bin/sh", "-c", command, "sh", harness.BIGHT, "attach", "--foreground", "--name", "vm",
                                    image], env=self.env() | {"LISTEN_FDS": "1", "NOTIFY_SOCKET": self.path("notify")},
                                   preexec_fn=prepare, close_fds=False, stdout=subprocess.DEVNULL)
        self.assertEqual(notify.recv(100), b"READY=1")
        uri = f"nbd+unix:///?socket={path}"
        qemu_io(uri, "write -P 6 0 64k", "read -P 6 0 64k")
        self.kill_worker("vm")
        qemu_io(uri, "read -P 6 0 64k")
        self.bight("detach", "vm")
        self.assertEqual(process.wait(harness.PATIENCE), 0)
        self.assertTrue(os.path.exists(path), "the socket is the service manager's")
        os.unlink(path)

    def test_sockets_that_were_passed_to_others_are_not_taken(self):
        harness.run(harness.BIGHT, "attach", "--name", "vm", self.image(size=M),
                    env=self.env() | {"LISTEN_FDS": "1", "LISTEN_PID": "1"})
        self.assertEqual(self.list()["vm"]["state"], "running")

    def test_a_start_that_fails_has_a_status(self):
        done = harness.run(harness.BIGHT, "attach", "--foreground", "--name", "vm", self.path("none"), env=self.env(),
                           status=1)
        self.assertRegex(done.stderr, r"^bight: .*No such file")

    def test_the_units_name_what_exists(self):
        with open(os.path.join(harness.ROOT, "systemd", "bight@.service.in")) as file:
            unit = file.read()
        for command in re.findall(r"^Exec\w+=@bindir@/bight (.*)$", unit, re.M):
            words = command.split()
            options = harness.run(harness.BIGHT, words[0], "--help").stdout
            for option in (word for word in words if word.startswith("--")):
                self.assertIn(option, options)
        self.assertIn("Type=notify", unit)


class Install(unittest.TestCase):
    """What meson install would put in place."""

    def test_everything_is_installed(self):
        build = os.environ.get("BIGHT_BUILD") or os.path.dirname(harness.BIGHT)
        if not os.path.exists(os.path.join(build, "meson-info")):
            self.skipTest("not in a build directory")
        installed = json.loads(harness.run("meson", "introspect", build, "--installed").stdout)
        names = {os.path.basename(path) for path in installed.values()}
        pages = {os.path.basename(path) for path in glob.glob(os.path.join(harness.ROOT, "man", "*.[1-8]"))}
        self.assertLessEqual(pages | {"bight", "bight@.service", "bight@.socket"}, names)


if __name__ == "__main__":
    unittest.main()
