"""A block device of the kernel's ublk driver: file systems on it, and everything that can happen to it."""
import os
import re

import harness
from guest import KERNEL_WITH_ZERO_COPY, KERNEL_WITHOUT_UBLK, GuestCase, long_test
from harness import BIGHT, PATIENCE, M, need

SERVE = """
# serve ID OPTION... IMAGE: waits for /dev/ublkbID
serve() {
    id=$1; shift
    bight serve -v --ublk=$id "$@" 2>/tmp/bight.$id & echo $! >/tmp/pid.$id
    until [ -b /dev/ublkb$id ] && grep -q ' ready' /tmp/bight.$id; do
        kill -0 $! 2>/dev/null || { cat /tmp/bight.$id; return 1; }
        sleep 0.02
    done
}
stop() {
    kill $(cat /tmp/pid.$1)
    while [ -e /dev/ublkc$1 ]; do sleep 0.02; done
    while kill -0 $(cat /tmp/pid.$1) 2>/dev/null; do sleep 0.02; done
}
load() {
    tar -C / -cf - usr/bin busybox | tar -C /mnt -xf -
    dd if=/dev/urandom of=/mnt/random bs=64k count=100 2>/dev/null
    (cd /mnt; find usr busybox random -type f | xargs md5sum) >/tmp/sums
}
"""


# What changes a file system in many ways at once, from three sides; then it is checked.
STRESS = """
stress() {
    mkdir /mnt/$1; cd /mnt/$1; i=0
    while [ $i -lt 60 ]; do
        i=$((i + 1)); n=$((i * 7 % 13))
        case $((i % 6)) in
        0) mkdir -p d$n/e && echo $i >d$n/e/f ;;
        1) dd if=/dev/urandom of=f$n bs=7k count=$n conv=notrunc,fsync 2>/dev/null ;;
        2) cat f* >>g$n 2>/dev/null || true ;;
        3) mv f$n h$n 2>/dev/null || ln -f g$n h$n 2>/dev/null || true ;;
        4) truncate -s ${n}77 g$n; ln -sf g$n s$n ;;
        5) rm -rf d$n f$n ;;
        esac
    done
    cd /
}
"""
VERIFY = """fio --name=v --filename=/dev/ublkb0 --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-64k \\
    --iodepth=32 --size=64m --io_size=192m --verify=crc32c --verify_fatal=1 --do_verify=1 \\
    --verify_state_save=0 2>&1"""
KILL_BOTH = r"""
kill_both() { # supervisor and worker, and waits until that is told
    show=$(bight show one --json)
    for key in pid worker_pid; do
        kill -9 $(echo "$show" | sed -n 's/.*"'$key'": *\([0-9]*\).*/\1/p')
    done
    until bight list | grep -q dead; do sleep 0.05; done
}
"""
KILL_WORKERS = r"""
done_so_far() { awk '{ print $1 + $5 }' /sys/block/ublkb0/stat; }
kill_workers() { # as often as that, each after it has served something
    i=0; while [ $i -lt $1 ]; do
        before=$(done_so_far); until [ $(done_so_far) -gt $before ]; do sleep 0.02; done
        kill -9 $(bight show disk --json | sed -n 's/.*"worker_pid": *\([0-9]*\).*/\1/p')
        i=$((i + 1))
        until bight show disk --json 2>/dev/null | grep -q '"restarts": *'$i; do sleep 0.05; done
    done
}
"""


class UblkCase(GuestCase):
    def boot(self, *programs, modules=(), size="400M", **options):
        guest = self.guest(modules=["ublk_drv", *modules], programs=[BIGHT, *programs], **options)
        guest.run(f"truncate -s {size} /tmp/disk.img")
        return guest


class TestUblk(UblkCase):
    def test_ext4_made_loaded_checked(self):
        guest = self.boot("mkfs.ext4", "e2fsck")
        guest.run(f"""{SERVE}
            serve 0 /tmp/disk.img
            mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt
            load; rm -r /mnt/busybox; umount /mnt; e2fsck -fn /dev/ublkb0
            stop 0; e2fsck -fn /tmp/disk.img
            serve 0 /tmp/disk.img; mount -t ext4 /dev/ublkb0 /mnt
            grep -v busybox /tmp/sums >/tmp/left; cd /mnt; md5sum -c /tmp/left >/dev/null; cd /; umount /mnt
            stop 0""", timeout=200)

    @need("mkfs.xfs", "xfs_repair")
    def test_xfs_made_loaded_checked(self):
        guest = self.boot("mkfs.xfs", "xfs_repair", modules=["xfs"])
        guest.run(f"""{SERVE}{STRESS}
            serve 0 --queues 1 /tmp/disk.img
            mkfs.xfs -q -f /dev/ublkb0; mount -t xfs /dev/ublkb0 /mnt
            load; stress 1 & a=$!; stress 2 & b=$!; stress 3; wait $a $b
            umount /mnt; xfs_repair -n /dev/ublkb0
            mount -t xfs /dev/ublkb0 /mnt; cd /mnt; md5sum -c /tmp/sums >/dev/null; cd /; umount /mnt
            stop 0""", timeout=200)

    def test_fio_verifies(self):
        guest = self.boot("fio", memory=768)
        guest.run(f"""{SERVE}
            serve 0 /tmp/disk.img
            fio --name=v --filename=/dev/ublkb0 --ioengine=io_uring --direct=1 --rw=randwrite \
                --bsrange=4k-256k --iodepth=32 --size=48m --verify=crc32c --verify_fatal=1 --do_verify=1 \
                --verify_state_save=0 >/tmp/fio 2>&1 ||
                {{ cat /tmp/fio; exit 1; }}
            stop 0""", timeout=200)

    def test_limits(self):
        """What the kernel was told: sizes, queues, cache, read-only."""
        guest = self.boot()
        queue = "cd /sys/block/ublkb$id/queue"
        guest.run(f"""{SERVE}
            serve 3 --queues 1 /tmp/disk.img
            {queue}; [ $(cat logical_block_size) = 512 ]; [ $(cat physical_block_size) = 4096 ]
            [ "$(cat write_cache)" = 'write back' ]; [ $(cat fua) = 1 ]; [ $(ls ../mq | wc -l) = 1 ]
            [ $(cat discard_granularity) = 4096 ]; [ $(cat discard_max_bytes) -gt 0 ]
            [ $(blockdev --getsize64 /dev/ublkb3) = {400 << 20} ]; cd /; stop 3
            serve 4 --block-size 4096 --queues 2 --offset 1M /tmp/disk.img
            {queue}; [ $(cat logical_block_size) = 4096 ]; [ $(ls ../mq | wc -l) = 2 ]
            [ $(blockdev --getsize64 /dev/ublkb4) = {399 << 20} ]; cd /; stop 4
            serve 5 --read-only /tmp/disk.img
            {queue}; [ "$(cat write_cache)" = 'write through' ]; [ $(cat ../ro) = 1 ]
            ! dd if=/dev/zero of=/dev/ublkb5 count=1 conv=fsync 2>/dev/null; cd /; stop 5
            serve 6 --io null /tmp/disk.img
            {queue}; [ "$(cat write_cache)" = 'write through' ]; cd /; stop 6
            ls /dev/ublk*; [ "$(ls /dev/ublk*)" = /dev/ublk-control ]""")

    def test_discard_gives_space_back(self):
        guest = self.boot("mkfs.ext4", "blkdiscard", "fallocate", "cmp", "fstrim")
        guest.run(f"""{SERVE}
            used() {{ sync; du -k /tmp/disk.img | cut -f 1; }}
            serve 0 /tmp/disk.img
            dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\0' x >/tmp/x
            xs() {{ for i in $(seq 16); do cat /tmp/x; done; }}
            xs | dd of=/dev/ublkb0 bs=1M iflag=fullblock oflag=direct 2>/dev/null
            [ $(used) -ge 16384 ]
            blkdiscard -o 0 -l 8M /dev/ublkb0; [ $(used) -le 8192 ]; cmp -n 8388608 /dev/ublkb0 /dev/zero
            blkdiscard -z -o 8M -l 1M /dev/ublkb0; cmp -i 8388608:0 -n 1048576 /dev/ublkb0 /dev/zero
            fallocate -z -o 12M -l 1M /dev/ublkb0; cmp -i 12582912:0 -n 1048576 /dev/ublkb0 /dev/zero
            [ "$(dd if=/dev/ublkb0 bs=1M skip=10 count=1 2>/dev/null | head -c 3)" = xxx ]
            mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt
            xs >/mnt/file; sync; before=$(used); rm /mnt/file; sync; fstrim /mnt
            [ $(($before - $(used))) -ge 15000 ]; umount /mnt; stop 0""")

    @need("sfdisk")
    def test_partitions(self):
        guest = self.boot("sfdisk", "mkfs.ext4")
        guest.run(f"""{SERVE}
            serve 0 /tmp/disk.img
            printf '1M,100M\\n,,\\n' | sfdisk -q /dev/ublkb0; blockdev --rereadpt /dev/ublkb0
            until [ -b /dev/ublkb0p2 ]; do sleep 0.02; done
            mkfs.ext4 -q /dev/ublkb0p2; mount /dev/ublkb0p2 /mnt; echo hello >/mnt/hello; umount /mnt; stop 0
            serve 1 /tmp/disk.img # found by the scan at the start
            mount /dev/ublkb1p2 /mnt; [ "$(cat /mnt/hello)" = hello ]; umount /mnt; stop 1""")

    def test_several_devices_in_one_process(self):
        guest = self.boot()
        guest.run(f"""{SERVE}
            truncate -s 8M /tmp/two.img; printf 2 >/tmp/two.img; truncate -s 8M /tmp/two.img
            serve 7 --ublk=8 /tmp/disk.img /tmp/two.img
            until [ -b /dev/ublkb8 ]; do sleep 0.02; done
            [ $(blockdev --getsize64 /dev/ublkb7) = {400 << 20} ]; [ $(blockdev --getsize64 /dev/ublkb8) = {8 << 20} ]
            [ "$(dd if=/dev/ublkb8 bs=1 count=1 2>/dev/null)" = 2 ]
            stop 7; [ ! -e /dev/ublkc8 ]""")

    @need("setpriv")
    def test_without_privileges(self):
        guest = self.boot("setpriv", size="8M")
        guest.run(f"""{SERVE}
            chmod 666 /dev/ublk-control; chown 1000:1000 /tmp/disk.img
            cat >/tmp/user <<"END"
. /tmp/serve; serve 0 /tmp/disk.img; until [ -w /dev/ublkb0 ]; do sleep 0.02; done
dd if=/dev/urandom of=/dev/ublkb0 bs=64k count=16 oflag=direct 2>/dev/null; stop 0
END
            cat >/tmp/serve <<'END'
{SERVE}
END
            for kind in c b; do # what udev rules would do
                (until [ -e /dev/ublk${{kind}}0 ]; do sleep 0.02; done; sleep 0.2
                    chown 1000:1000 /dev/ublk${{kind}}0) &
            done
            setpriv --reuid 1000 --regid 1000 --clear-groups sh -eu /tmp/user
            ! dd if=/dev/zero bs=64k count=16 2>/dev/null | cmp -s - /tmp/disk.img
            wait""")

    def test_refusals(self):
        guest = self.boot()
        output = guest.run(f"""{SERVE}
            truncate -s 8M /tmp/two.img
            bight serve --ublk=x /tmp/disk.img || echo $?
            bight serve --ublk --ring threads /tmp/disk.img || echo $?
            serve 0 /tmp/disk.img
            bight serve --ublk=0 /tmp/two.img || echo $?
            [ "$(ls /dev/ublkc*)" = /dev/ublkc0 ]""")
        self.assertRegex(output, "x: no device number.*\n2\n(.*\n)*.*needs io_uring.*\n2\n(.*\n)*"
                                 ".*device 0 is in use.*\n1\n")

    def test_killed_server(self):
        """Nobody starts another one: requests fail, nothing hangs, and all can be made again."""
        guest = self.boot("mkfs.ext4", "e2fsck")
        load = "while dd if=/dev/zero of=/mnt/big bs=64k count=500 conv=fsync,notrunc; do :; done; exit 5"
        guest.run(f"""{SERVE}
            serve 0 /tmp/disk.img
            mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt; echo kept >/mnt/kept; sync""")
        job = guest.start(load)
        guest.run("until [ -e /mnt/big ]; do sleep 0.01; done; kill -9 $(cat /tmp/pid.0)")
        self.assertEqual(job.wait()[0], 5)
        guest.run(f"""{SERVE}
            umount /mnt
            serve 1 /tmp/disk.img || {{ sleep 2; serve 1 /tmp/disk.img; }}
            e2fsck -p /dev/ublkb1 || [ $? = 1 ]; e2fsck -fn /dev/ublkb1
            mount /dev/ublkb1 /mnt; [ "$(cat /mnt/kept)" = kept ]; umount /mnt; stop 1""")

    def test_stopped_while_in_use(self):
        """SIGTERM with the device open and mounted: what was written before is in the image."""
        guest = self.boot("mkfs.ext4", "e2fsck")
        guest.run(f"""{SERVE}
            serve 0 /tmp/disk.img
            mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt; echo kept >/mnt/kept; sync
            kill $(cat /tmp/pid.0); while kill -0 $(cat /tmp/pid.0) 2>/dev/null; do sleep 0.02; done
            umount /mnt; while [ -e /dev/ublkc0 ]; do sleep 0.02; done
            serve 1 /tmp/disk.img; mount /dev/ublkb1 /mnt; [ "$(cat /mnt/kept)" = kept ]; umount /mnt
            exec 9<>/dev/ublkb1; printf x >&9
            kill $(cat /tmp/pid.1); while kill -0 $(cat /tmp/pid.1) 2>/dev/null; do sleep 0.02; done
            [ "$(head -c 1 /tmp/disk.img)" = x ]""")

    def test_many_devices(self):
        """64 at a time; and one made and deleted many times."""
        guest = self.boot(size="4M")
        guest.run(f"""{SERVE}
            n=0; options=; while [ $n -lt 64 ]; do
                truncate -s 4M /tmp/disk.$n; options="$options --ublk /tmp/disk.$n"; n=$((n + 1))
            done
            serve 0 --queues 1 --depth 4 $(echo $options | sed 's/--ublk//') # the first one is ublk0
            [ $(ls /dev/ublkb* | wc -l) = 64 ]
            dd if=/dev/zero of=/dev/ublkb63 bs=1M count=4 conv=fsync 2>/dev/null
            stop 0; while ls /dev/ublkc* >/dev/null 2>&1; do sleep 0.02; done""")

    @long_test
    def test_made_and_deleted_200_times(self):
        guest = self.boot(size="4M")
        guest.run(f"""{SERVE}
            n=0; while [ $n -lt 200 ]; do
                serve 0 --depth 8 /tmp/disk.img; dd if=/dev/ublkb0 of=/dev/null bs=64k 2>/dev/null; stop 0; n=$((n + 1))
            done""", timeout=600)


class TestAttached(UblkCase):
    """With a supervisor: a worker that dies is followed by another one, and nobody notices."""
    def boot(self, *programs, **options):
        guest = super().boot("mkfs.ext4", "e2fsck", *programs, **options)
        guest.run("mkdir /run/bight")
        return guest

    def test_attach_list_detach(self):
        guest = self.boot()
        output = guest.run("""
            d=$(bight attach /tmp/disk.img); echo $d; bight list; bight show disk --json >/dev/null
            mkfs.ext4 -q $d; mount $d /mnt; echo hello >/mnt/hello
            bight detach disk || echo $?
            umount /mnt; sleep 1000 <$d & reader=$!
            bight detach disk || echo $?
            kill $reader; wait $reader || true
            bight detach disk; [ ! -e $d ]; [ ! -e /dev/ublkc0 ]
            [ "$(bight attach --ublk=7 --name other /tmp/disk.img)" = /dev/ublkb7 ]
            mount /dev/ublkb7 /mnt; [ "$(cat /mnt/hello)" = hello ]; umount /mnt; bight detach /dev/ublkb7
            [ -z "$(bight list)" ]""")
        self.assertRegex(output, r"^/dev/ublkb0\n(.*\n)*disk +running +.*/dev/ublkb0 ")
        self.assertRegex(output, r"ublkb0: mounted on /mnt; .*\n1\n.*ublkb0: opened by \w+ \(\d+\); .*\n1\n")

    def kill_workers_under_load(self, number, load, timeout=PATIENCE):
        """In the middle of I/O, some times over: fio finds every block as it wrote it."""
        guest = self.boot("fio", memory=768)
        guest.run("bight attach /tmp/disk.img")
        job = guest.start(load)
        guest.run(f"""{KILL_WORKERS}
            kill_workers {number}""", timeout=timeout)
        self.assertFalse(job.is_done(), "it was over before the last kill")
        return guest, job

    def test_killed_workers(self):
        guest, job = self.kill_workers_under_load(4, VERIFY)
        status, output = job.wait()
        self.assertEqual(status, 0, output)
        guest.run("bight detach disk; [ ! -e /dev/ublkc0 ]")

    @long_test
    def test_killed_workers_20_times(self):
        guest, job = self.kill_workers_under_load(20, f"until [ -e /tmp/stop ]; do {VERIFY}; done", 900)
        guest.run("touch /tmp/stop")
        status, output = job.wait(900)
        self.assertEqual(status, 0, output)
        guest.run("bight detach disk; [ ! -e /dev/ublkc0 ]")

    def test_another_image_and_size(self):
        """The file system on it goes on with another image; before Linux 6.16 the size stays, which is said."""
        guest = self.boot("cmp", size="60M")
        output = guest.run("""
            bight attach /tmp/disk.img; mkfs.ext4 -q /dev/ublkb0; cp /tmp/disk.img /tmp/other.img
            mount /dev/ublkb0 /mnt; bight switch disk /tmp/other.img; echo new >/mnt/new; umount /mnt
            e2fsck -fn /tmp/other.img; ! cmp -s /tmp/disk.img /tmp/other.img
            truncate -s 68M /tmp/other.img; bight resize disk || echo $?; bight detach disk""")
        self.assertRegex(output, r"ublkb0 keeps its size: .*6\.16.*\n1\n")

    def test_killed_supervisor_and_worker(self):
        guest = self.boot()
        guest.run("""
            bight attach --name one /tmp/disk.img; mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt
            echo before >/mnt/before; sync""")
        load = guest.start("""for i in 1 2 3 4 5 6; do
            dd if=/dev/zero of=/mnt/big bs=64k count=300 conv=fsync 2>&1; done""")
        guest.run(f"""{KILL_BOTH}
            until [ -e /mnt/big ]; do sleep 0.02; done
            kill_both
            bight recover; bight list | grep -q running""")
        status, output = load.wait()
        self.assertEqual(status, 0, output)
        guest.run("""
            [ "$(cat /mnt/before)" = before ]; umount /mnt; e2fsck -fn /dev/ublkb0; bight detach one
            [ ! -e /dev/ublkc0 ]""")

    def test_killed_where_they_are_the_last_in_a_mount_namespace(self):
        """The kernel unmounts the device as they end, and has somebody to wait for it."""
        guest = self.boot("unshare")
        for after in ("bight recover; bight list | grep -q running", ":"):
            guest.run(f"""{KILL_BOTH}
                unshare -m sh -euc 'bight attach --name one /tmp/disk.img; mkfs.ext4 -qF /dev/ublkb0
                    mount /dev/ublkb0 /mnt; echo kept >/mnt/kept; sync; echo new >/mnt/new'
                kill_both
                {after}
                until bight detach one; do sleep 0.05; done
                while [ -e /dev/ublkc0 ]; do sleep 0.02; done
                e2fsck -p /tmp/disk.img || [ $? = 1 ]""")
        guest.run("""mount $(bight attach /tmp/disk.img) /mnt; [ "$(cat /mnt/kept)" = kept ]; umount /mnt""")

    def test_dead_device_is_detached(self):
        """Who waits for it gets errors, and goes on."""
        guest = self.boot()
        guest.run(f"""{KILL_BOTH}
            bight attach --name one /tmp/disk.img
            kill_both""")
        reader = guest.start("dd if=/dev/ublkb0 of=/dev/null bs=4k count=1 iflag=direct")
        guest.run("bight detach one; while [ -e /dev/ublkc0 ]; do sleep 0.02; done; [ -z \"$(bight list)\" ]")
        self.assertNotEqual(reader.wait()[0], 0)


class TestOtherKernels(GuestCase):
    def test_kernel_without_ublk(self):
        guest = self.guest(programs=[BIGHT], modules=["fuse"], linux=KERNEL_WITHOUT_UBLK)
        output = guest.run("""truncate -s 8M /tmp/disk.img; mkdir /run/bight
            bight serve --ublk /tmp/disk.img || echo $?; bight attach --ublk /tmp/disk.img || echo $?
            bight serve --fuse /tmp/file --passthrough /tmp/disk.img || echo $?
            bight attach --nbd unix:/tmp/sock /tmp/disk.img; bight detach disk; uname -r""")
        self.assertRegex(output, r"(bight: ublk: /dev/ublk-control: not there; .*Linux 6.0.*\n1\n){2}"
                                 r"bight: --passthrough: this kernel's FUSE has none .*\n1\n.*\n6\.1\.")

    def boot_with_zero_copy(self, *programs):
        disk = harness.write_file(os.path.join(self.dir, "disk"), size=256 * M)
        guest = self.guest(modules=["ublk_drv"], memory=768, linux=KERNEL_WITH_ZERO_COPY, disks=[disk],
                           programs=[BIGHT, "fio", "mkfs.ext4", *programs])
        guest.run("""mkdir /run/bight /disk; mkfs.ext4 -q /dev/vda; mount /dev/vda /disk
            truncate -s 100M /disk/disk.img; bight attach /disk/disk.img""")
        return guest

    def test_without_copies(self):
        """The requests' pages are the buffers of the image's I/O; what has to be seen is copied by hand."""
        guest = self.boot_with_zero_copy("cmp", "e2fsck", "resize2fs")
        output = guest.run(f"""
            worker=$(bight show disk --json | sed -n 's/.*"worker_pid": *\\([0-9]*\\).*/\\1/p')
            {VERIFY}; grep RssAnon /proc/$worker/status
            bight set disk io=buffered; {VERIFY}; bight set disk io=direct
            mkfs.ext4 -q /dev/ublkb0; mount /dev/ublkb0 /mnt
            tar -C / -cf - usr/bin busybox | tar -C /mnt -xf -
            truncate -s 120M /disk/disk.img; bight resize disk; [ $(blockdev --getsize64 /dev/ublkb0) = {120 * M} ]
            resize2fs /dev/ublkb0 2>&1
            cmp /usr/bin/bight /mnt/usr/bin/bight; umount /mnt
            mount /dev/ublkb0 /mnt; cmp /usr/bin/fio /mnt/usr/bin/fio; umount /mnt
             e2fsck -fn /dev/ublkb0; bight detach disk; e2fsck -fn /disk/disk.img""")
        # Each tag's memory was not touched: 32 of them had up to 64 KiB each.
        self.assertLess(int(re.search(r"RssAnon:\s*([0-9]+) kB", output)[1]), 1500)

    @long_test
    def test_killed_workers_without_copies(self):
        guest = self.boot_with_zero_copy()
        job = guest.start(VERIFY)
        guest.run(f"""{KILL_WORKERS}
            kill_workers 3""")
        status, output = job.wait()
        self.assertEqual(status, 0, output)
        guest.run("bight detach disk; [ ! -e /dev/ublkc0 ]")
