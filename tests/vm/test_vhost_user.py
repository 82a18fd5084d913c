"""Linux's virtio disk driver, by way of QEMU, on `bight serve --vhost-user`."""
import os
import signal

import guest as guest_module
import harness
from guest import GuestCase, long_test
from harness import BIGHT, M, need

PACKED = ("-global", "vhost-user-blk-pci.packed=on")
LOAD = """
tar -C / -cf - usr/bin busybox | tar -C /mnt -xf -
dd if=/dev/urandom of=/mnt/random bs=64k count=100 2>/dev/null
(cd /mnt; find usr busybox random -type f | xargs md5sum) >/tmp/sums
"""


@need("mkfs.ext4", "e2fsck")
class TestVhostUser(GuestCase):
    def serve(self, image, *args):
        server = harness.Server(image, args=[*args, "--vhost-user", self.path("sock"), "-v"], nbd=[])
        return self.enterContext(server)

    def path(self, name):
        return os.path.join(self.dir, name)

    def disk(self, size):
        return harness.write_file(self.path("disk"), size=size)

    def boot(self, *programs, args=()):
        return self.guest(programs=programs, vhost_user=[f"{self.path('sock')},reconnect=1"], args=args)

    def check_ext4(self, args):
        disk = self.disk(256 * M)
        server = self.serve(disk)
        guest = self.boot("mkfs.ext4", "e2fsck", args=args)
        guest.run(f"""
            [ $(ls /sys/block/vda/mq | wc -l) = 2 ]
            [ "$(cat /sys/block/vda/serial)" = disk ]
            [ "$(cat /sys/block/vda/queue/write_cache)" = "write back" ]
            mkfs.ext4 -q /dev/vda; mount -o discard /dev/vda /mnt
            {LOAD}
            rm -r /mnt/busybox; umount /mnt; e2fsck -fn /dev/vda
            mount -t ext4 /dev/vda /mnt; fstrim /mnt
            grep -v busybox /tmp/sums >/tmp/left; (cd /mnt; md5sum -c /tmp/left >/dev/null); umount /mnt
            e2fsck -fn /dev/vda""", timeout=200)
        guest.kill()
        self.assertEqual(harness.SANITIZER.search(server.stop()), None)
        return disk

    def test_ext4_made_loaded_trimmed_checked_on_split_rings(self):
        self.check_ext4(())

    @long_test
    def test_ext4_made_loaded_trimmed_checked_on_packed_rings(self):
        self.check_ext4(PACKED)

    def test_every_kind_of_device(self):
        kinds = ("num-queues=1", "num-queues=1,queue-size=1024", "num-queues=2,event_idx=off,indirect_desc=off",
                 "num-queues=2,packed=on,event_idx=off", "num-queues=2,packed=on,indirect_desc=off",
                 "num-queues=2,config-wce=off", "num-queues=1,disable-modern=on,disable-legacy=off",
                 "num-queues=2,discard=off,write-zeroes=off")
        sockets = []
        for kind in kinds:
            name = f"disk{len(sockets)}"
            disk = harness.write_file(self.path(name), size=16 * M)
            sockets.append(f"{self.path(name)}.sock {kind}")
            args = ["--vhost-user", f"{self.path(name)}.sock", "--queues", 2]
            self.enterContext(harness.Server(disk, args=args, nbd=[]))
        guest = self.guest(programs=("mkfs.ext4", "e2fsck"), vhost_user=sockets)
        for letter, kind in zip("abcdefgh", kinds):
            with self.subTest(kind):
                guest.run(f"""
                    disk=/dev/vd{letter}; mkfs.ext4 -q $disk; mount $disk /mnt
                    dd if=/dev/urandom of=/mnt/random bs=64k count=40 2>/dev/null; md5sum /mnt/random >/tmp/sum
                    sync; echo 3 >/proc/sys/vm/drop_caches; md5sum -c /tmp/sum; rm /mnt/random
                    {'fstrim' if 'discard=off' not in kind else '! fstrim'} /mnt; umount /mnt; e2fsck -fn $disk""")

    def test_read_only(self):
        self.serve(self.disk(8 * M), "--read-only")
        guest = self.boot()
        guest.run("""[ "$(cat /sys/block/vda/ro)" = 1 ]
            ! dd if=/dev/zero of=/dev/vda count=1 conv=fsync 2>/dev/null""")

    @harness.need_root
    def test_boots_from_it_by_the_bios_and_has_its_root_on_it(self):
        disk = guest_module.bootable_disk(self.path("disk"), 128 * M)
        server = self.serve(disk)
        with guest_module.Guest(vhost_user=[f"{self.path('sock')},reconnect=1"], boots_from_disk=True) as guest:
            guest.run("""grep -q '^/dev/vda / ext4' /proc/mounts
                dd if=/dev/urandom of=/random bs=64k count=40 2>/dev/null; md5sum /random >/sums; sync
                echo 3 >/proc/sys/vm/drop_caches; md5sum -c /sums; mount -o remount,ro /""")
        server.stop()
        self.assertIn("clean", harness.run("e2fsck", "-fn", disk).stdout + harness.run("dumpe2fs", "-h", disk).stdout)

    def test_cache_mode(self):
        self.serve(self.disk(8 * M))
        guest = self.boot()
        guest.run("""echo "write through" >/sys/block/vda/cache_type
            [ "$(cat /sys/block/vda/queue/write_cache)" = "write through" ]
            dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null""")

    def check_restart(self, args, number):
        """The server is restarted, or killed, under load: no error, and every byte as written."""
        disk = self.disk(64 * M)
        server = self.serve(disk)
        guest = self.boot("mkfs.ext4", "e2fsck", args=args)
        guest.run("mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt")
        load = guest.start("""
            for n in 1 2 3 4; do
                dd if=/dev/urandom of=/tmp/random bs=64k count=40 2>/dev/null
                cp /tmp/random /mnt/random; sync; echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/random /mnt/random
                echo $n >/tmp/round
            done""")
        for n in (1, 2):
            guest.run(f"until [ -e /tmp/round ] && [ $(cat /tmp/round) -ge {n} ]; do sleep 0.02; done")
            server.process.send_signal(number)
            server.process.wait()
            server = self.serve(disk)
        status, output = load.wait(200)
        self.assertEqual(status, 0, output)
        guest.run("umount /mnt; e2fsck -fn /dev/vda; ! dmesg | grep -i 'I/O error'")

    def test_server_stopped_and_started_under_load(self):
        self.check_restart((), signal.SIGTERM)

    def test_server_killed_and_started_under_load(self):
        self.check_restart((), signal.SIGKILL)

    @long_test
    def test_server_killed_and_started_under_load_on_packed_rings(self):
        self.check_restart(PACKED, signal.SIGKILL)

    def test_resized_while_it_is_mounted(self):
        disk = self.disk(64 * M)
        env = os.environ | {"BIGHT_RUN_DIR": self.path("run")}
        harness.run(BIGHT, "attach", disk, "--vhost-user", "sock", env=env, cwd=self.dir)
        self.addCleanup(harness.run, BIGHT, "detach", "--all", "--force", env=env, status=None)
        guest = self.boot("mkfs.ext4", "e2fsck", "resize2fs")
        guest.run("mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo kept >/mnt/kept")
        os.truncate(disk, 200 * M)
        harness.run(BIGHT, "resize", "disk", env=env)
        guest.run(f"""until [ "$(cat /sys/block/vda/size)" = {200 * M // 512} ]; do sleep 0.02; done
            resize2fs /dev/vda; [ "$(cat /mnt/kept)" = kept ]
            dd if=/dev/zero of=/mnt/big bs=1M count=120; umount /mnt; e2fsck -fn /dev/vda""")

    def test_machines_one_after_the_other_on_one_socket(self):
        self.serve(self.disk(8 * M))
        for text in ("first", "second"):
            guest = self.boot()
            guest.run(f"[ {text} = first ] || [ $(head -c 5 /dev/vda) = first ]; "
                      f"printf {text} | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null")
            guest.kill()
            guest.stack.close()
