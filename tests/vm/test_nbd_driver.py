"""The kernel's nbd driver on a `bight serve --nbd`: file systems on it, and a server that dies under them."""
from guest import GuestCase
from harness import BIGHT, need

NBD = "nbd nbds_max=4"
SERVE = """
serve() {
    bight serve --nbd unix:/tmp/sock "$@" /tmp/disk.img 2>/tmp/bight.err & echo $! >/tmp/pid
    until [ -S /tmp/sock ]; do kill -0 $! || { cat /tmp/bight.err; return 1; }; sleep 0.02; done
}
attach() {
    nbd-client -unix /tmp/sock /dev/nbd0 -b 512 "$@" >/tmp/nbd-client.out 2>&1 || { cat /tmp/nbd-client.out; exit 1; }
}
load() {
    tar -C / -cf - usr/bin busybox | tar -C /mnt -xf -
    dd if=/dev/urandom of=/mnt/random bs=64k count=100 2>/dev/null
    (cd /mnt; find usr busybox random -type f | xargs md5sum) >/tmp/sums
}
"""


@need("nbd-client")
class TestNbdDriver(GuestCase):
    def boot(self, *programs, modules=()):
        guest = self.guest(modules=[NBD, *modules], programs=[BIGHT, "nbd-client", *programs])
        guest.run("truncate -s 400M /tmp/disk.img")
        return guest

    def test_ext4_made_loaded_checked(self):
        guest = self.boot("mkfs.ext4", "e2fsck")
        guest.run(f"""{SERVE}
            serve; attach -C 2
            mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt
            load; rm -r /mnt/busybox; umount /mnt; e2fsck -fn /dev/nbd0
            mount -t ext4 /dev/nbd0 /mnt; fstrim /mnt 2>/dev/null || true
            grep -v busybox /tmp/sums >/tmp/left; (cd /mnt; md5sum -c /tmp/left >/dev/null); umount /mnt
            nbd-client -d /dev/nbd0; kill $(cat /tmp/pid); wait""", timeout=200)
        # the image file itself
        guest.run("e2fsck -fn /tmp/disk.img")

    @need("mkfs.xfs", "xfs_repair")
    def test_xfs_made_loaded_checked(self):
        guest = self.boot("mkfs.xfs", "xfs_repair", modules=["xfs"])
        guest.run(f"""{SERVE}
            serve; attach
            mkfs.xfs -q -f /dev/nbd0; mount -t xfs /dev/nbd0 /mnt
            load; umount /mnt; xfs_repair -n /dev/nbd0
            mount -t xfs /dev/nbd0 /mnt; (cd /mnt; md5sum -c /tmp/sums >/dev/null); umount /mnt""", timeout=200)

    def test_dead_server(self):
        """What was synced before is there; what comes after fails, and hangs nobody."""
        guest = self.boot("mkfs.ext4", "e2fsck")
        # Without a limit of time the driver may lose a request when the connection ends, and umount waits for ever.
        guest.run(f"""{SERVE}
            serve; attach -t 5
            mkfs.ext4 -q /dev/nbd0; mount /dev/nbd0 /mnt
            echo kept >/mnt/kept; sync""")
        load = guest.start("while dd if=/dev/zero of=/mnt/big bs=64k count=1000 conv=fsync,notrunc; do :; done; exit 5")
        guest.run("until [ -e /mnt/big ]; do sleep 0.01; done; kill -9 $(cat /tmp/pid)")
        status, output = load.wait()
        self.assertEqual(status, 5, output)
        guest.run(f"""{SERVE}
            umount /mnt; nbd-client -d /dev/nbd0; rm -f /tmp/sock
            serve || {{ sleep 2; serve; }} # the dead one's ring may still have the image open, and locked
            attach
            e2fsck -p /dev/nbd0 || [ $? = 1 ]; e2fsck -fn /dev/nbd0
            mount /dev/nbd0 /mnt; [ "$(cat /mnt/kept)" = kept ]""")

    def test_read_only(self):
        guest = self.boot()
        guest.run(f"""{SERVE}
            serve --read-only; attach
            [ "$(blockdev --getro /dev/nbd0)" = 1 ]
            ! dd if=/dev/zero of=/dev/nbd0 count=1 conv=fsync 2>/dev/null""")
