"""The guest itself: what other tests here rely on."""
import os

from guest import Guest, GuestCase, run
from harness import M, read_file, write_file


class TestGuest(GuestCase):
    def test_scripts_files_disks(self):
        disk = write_file(os.path.join(self.dir, "disk"), size=8 * M)
        with Guest(programs=["cmp"], files={"/etc/hello": "world\n"}, disks=[disk]) as guest:
            self.assertEqual(guest.run("cat /etc/hello; uname -s"), "world\nLinux\n")
            self.assertEqual(guest.start("echo out; echo err >&2; exit 3").wait(), (3, "out\nerr\n"))
            slow = guest.start("while [ ! -e /tmp/go ]; do sleep 0.01; done; echo gone")
            guest.run("cmp -n 1048576 /dev/vda /dev/zero; printf written | dd of=/dev/vda conv=fsync,notrunc")
            guest.run("touch /tmp/go")
            self.assertEqual(slow.wait(), (0, "gone\n"))
        self.assertEqual(read_file(disk)[:7], b"written")
