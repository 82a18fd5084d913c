#!/usr/bin/python3
"""What a plain bight attach gives: a loop device on a FUSE file for root, the file for others; file systems on it."""
import contextlib
import glob
import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from attached import Attached, Load, SwitchLoad, alive, qemu_io
from harness import K, M

NOBODY = 65534


def loops_work():
    return os.access("/dev/fuse", os.W_OK) and os.access("/dev/loop-control", os.W_OK)


def digest(folder):
    """Of every file of a tree, by path."""
    sums = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                sums[os.path.relpath(path, folder)] = hashlib.sha256(harness.read_file(path)).hexdigest()
    return sums


def children(pid):
    """Of a process's main thread."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        return harness.read_file(f"/proc/{pid}/task/{pid}/children").decode().split()
    return []


def comm(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return harness.read_file(f"/proc/{pid}/comm").decode().strip()
    return None


def waits_for_answer(pid):
    """Whether one of its threads waits for who serves a FUSE file."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return any(harness.read_file(f"/proc/{pid}/task/{thread}/wchan") == b"request_wait_answer"
                   for thread in os.listdir(f"/proc/{pid}/task"))
    return False


class DirectFile:
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.memory = mmap.mmap(-1, 64 * K)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)

    def read(self, offset, length):
        got = os.preadv(self.fd, [memoryview(self.memory)[:length]], offset)
        return self.memory[:got]

    def write(self, offset, data):
        self.memory[:len(data)] = data
        os.pwritev(self.fd, [memoryview(self.memory)[:len(data)]], offset)


def churn(folder, count):
    """A load of metadata: makes, renames, links, truncates and removes."""
    for i in range(count):
        base = os.path.join(folder, f"d{i % 7}")
        os.makedirs(base, exist_ok=True)
        path = os.path.join(base, f"f{i}")
        harness.write_file(path, harness.pattern(i * 37 % 9000, i))
        if i % 3 == 0:
            os.rename(path, path + ".moved")
        elif i % 3 == 1:
            os.link(path, path + ".link")
        if i % 5 == 4:
            shutil.rmtree(os.path.join(folder, f"d{(i + 3) % 7}"), ignore_errors=True)


@unittest.skipUnless(os.geteuid() == 0 and loops_work(), "needs root, /dev/fuse and loop devices")
class Loop(Attached):
    def mounted(self, device, kind, options=""):
        return self.enterContext(harness.mounted(device, kind, options))

    def attach_loop(self, *args):
        device = self.attach(*args)
        if not device.startswith("/dev/loop"):
            self.skipTest(f"another kind of device is preferred here: {device}")
        return device

    def formatted(self, kind, size=320 * M):
        if not harness.have(harness.MKFS[kind][0]):
            self.skipTest(f"not installed: {harness.MKFS[kind][0]}")
        image = self.image(size=size)
        harness.run(*harness.MKFS[kind], image)
        return image

    def fsck(self, kind, image):
        harness.run(*{"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f"),
                      "btrfs": ("btrfs", "check")}[kind], image)

    def attach_passed(self, *args):
        device = self.attach("--passthrough", *args, status=None)
        if "this kernel's FUSE has none" in self.stderr:
            self.skipTest(self.stderr.strip())
        self.assertEqual(self.stderr, "")
        return device

    def check_filesystem(self, kind, attach=None):
        if f"\t{kind}\n" not in harness.read_file("/proc/filesystems").decode():
            self.skipTest(f"this kernel has no {kind}")
        image, tree = self.formatted(kind), self.path("tree")
        os.mkdir(tree)
        churn(tree, 120)
        device = (attach or self.attach_loop)(image)
        with harness.mounted(device, kind) as point:
            harness.run("tar", "-C", tree, "-cf", os.path.join(point, "tree.tar"), ".")
            os.mkdir(os.path.join(point, "copy"))
            harness.run("tar", "-C", os.path.join(point, "copy"), "-xf", os.path.join(point, "tree.tar"))
            churn(os.path.join(point), 200)
            expected = digest(point)
            self.bight("detach", "disk", status=1)
            self.assertIn(f"mounted on {point}", self.stderr)
        with harness.mounted(device, kind) as point:  # nothing of it is in a cache
            self.assertEqual(digest(point), expected)
            self.assertEqual(digest(os.path.join(point, "copy")), digest(tree))
        self.bight("detach", device)
        self.fsck(kind, image)

    def test_ext4(self):
        self.check_filesystem("ext4")

    def test_xfs(self):
        self.check_filesystem("xfs")

    def test_btrfs(self):
        self.check_filesystem("btrfs")

    def test_ext4_by_passthrough(self):
        self.check_filesystem("ext4", self.attach_passed)

    def test_xfs_by_passthrough(self):
        self.check_filesystem("xfs", self.attach_passed)

    def test_passthrough_needs_no_worker_to_read_and_write(self):
        """It is stopped meanwhile. Flushes wait for it; what others write by NBD is seen."""
        image = self.image(harness.pattern(2 * M))
        uri = self.attach_passed("--name", "disk", image, "--fuse", self.path("file"), "--nbd", f"unix:{self.sock('n')}")
        shown = self.show("disk")
        self.assertTrue(shown["passthrough"])
        with DirectFile(self.path("file")) as file:
            file.write(M, b"p" * 4 * K)  # before the first one the kernel asks whether there are capabilities to be removed
            self.addCleanup(os.kill, shown["worker_pid"], signal.SIGCONT)
            os.kill(shown["worker_pid"], signal.SIGSTOP)
            self.assertEqual(file.read(64 * K, 64 * K), harness.pattern(2 * M)[64 * K:128 * K])
            file.write(M + 4 * K, b"p" * 4 * K)
            self.assertEqual(harness.read_file(image)[M:M + 8 * K], b"p" * 8 * K)
            os.kill(shown["worker_pid"], signal.SIGCONT)
            os.fsync(file.fd)
            self.assertEqual(json.loads(self.bight("stats", "--json", "disk"))["ops"]["flush"]["done"], 1)
            qemu_io(uri, "read -P 0x70 1M 4k", "write -P 0x71 1M 512", "flush")
            self.assertEqual(file.read(M, 4 * K), b"q" * 512 + b"p" * (4 * K - 512))
        stats = json.loads(self.bight("stats", "--json", "disk"))["ops"]
        self.assertEqual(stats["write"]["done"], 1)

    def test_passthrough_outlives_workers(self):
        """The kernel takes only the number that it gave the first one, as long as the file is open."""
        image = self.formatted("ext4", 64 * M)
        device = self.attach_passed("--name", "disk", image)
        with harness.mounted(device, "ext4") as point:
            for number in range(harness.rounds(3)):
                harness.write_file(os.path.join(point, f"f{number}"), harness.pattern(M, number))
                self.kill_worker("disk")
                with DirectFile(os.path.join(self.run_dir, "disk/data")) as file:
                    self.assertEqual(len(file.read(0, 64 * K)), 64 * K)
                self.assertEqual(len(harness.read_file(os.path.join(self.run_dir, "disk/data"))), 64 * M)
            harness.run("sync", "-f", point)
        with harness.mounted(device, "ext4", "ro") as point:
            for number in range(harness.rounds(3)):
                self.assertTrue(harness.read_file(os.path.join(point, f"f{number}")) == harness.pattern(M, number))
        self.bight("detach", "disk")
        self.fsck("ext4", image)

    def test_passthrough_is_locked_as_long_as_somebody_can_write(self):
        """By force the device is gone, and the loop device goes at its last close: until then, two could write."""
        image = self.image(size=M)
        device = self.attach_passed(image)
        with DirectFile(device) as file:
            self.bight("detach", "--force", "disk")
            self.attach(image, status=1)
            self.assertIn("has it open", self.stderr)
            file.write(0, b"last" * K)
        harness.wait_until(lambda: self.bight("attach", image, status=None), "the end of the loop device")
        self.assertEqual(harness.read_file(image)[:4 * K], b"last" * K)

    def test_passthrough_resizes_and_changes_nothing_else(self):
        image, other = (self.image(size=M, name=name) for name in ("disk.img", "other.img"))
        device = self.attach_passed(image)
        os.truncate(image, 2 * M)
        self.bight("resize", "disk")
        self.assertEqual(harness.run("blockdev", "--getsize64", device).stdout.strip(), str(2 * M))
        for command in (("set", "disk", "readonly=on"), ("set", "disk", "io=buffered"), ("switch", "disk", other)):
            self.bight(*command, status=1)
            self.assertIn("--passthrough", self.stderr)
        with DirectFile(device) as file:
            file.write(2 * M - 4 * K, bytes(range(256)) * 16)
        self.assertEqual(harness.read_file(image)[2 * M - 4 * K:], bytes(range(256)) * 16)

    def test_passthrough_takes_blocks_of_the_image(self):
        with harness.filesystem("ext4", 64 * M, 4 * K) as folder:
            image = harness.write_file(os.path.join(folder, "disk.img"), size=4 * M)
            device = self.attach_passed(image)
            self.assertEqual(harness.run("blockdev", "--getss", device).stdout.strip(), str(4 * K))
            self.assertEqual(self.show("disk")["min_block_bytes"], 4 * K)  # to fill up less would undo what comes past us
            harness.run(*harness.MKFS["ext4"], device)
            self.bight("detach", "disk")
            self.attach("--passthrough", "--block-size", "512", image, status=2)
            self.assertIn("takes blocks of 4096 bytes", self.stderr)

    def test_passthrough_is_refused_where_something_would_be_missed(self):
        image = self.image(size=M)
        for options, said in ((("--io", "buffered"), "--io"), (("--map", "fastfs"), "--map"), (("--writeback",), "--writeback"),
                              (("--offset", "4K"), "--offset"), (("--size-limit", "4K"), "--size-limit"),
                              (("--nbd", f"unix:{self.sock('n')}"), "add --fuse")):
            with self.subTest(options):
                self.attach("--passthrough", *options, image, status=2)
                self.assertIn(said, self.stderr)
        with harness.scratch_dir("/dev/shm") as folder:
            self.attach("--passthrough", harness.write_file(os.path.join(folder, "disk.img"), size=M), status=2)
            self.assertIn("no direct I/O", self.stderr)
        self.assertEqual(os.listdir(self.run_dir), [])

    @harness.need("unshare", "mkswap", "swapon")
    def test_what_only_the_kernel_knows_of_is_not_detached(self):
        """A mount in another namespace; swap."""
        device = self.attach_loop(self.formatted("ext4", 64 * M))
        os.mkdir(self.path("point"))
        script = f"mount {device} {self.path('point')} && echo && exec sleep 1000"
        with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
                              stdout=subprocess.PIPE) as other:
            self.addCleanup(other.kill)
            self.assertEqual(other.stdout.read(1), b"\n")
            self.bight("detach", "disk", status=1)
            self.assertIn("in use", self.stderr)
            other.kill()
        harness.wait_until(lambda: not self.is_claimed(device), "the unmounting")
        self.bight("detach", "disk")
        other = self.attach_loop(self.image(size=16 * M, name="swap.img"))
        harness.run("mkswap", "-q", other, status=None)
        if harness.run("swapon", other, status=None).returncode == 0:
            self.addCleanup(harness.run, "swapoff", other, status=None)
            self.bight("detach", "swap", status=1)
            harness.run("swapoff", other)
        self.bight("detach", "swap")

    def is_claimed(self, device):
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError:
            return True
        return False

    @harness.need("genisoimage", "isoinfo")
    def test_iso(self):
        tree, image = self.path("tree"), self.path("cd.iso")
        os.mkdir(tree)
        harness.write_file(os.path.join(tree, "file"), harness.pattern(300 * K))
        harness.run("genisoimage", "-quiet", "-R", "-o", image, tree)
        os.chmod(image, 0o444)
        device = self.attach_loop(image, "--read-only", "--block-size", "2048")
        read = subprocess.run(["isoinfo", "-i", device, "-R", "-x", "/file"], stdout=subprocess.PIPE, check=True).stdout
        self.assertTrue(read == harness.pattern(300 * K))
        if "\tiso9660\n" in harness.read_file("/proc/filesystems").decode():
            with harness.mounted(device, "iso9660", "ro") as point:
                self.assertTrue(harness.read_file(os.path.join(point, "file")) == harness.pattern(300 * K))

    @harness.need("fio")
    def test_fio_verifies_on_the_device(self):
        device = self.attach_loop(self.image(size=64 * M))
        for depth in (1, 32):
            harness.run("fio", "--name=v", f"--filename={device}", "--ioengine=libaio", "--direct=1", "--rw=randrw",
                        "--bsrange=4k-64k", f"--iodepth={depth}", "--size=16m", "--verify=crc32c", "--verify_fatal=1",
                        "--verify_state_save=0")

    def test_one_worker_is_enough_to_attach_resize_and_switch(self):
        """It serves the very file that the kernel looks at meanwhile."""
        image = self.image(size=8 * M)
        device = self.attach_loop("--io", "buffered", "--workers", "1", image)
        os.truncate(image, 12 * M)
        self.bight("resize", "disk")
        self.assertEqual(harness.run("blockdev", "--getsize64", device).stdout.strip(), str(12 * M))
        with open(device, "r+b", buffering=0) as file:
            file.seek(11 * M)
            file.write(b"one" * 1024)
        self.bight("switch", "disk", self.image(name="other.img", size=12 * M))
        self.bight("detach", "disk")
        self.assertEqual(harness.read_file(image)[11 * M:11 * M + 3072], b"one" * 1024)

    def test_kills_of_the_worker_under_load_lose_nothing_that_was_flushed(self):
        """Twenty in a row, while fio writes and verifies."""
        image = self.formatted("ext4", 96 * M)
        device = self.attach_loop(image)
        with harness.mounted(device, "ext4") as point:
            flushed = {}
            with Load(f"{point}/load", "16m", kind="file"):
                self.wait_for_writes("disk")
                for number in range(4 if harness.QUICK else 20):
                    path = os.path.join(point, f"f{number}")
                    flushed[path] = harness.pattern(512 * K, number)
                    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
                    os.write(fd, flushed[path])
                    os.fsync(fd)
                    os.close(fd)
                    self.kill_worker("disk")
            self.assertEqual(self.show("disk")["restarts"], len(flushed))
            harness.run("umount", point)
            harness.run("mount", device, point)
            for path, data in flushed.items():
                self.assertTrue(harness.read_file(path) == data)
        self.bight("detach", "disk")
        self.fsck("ext4", image)

    def test_read_only(self):
        image = self.formatted("ext4", 64 * M)
        device = self.attach_loop(image, "--read-only")
        self.mounted_ro = self.enterContext(harness.mounted(device, "ext4", "ro"))
        self.assertIn("lost+found", os.listdir(self.mounted_ro))
        with self.assertRaises(OSError):
            os.write(os.open(device, os.O_RDWR), bytes(512))

    def partitions(self, device):
        """{number: (start, size)} in sectors, as the kernel has them."""
        found = {}
        for folder in glob.glob(f"/sys/block/{os.path.basename(device)}/*/partition"):
            number, start, size = (int(harness.read_file(os.path.join(os.path.dirname(folder), name)))
                                   for name in ("partition", "start", "size"))
            found[number] = (start, size)
        return found

    @harness.need("sfdisk", "mkfs.ext4")
    def test_partitions(self):
        """Also where the kernel knows no partition tables."""
        image, other = (self.image(size=64 * M, name=name) for name in ("disk.img", "other.img"))
        harness.run("sfdisk", "-q", image, input="label: gpt\n2048,65536\n,\n", stdin=None)
        harness.run("sfdisk", "-q", other, input="2048,20480\n,,E\n,16384\n,16384\n", stdin=None)
        device = self.attach_loop(image, "--partscan")
        self.assertEqual(self.partitions(device), {1: (2048, 65536), 2: (67584, 61440)})
        harness.wait_until(lambda: os.path.exists(f"{device}p1"), "its node")
        harness.run(*harness.MKFS["ext4"], f"{device}p1")
        with harness.mounted(f"{device}p1", "ext4") as point:
            harness.write_file(os.path.join(point, "file"), b"in a partition")
            self.bight("detach", "disk", status=1)
            self.assertIn(f"mounted on {point}", self.stderr)
        self.bight("switch", "disk", other)
        self.assertEqual(self.partitions(device),
                         {1: (2048, 20480), 2: (22528, 2), 5: (24576, 16384), 6: (43008, 16384)})
        self.bight("switch", "disk", image)
        self.kill_worker("disk")
        with harness.mounted(f"{device}p1", "ext4", "ro") as point:
            self.assertEqual(harness.read_file(os.path.join(point, "file")), b"in a partition")
            self.bight("switch", "disk", other)  # what is in use stays
            self.assertEqual(self.partitions(device)[1], (2048, 65536))
            self.bight("switch", "disk", image)
        self.bight("detach", "disk")
        self.assertEqual(self.partitions(device), {})
        self.attach_loop(self.image(size=M, name="blank.img"), "--partscan")  # no table: no partitions
        self.attach(self.image(size=M, name="x.img"), "--partscan", "--nbd", f"unix:{self.sock('x')}", status=2)

    def test_resize(self):
        image = self.formatted("xfs")
        device = self.attach_loop(image)
        with harness.mounted(device, "xfs") as point:
            os.truncate(image, 400 * M)
            self.assertEqual(self.bight("resize", "disk"), str(400 * M))
            self.assertEqual(harness.run("blockdev", "--getsize64", device).stdout.strip(), str(400 * M))
            harness.run("xfs_growfs", point)
            self.assertGreater(os.statvfs(point).f_blocks * os.statvfs(point).f_frsize, 320 * M)
        self.bight("detach", "disk")
        self.fsck("xfs", image)

    @harness.need("fio")
    def test_changes_under_load_show_no_error(self):
        image, other = (self.image(size=32 * M, name=name) for name in ("disk.img", "other.img"))
        device = self.attach_loop(image)
        with Load(device, "8m", kind="file"):
            self.wait_for_writes("disk")
            for _ in range(harness.rounds(3)):
                self.bight("set", "disk", "io=buffered")
                for size in (64 * M, 16 * M, 32 * M):
                    os.truncate(image, size)
                    self.bight("resize", "disk")
                self.bight("set", "disk", "io=direct")
        with Load(device, "8m", kind="file", extra=("--do_verify=0", "--verify=0")):
            for _ in range(harness.rounds(3)):
                self.wait_for_writes("disk")
                self.bight("switch", "disk", other)
                self.wait_for_writes("disk")
                self.bight("switch", "disk", image)
        self.assertEqual(self.show("disk")["restarts"], 0)

    def test_a_switch_shows_the_other_contents(self):
        first, second = (self.image(harness.pattern(M, seed), name=f"{seed}.img") for seed in (1, 2))
        device = self.attach_loop(first, "--name", "disk")
        self.assertTrue(harness.read_file(device) == harness.pattern(M, 1))
        self.bight("switch", "disk", second)
        self.assertTrue(harness.read_file(device) == harness.pattern(M, 2))

    def test_a_switch_to_itself_is_refused(self):
        device = self.attach_loop(self.formatted("ext4", 64 * M), "--name", "disk")
        with harness.mounted(device, "ext4") as point:
            inside = harness.write_file(os.path.join(point, "inside"), bytes(M))
            for image in (device, os.path.join(self.run_dir, "disk/data"), inside):
                with self.subTest(image):
                    self.bight("switch", "disk", image, status=1)
                    self.assertIn("is this device, or lies on it; name another image", self.stderr)
            self.assertEqual(harness.read_file(inside), bytes(M))

    def test_read_only_is_told_to_the_block_device(self):
        device = self.attach_loop(self.image(size=M), "--name", "disk")
        for value, told in (("on", "1"), ("off", "0")):
            self.bight("set", "disk", f"readonly={value}")
            self.assertEqual(harness.run("blockdev", "--getro", device).stdout.strip(), told)

    def test_switches_under_load_tear_nothing(self):
        images = {letter: self.image(SwitchLoad.contents(letter), SwitchLoad.SIZE, f"{letter}.img") for letter in "AB"}
        device = self.attach_loop(images["A"], "--name", "disk")
        load = SwitchLoad(lambda: DirectFile(device), SwitchLoad.WRITE)
        load.run(lambda letter: self.bight("switch", "disk", images[letter]), "AB", harness.rounds(5))
        self.bight("detach", "disk")
        load.check({letter: harness.read_file(path) for letter, path in images.items()})

    def test_lazy_detach_waits_for_the_unmount(self):
        device = self.attach_loop(self.formatted("ext4", 64 * M))
        with harness.mounted(device, "ext4") as point:
            self.bight("detach", "--lazy", "disk")
            harness.write_file(os.path.join(point, "file"), b"still there")
            self.assertEqual(self.list()["disk"]["state"], "detaching")
        harness.wait_until(lambda: not os.listdir(self.run_dir), "the lazy detach")

    def test_supervisor_and_worker_are_killed_and_nothing_is_stuck(self):
        for also in ((), ("worker",), ("worker", "guard")):
            device = self.attach_loop(self.formatted("ext4", 64 * M))
            shown = self.show("disk")
            pids = {"worker": shown["worker_pid"], "guard": shown["transports"][0]["facts"][1]}
            self.kill(shown["pid"], *[pids[name] for name in also])
            self.bight("detach", "disk")
            self.assertEqual(os.listdir(self.run_dir), [])
            with open("/proc/mounts") as mounts:
                self.assertNotIn(os.path.realpath(self.run_dir), mounts.read())
            harness.wait_until(lambda: not self.is_ours(device), "the end of the loop device")

    def test_a_run_directory_may_be_a_link(self):
        os.rename(self.run_dir, self.path("real"))
        os.symlink("real", self.run_dir)
        device = self.attach_loop(self.image(size=M))
        with open(device, "rb"):
            self.bight("detach", "--lazy", "disk")
            time.sleep(0.5)  # it looks ten times a second
            self.assertEqual(self.show("disk")["state"], "detaching")
        harness.wait_until(lambda: not os.listdir(self.run_dir), "the lazy detach")
        self.assertFalse(self.is_ours(device))
        self.test_supervisor_and_worker_are_killed_and_nothing_is_stuck()

    def test_all_are_killed_as_soon_as_it_is_mounted(self):
        image = self.image(size=M, name="early.img")
        file = f" {os.path.realpath(self.run_dir)}/early/data "
        for _ in range(5):
            subprocess.Popen([harness.BIGHT, "attach", image], env=self.env(), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
            harness.wait_until(lambda: file in harness.run("cat", "/proc/mounts").stdout, "the mount")
            harness.run("pkill", "-KILL", "-f", f"attach {image}")
            self.bight("detach", "--all", "--force")
            self.assertEqual(os.listdir(self.run_dir), [])
            self.assertNotIn(file, harness.run("cat", "/proc/mounts").stdout)

    def test_a_worker_killed_while_the_loop_device_waits_for_it_keeps_nothing_waiting(self):
        """The kernel lets nothing end who waits for a request that the worker has taken, until it is answered."""
        image = self.image(size=M, name="early.img")
        command = ["pgrep", "-f", f"^{harness.BIGHT} attach {image}"]

        def ours():
            return {path for path in glob.glob("/sys/block/loop*") if self.is_ours(path)}

        before = ours()
        for _ in range(10):
            attach = subprocess.Popen([harness.BIGHT, "attach", image], env=self.env(), stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)
            while attach.poll() is None:
                worker = next((pid for child in children(attach.pid) for pid in children(child)
                               if comm(pid) == "bight:early"), None)
                if worker and any(waits_for_answer(pid) for pid in (worker, *children(worker))):
                    os.kill(int(worker), signal.SIGKILL)
                    break
            _, stderr = attach.communicate(timeout=harness.PATIENCE)
            if attach.returncode:
                self.assertIn("SIGKILL", stderr)
            self.bight("detach", "--all", "--force")
            self.assertEqual(os.listdir(self.run_dir), [])
            self.assertNotIn(os.path.realpath(self.run_dir), harness.run("cat", "/proc/mounts").stdout)
            harness.wait_until(lambda: not any(map(alive, harness.run(*command, status=None).stdout.split())),
                               "the end of all processes")
        harness.wait_until(lambda: ours() <= before, "the end of the loop devices")

    def test_a_file_that_somebody_else_has_unmounted_is_told(self):
        self.attach(self.image(size=M), "--fuse", self.path("file"))
        harness.run("umount", self.path("file"))
        harness.wait_until(lambda: self.list()["disk"]["state"] == "failed", "the worker's end")
        self.assertIn("unmounted", self.list()["disk"]["reason"])

    def test_a_device_that_is_given_up_has_no_loop_device(self):
        device = self.attach_loop(self.image(size=M))
        for _ in range(6):  # the first worker has served the kernel's look for partitions
            if self.list()["disk"]["state"] == "failed":
                break
            self.kill(self.show("disk")["worker_pid"])
            harness.wait_until(lambda: self.list()["disk"]["state"] in ("running", "failed"), "the next worker, or none")
        self.assertEqual(self.list()["disk"]["state"], "failed")
        harness.wait_until(lambda: not self.is_ours(device), "the end of the loop device")

    def is_ours(self, device):
        try:
            with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file") as file:
                path = file.read().strip()
                return path == "/" or os.path.realpath(self.run_dir) in path  # "/": on what is mounted no more
        except FileNotFoundError:
            return False

    def test_sigterm_takes_all_of_it_down(self):
        device = self.attach_loop(self.image(size=M))
        os.kill(self.show("disk")["pid"], signal.SIGTERM)
        harness.wait_until(lambda: not os.listdir(self.run_dir), "the end")
        self.assertFalse(self.is_ours(device))

    def test_several_transports_at_once(self):
        uri = self.attach(self.image(harness.pattern(64 * K)), "--nbd", f"unix:{self.sock('n')}", "--fuse",
                          self.path("file"))
        self.assertIn("nbd+unix", uri)
        self.assertTrue(harness.read_file(self.path("file")) == harness.pattern(64 * K))
        self.assertEqual(len(self.show("disk")["transports"]), 2)


@unittest.skipUnless(os.geteuid() == 0 and os.access("/dev/fuse", os.W_OK) and harness.have("fusermount3"),
                     "needs root to become another user, and fusermount3")
class OtherUser(Attached):
    uid = NOBODY

    def attach_file(self, size=256 * K):
        image = self.image(harness.pattern(min(size, 256 * K)), size)
        os.chmod(image, 0o666)
        path = self.attach(image)
        if path.startswith("nbd"):
            self.skipTest("other users cannot use /dev/fuse here")
        return image, path

    def as_them(self, *command, **options):
        return harness.run(*self.as_user(), *command, **options)

    def check_nothing_is_mounted(self):
        self.assertEqual(os.listdir(self.run_dir), [])
        with open("/proc/self/mounts") as mounts:
            self.assertNotIn(self.run_dir, mounts.read())

    def test_a_file_without_privileges(self):
        image, path = self.attach_file()
        self.as_them("cmp", path, image)
        self.as_them("dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=4", "conv=notrunc,fsync")
        self.assertEqual(harness.read_file(image)[:16 * K + 1], bytes(16 * K) + harness.pattern(256 * K)[16 * K:16 * K + 1])
        self.assertEqual(self.list()["disk"]["device"], path)
        self.kill_worker("disk")
        self.as_them("cmp", path, image)
        self.bight("detach", "disk")
        self.check_nothing_is_mounted()

    @harness.need("fio", "qemu-img", "mkfs.ext4", "e2fsck")
    def test_programs_use_the_file_without_privileges(self):
        image, path = self.attach_file(64 * M)
        self.assertIn("64 MiB", self.as_them("qemu-img", "info", "-f", "raw", path).stdout)
        self.as_them("fio", "--name=v", f"--filename={path}", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k",
                     "--iodepth=16", "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--thread",
                     "--allow_file_create=0", cwd="/tmp")
        self.as_them("mkfs.ext4", "-q", "-F", path)
        self.as_them("e2fsck", "-fn", path)
        self.as_them("qemu-img", "compare", "-f", "raw", "-F", "raw", path, image)
        self.bight("detach", "disk")
        self.check_nothing_is_mounted()
        harness.run("e2fsck", "-fn", image)

    def test_passthrough_is_for_root(self):
        self.attach("--passthrough", self.image(size=M), "--fuse", self.path("file"), status=1)
        self.assertIn("only root", self.stderr)
        self.check_nothing_is_mounted()

    def test_a_file_that_is_open_is_not_detached(self):
        _, path = self.attach_file()
        with subprocess.Popen([*self.as_user(), "sh", "-c", f"exec <{path}; echo; exec sleep 1000"],
                              stdout=subprocess.PIPE) as holder:
            self.addCleanup(holder.kill)
            self.assertEqual(holder.stdout.read(1), b"\n")
            self.bight("detach", "disk", status=1)
            self.assertRegex(self.stderr, rf"opened by \S+ \({holder.pid}\)")
            holder.kill()
        self.bight("detach", "disk")

    def test_kills_without_privileges_leave_nothing(self):
        for both in (False, True):
            _, path = self.attach_file()
            shown = self.show("disk")
            self.kill(*[shown["pid"]] + [shown["worker_pid"]] * both)
            if not both:
                self.as_them("dd", f"if={path}", "of=/dev/null", "bs=64k")
            self.bight("detach", "disk")
            self.check_nothing_is_mounted()


@unittest.skipUnless(os.geteuid() == 0 and os.access("/dev/fuse", os.W_OK) and harness.have("fusermount3"),
                     "needs root to become another user, and fusermount3")
class OtherUserOfFuse(harness.Case):
    """Where /dev/fuse is root's alone, or /etc/mtab as it is not wanted: in a mount namespace where that is otherwise."""

    def make_etc(self, mtab):
        shutil.copytree("/etc", self.path("etc"), symlinks=True, ignore=lambda *_: ["mtab"])
        if mtab:
            os.symlink("/proc/self/mounts", self.path("etc/mtab"))

    def in_namespace(self, *command):
        script = ('mount -t tmpfs none "$0/dev" && mknod -m 666 "$0/dev/fuse" c 10 229 && '
                  'mount --bind "$0/dev/fuse" /dev/fuse && mount --bind "$0/etc" /etc && exec "$@"')
        os.makedirs(self.path("dev"), exist_ok=True)
        os.chmod(self.dir, 0o755)
        return harness.run("unshare", "--mount", "--propagation", "private", "sh", "-c", script, self.dir, *command,
                           status=None, timeout=harness.PATIENCE * 4)

    @unittest.skipIf(os.path.exists("/dev/fuse") and os.stat("/dev/fuse").st_mode & 0o006 == 0o006 and
                     os.path.exists("/etc/mtab"), "everybody may use /dev/fuse here: the tests of OtherUser do")
    def test_all_of_it(self):
        self.make_etc(mtab=True)
        for tests in (["test_attach_device.py", "OtherUser"], ["test_fuse.py", "Life.test_without_root"]):
            path = os.path.join(os.path.dirname(os.path.abspath(__file__)), tests[0])
            done = self.in_namespace(sys.executable, path, "-v", tests[1])
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertNotIn("skipped", done.stderr)

    def test_nothing_is_mounted_that_could_not_be_unmounted(self):
        """fusermount3 needs /etc/mtab to unmount, but not to mount."""
        self.make_etc(mtab=False)
        theirs, run_dir = self.path("theirs"), self.path("run")
        os.mkdir(theirs)
        os.mkdir(run_dir)
        image = harness.write_file(os.path.join(theirs, "disk.img"), bytes(M))
        for path in (theirs, image, run_dir):
            os.chown(path, NOBODY, NOBODY)
        bight = ["env", f"BIGHT_RUN_DIR={run_dir}", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
                 harness.BIGHT]
        self.addCleanup(harness.run, *bight, "detach", "--all", "--force", status=None)
        script = '"$@" attach "$0" && "$@" detach --all && "$@" attach --fuse "$0.device" "$0"'
        done = self.in_namespace("sh", "-c", script, image, *bight)
        self.assertRegex(done.stdout, r"\Anbd\+unix://\S+\n\Z")
        self.assertRegex(done.stderr, r"\Abight: [^\n]*/etc/mtab[^\n]*\n\Z")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(os.listdir(run_dir), [])


if __name__ == "__main__":
    unittest.main()
