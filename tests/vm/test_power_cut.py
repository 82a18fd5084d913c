"""Power cuts: the guest is killed under load, its disk forgets what was not flushed, and what was fsynced is there.

The guest has an ext4 on a disk that QEMU logs (blklogwrites: every write and flush), on it an image, on that a ublk
device of bight's, and on that another ext4, where files are written, fsynced, and then reported to the host. A cut is
a moment in the log: a disk with a volatile cache keeps all that was written before the last flush, and any of the
rest. Both file systems have to come back clean, with every file that was reported before.
"""
import os
import random
import shutil
import socket
import struct
import threading
import time

import harness
from guest import VIRTIO_DISK, GuestCase, long_test
from harness import BIGHT, M, PATIENCE, need, write_file

FLUSH, FUA, DISCARD = 1, 2, 4
SECTOR = 512
FILE_BYTES = 20000
LOAD = """
mkdir /disk; mount -t ext4 /dev/vda /disk; truncate -s 40M /disk/disk.img; mkdir /run/bight
d=$(bight attach --ublk --name disk {options} /disk/disk.img)
mkfs.ext4 -q $d; mount -t ext4 $d /mnt; echo 00000000 >/mnt/counter; sync
for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat $name)" != report ] || exec 9>/dev/$(basename $(dirname $name))
done
(while :; do dd if=/dev/urandom of=/mnt/noise bs=32k count=30; rm /mnt/noise; done) 2>/dev/null &
n=0; while :; do
    n=$((n + 1))
    yes $n | head -c {size} | dd of=/mnt/f$n bs=4k iflag=fullblock conv=fsync 2>/dev/null
    printf %08d $n | dd of=/mnt/counter conv=notrunc,fsync 2>/dev/null
    echo $n >&9
done
"""


class Log:
    """What blklogwrites wrote: [(flags, offset, length, where the data is)] and where in the log each one ends."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = memoryview(file.read())
        self.entries, self.ends, at = [], [], SECTOR
        while at + SECTOR <= len(self.data):
            sector, nr_sectors, flags, _ = struct.unpack_from("<QQQQ", self.data, at)
            at += SECTOR
            length = nr_sectors * SECTOR
            end = at + (0 if flags & DISCARD else length)
            if not (nr_sectors or flags & FLUSH) or end > len(self.data):
                break  # was not written any more
            self.entries.append((flags, sector * SECTOR, length, at))
            self.ends.append(end)
            at = end

    def disk_after(self, disk, cut, chance):
        """disk, a bytearray, as it is when the power goes after `cut` entries."""
        flushed = max((i for i in range(cut) if self.entries[i][0] & FLUSH), default=0)
        for i, (flags, offset, length, at) in enumerate(self.entries[:cut]):
            if i < flushed or flags & FUA or chance.random() < 0.5:
                disk[offset:offset + length] = bytes(length) if flags & DISCARD else self.data[at:at + length]
        return disk


class TestPowerCut(GuestCase):
    def path(self, name):
        return os.path.join(self.dir, name)

    def setUp(self):
        super().setUp()
        self.dir = self.enterContext(harness.scratch_dir(parent="/dev/shm"))
        self.seed = random.randrange(1 << 32)
        self.random = random.Random(self.seed)
        self.reports = []  # (n, how long the log was)

    def read_reports(self, port):
        text = b""
        while data := port.recv(4096):
            length = os.stat(self.path("log")).st_size
            *lines, text = (text + data).split(b"\n")
            self.reports += [(int(line), length) for line in lines]

    def run_until_killed(self, options, nr_files):
        write_file(self.path("log"))
        args = ["-blockdev", f"driver=file,filename={self.path('disk')},node-name=disk",
                "-blockdev", f"driver=file,filename={self.path('log')},node-name=log",
                "-blockdev", "driver=blklogwrites,node-name=logged,file=disk,log=log",
                "-device", "virtio-blk-pci,drive=logged",
                "-chardev", f"socket,id=report,path={self.path('port')},server=on,wait=off",
                "-device", "virtserialport,chardev=report,name=report"]
        guest = self.guest(modules=["ublk_drv", *VIRTIO_DISK], programs=[BIGHT, "mkfs.ext4"], args=args)
        with socket.socket(socket.AF_UNIX) as port:
            port.connect(self.path("port"))
            reader = threading.Thread(target=self.read_reports, args=(port,))
            reader.start()
            try:
                load = guest.start(LOAD.format(options=options, size=FILE_BYTES))
                deadline = time.monotonic() + 4 * PATIENCE
                while len(self.reports) < nr_files and time.monotonic() < deadline:
                    self.assertFalse(load.is_done(), "the load has ended")
                    time.sleep(0.02)
                time.sleep(self.random.random() / 5)
            finally:
                guest.kill()
                reader.join()
        self.assertGreaterEqual(len(self.reports), nr_files, guest.console())

    def mend(self, disk):
        done = harness.run("e2fsck", "-p", disk, status=None)  # the journal
        self.assertIn(done.returncode, (0, 1), done.stdout)
        harness.run("e2fsck", "-fn", disk)

    def check(self, disk, nr_files):
        image, files = self.path("image"), self.path("files")
        self.mend(disk)
        harness.run("debugfs", "-R", f"dump /disk.img {image}", disk)
        self.mend(image)
        shutil.rmtree(files, ignore_errors=True)
        os.mkdir(files)
        harness.run("debugfs", "-R", f"rdump / {files}", image)
        self.assertGreaterEqual(int(harness.read_file(os.path.join(files, "counter"))), nr_files)
        for n in range(1, nr_files + 1):
            line = f"{n}\n".encode()
            expected = (line * (FILE_BYTES // len(line) + 1))[:FILE_BYTES]
            self.assertTrue(harness.read_file(os.path.join(files, f"f{n}")) == expected, f"file {n} of {nr_files}")

    def cut(self, options="", nr_files=25, nr_cuts=4):
        disk = self.path("disk")
        write_file(disk, size=80 * M)
        harness.run("mkfs.ext4", "-q", "-F", disk)
        before = harness.read_file(disk)
        self.run_until_killed(options, nr_files + self.random.randrange(10))
        log = Log(self.path("log"))
        first = next(i for i, end in enumerate(log.ends) if end >= self.reports[0][1])
        cuts = [len(log.ends), *(self.random.randrange(first, len(log.ends)) for _ in range(nr_cuts - 1))]
        for cut in cuts:
            reported = max((n for n, length in self.reports if length <= log.ends[cut - 1]), default=0)
            with self.subTest(seed=self.seed, cut=cut, of=len(log.ends), reported=reported):
                write_file(disk, log.disk_after(bytearray(before), cut, self.random))
                self.check(disk, reported)
        # What was checked is worth something: it fails where the same writes were never flushed.
        log.entries = [(flags & DISCARD, *where) for flags, *where in log.entries]
        write_file(disk, log.disk_after(bytearray(before), cuts[0], self.random))
        with self.assertRaises((AssertionError, OSError, ValueError)):
            self.check(disk, self.reports[-1][0])

    @need("e2fsck", "debugfs")
    def test_what_was_fsynced_is_there(self):
        self.cut()

    @long_test
    @need("e2fsck", "debugfs")
    def test_what_was_fsynced_is_there_however_it_is_served(self):
        for options in ("", "--io buffered", "--writeback", "--queues 1 --block-size 4096"):
            for _ in range(3):
                self.reports = []
                self.cut(options, 80, 25)
