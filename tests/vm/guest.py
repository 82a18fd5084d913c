"""A Linux guest in QEMU, for what the kernel of this machine lacks: ublk, the nbd driver, a virtio disk.

A test names the kernel modules and the programs that it needs; both go into an initramfs with busybox, and the guest
is up in a few seconds without KVM, which may be there and not work. The kernel comes from Debian's archive (apt-get
download), once, into ~/.cache/bight/vm. What cannot be had skips the test and says why.

    with Guest(modules=["nbd"], programs=[BIGHT, "mkfs.ext4"]) as guest:
        guest.run("mkfs.ext4 -q /dev/nbd0")           # its output; AssertionError unless it ends with 0
        job = guest.start("dd if=/dev/nbd0 of=/dev/null")
        ...                                           # the host acts meanwhile
        status, output = job.wait()

Scripts run under dash with -eu. One guest runs at a time, on a machine: they are heavy.
"""
import base64
import contextlib
import fcntl
import functools
import glob
import lzma
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
import unittest

import harness
from harness import PATIENCE, die_with_parent, have, undo_stack

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bight", "vm")
KERNEL = "6.12"  # Debian 12's newest
KERNEL_WITHOUT_UBLK = ("6.1", None)
KERNEL_WITH_ZERO_COPY = ("6.18", "trixie-backports")
VIRTIO_DISK = ["virtio_blk"]
INIT = r"""#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/busybox HOME=/root LC_ALL=C
/busybox/mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /tmp /run /mnt /root
mount -t tmpfs -o size=90% tmp /tmp
mount -t tmpfs run /run
mkdir /run/agent
ifconfig lo up
while read -r module options; do insmod /modules/$module.ko $options; done </modules/order
if grep -q root=/dev/vda /proc/cmdline && [ ! -e /extlinux.conf ]; then
    mount -t ext4 /dev/vda /mnt
    exec switch_root /mnt /init
fi
until name=$(grep -lx agent /sys/class/virtio-ports/*/name 2>/dev/null); do sleep 0.01; done
port=$(basename $(dirname $name))
exec 3<>/dev/$port
cd /tmp
echo 0 0 >&3
while read -r id script <&3; do
    (
        exec </dev/null 3>&1 >/run/agent/$id.out 2>&1
        echo $script | base64 -d >/run/agent/$id
        status=0
        sh -eu /run/agent/$id 3>&- || status=$?
        { echo -n "$id $status "; base64 -w 0 /run/agent/$id.out; echo; } >/run/agent/$id.answer
        until mkdir /run/agent/lock 2>/dev/null; do sleep 0.01; done
        cat /run/agent/$id.answer >&3
        rmdir /run/agent/lock
    ) 1>&3 &
done
"""


def skip(why):
    raise unittest.SkipTest(f"no guest: {why}")


# ---- What a guest is made of


def _apt(suite):
    """apt-get's and apt-cache's options for that suite of Debian's archive alone; the machine's own lists stay."""
    if not suite:
        return []
    folder = os.path.join(CACHE, suite)
    for name in ("lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    sources = harness.write_file(os.path.join(folder, "sources.list"), (
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
        f"http://deb.debian.org/debian {suite} main\n").encode())
    options = ["-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null",
               "-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    if not glob.glob(os.path.join(folder, "lists/*_Packages*")):
        _apt_get(options, "update", "-qq")
    return options


def _apt_get(options, *command, cwd=None):
    """Its last words, if it fails."""
    patience = ["-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"]
    done = subprocess.run(["apt-get", *patience, *options, *command], cwd=cwd, capture_output=True, text=True,
                          check=False)
    return None if not done.returncode else (done.stderr.strip() or "failed").splitlines()[-1]


def _newest(names):
    return max(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)], default=None)


def _unpacked(version, suite):
    """The files of the newest package with a kernel of that version, under CACHE."""
    options, pattern = _apt(suite), rf"linux-image-{re.escape(version)}\.[^ ]*-cloud-amd64"
    known = subprocess.run(["apt-cache", *options, "search", "--names-only", f"^{pattern}$"], capture_output=True,
                           text=True, check=False).stdout
    package = _newest(re.findall(rf"^({pattern}) ", known, re.M))
    kept = _newest(name for name in os.listdir(CACHE) if re.fullmatch(pattern, name))
    if not package or package == kept:
        return os.path.join(CACHE, kept or skip(f"apt knows no cloud kernel {version}; run apt-get update"))
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="part-") as part:
        failed = _apt_get(options, "download", package, cwd=part)
        debs = glob.glob(os.path.join(part, "*.deb"))
        if failed or not debs:
            return os.path.join(CACHE, kept or skip(f"apt-get download {package}: {failed or 'nothing came'}"))
        harness.run("dpkg", "-x", debs[0], os.path.join(part, "files"))
        if not os.path.exists(os.path.join(part, "files/lib")):  # since Debian 13
            os.symlink("usr/lib", os.path.join(part, "files/lib"))
        os.rename(os.path.join(part, "files"), os.path.join(CACHE, package))
    return os.path.join(CACHE, package)


@functools.cache
def kernel(version=KERNEL, suite=None):
    """(the kernel's image, the folder of its modules)"""
    if not have("apt-get") or os.uname().machine != "x86_64":
        skip("needs Debian's packages for amd64")
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = _unpacked(version, suite)
        modules = glob.glob(os.path.join(folder, "lib/modules/*"))[0]
        if not os.path.exists(os.path.join(modules, "modules.dep")):
            harness.run("depmod", "-b", folder, os.path.basename(modules))
        bzimage, image = glob.glob(os.path.join(folder, "boot/vmlinuz-*"))[0], os.path.join(folder, "vmlinux")
        if not os.path.exists(image) and not _unzstd(bzimage, image):
            image = bzimage
    return image, modules


def _unzstd(bzimage, image):
    """The ELF image inside boots a second faster than what unpacks itself."""
    data = harness.read_file(bzimage)
    at = data.find(b"\x28\xb5\x2f\xfd")
    if at < 0 or not have("zstd"):
        return False
    done = subprocess.run(["zstd", "-dcq"], input=data[at:], capture_output=True, check=False)  # garbage follows
    if not done.stdout.startswith(b"\x7fELF"):
        return False
    harness.write_file(image + ".part", done.stdout)
    os.rename(image + ".part", image)
    return True


def _modules(folder, names):
    """[(name, contents)], each after those that it depends on; what is built in is none."""
    needs = {}
    with open(os.path.join(folder, "modules.dep")) as file:
        for line in file:
            path, deps = line.split(":")
            needs[re.sub(r"\.ko.*", "", os.path.basename(path)).replace("-", "_")] = (path, deps.split())
    with open(os.path.join(folder, "modules.builtin")) as file:
        builtin = {os.path.basename(line.strip())[:-3].replace("-", "_") for line in file}
    found = {}

    def add(name):
        name = re.sub(r"\.ko.*", "", os.path.basename(name)).replace("-", "_")
        if name in found or name in builtin:
            return
        if name not in needs:
            skip(f"its kernel has no module {name}")
        path, deps = needs[name]
        for dep in reversed(deps):
            add(dep)
        data = harness.read_file(os.path.join(folder, path))
        found[name] = lzma.decompress(data) if path.endswith(".xz") else data

    for name in names:
        add(name)
    return found


@functools.cache
def _libraries(program):
    """What ldd names, and the loader."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return re.findall(r"(/\S+) \(0x", said.stdout) if not said.returncode else []


class Initramfs:
    """A cpio archive, "newc"."""

    def __init__(self):
        self.parts, self.known = [], set()

    def add(self, path, mode, data=b""):
        path = path.strip("/")
        if path in self.known:
            return
        self.known.add(path)
        if os.path.dirname(path):
            self.add(os.path.dirname(path), 0o40755)
        name = path.encode() + b"\0"
        fields = [len(self.known), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self.parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def program(self, path, name=None):
        real = os.path.realpath(path)
        if name or real != path:
            self.add(name or path, 0o100755, harness.read_file(real))
        self.add(real, 0o100755, harness.read_file(real))
        for library in _libraries(real):
            self.add(library, 0o100755, harness.read_file(os.path.realpath(library)))

    def write(self, path):
        self.add("TRAILER!!!", 0)
        with open(path, "wb") as file:
            file.writelines(self.parts)


def _initramfs(path, module_folder, modules, programs, files):
    archive = Initramfs()
    busybox = have("busybox")
    applets = harness.run(busybox, "--list").stdout.split()
    archive.add("/busybox/busybox", 0o100755, harness.read_file(busybox))
    for applet in applets:
        archive.add(f"/busybox/{applet}", 0o120777, b"busybox")
    archive.program("/bin/dash", "/bin/sh")  # busybox's own shell takes its applets for every command
    archive.add("/sbin/modprobe", 0o120777, b"/busybox/true")
    archive.add("/init", 0o100755, INIT.encode())
    archive.add("/etc/passwd", 0o100644, b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    archive.add("/etc/group", 0o100644, b"root:x:0:\nuser:x:1000:\n")
    archive.add("/etc/mtab", 0o120777, b"/proc/mounts")
    for folder in ("proc", "sys", "dev"):
        archive.add(folder, 0o40755)
    options = dict(module.split(" ", 1) for module in modules if " " in module)
    found = _modules(module_folder, [module.split(" ")[0] for module in modules])
    for name, data in found.items():
        archive.add(f"/modules/{name}.ko", 0o100644, data)
    order = "".join(f"{name} {options.get(name, '')}\n" for name in found)
    archive.add("/modules/order", 0o100644, order.encode())
    for program in programs:
        found = have(program) or skip(f"not installed: {program}")
        archive.program(found, "/usr/bin/" + os.path.basename(program))
    for name, data in files.items():
        archive.add(name, 0o100755, data.encode() if isinstance(data, str) else data)
    archive.write(path)


EXTLINUX = """DEFAULT linux
LABEL linux
LINUX /vmlinuz
INITRD /initramfs
APPEND console=ttyS0 panic=-1 quiet mitigations=off root=/dev/vda
"""


def bootable_disk(path, size, programs=()):
    """An image with a boot loader, a kernel and all that a guest has, for Guest(boots_from_disk=True)."""
    if not have("extlinux") or not have("busybox"):
        skip("not installed: extlinux, busybox")
    _, modules = kernel()
    harness.write_file(path, size=size)
    with harness.loop_device(size, backing=path) as device:
        harness.run("mkfs.ext4", "-q", "-O", "^64bit,^metadata_csum", device)  # what the boot loader can read
        with harness.mounted(device, "ext4") as root:
            _initramfs(f"{root}/initramfs", modules, VIRTIO_DISK, programs, {})
            with open(f"{root}/initramfs", "rb") as archive:
                harness.run("busybox", "cpio", "-id", stdin=archive, cwd=root)
            shutil.copy(glob.glob(f"{modules}/../../../boot/vmlinuz-*")[0], f"{root}/vmlinuz")
            harness.write_file(f"{root}/extlinux.conf", EXTLINUX.encode())
            harness.run("extlinux", "--install", root)
    return path


# ---- The guest


class Job:
    """A script that runs in the guest."""

    def __init__(self, guest, number):
        self.guest, self.number = guest, number

    def is_done(self):
        self.guest.receive(0)
        return self.number in self.guest.answers

    def wait(self, timeout=PATIENCE):
        """(exit status, output)"""
        deadline = time.monotonic() + timeout
        while self.number not in self.guest.answers:
            if not self.guest.receive(deadline - time.monotonic()):
                raise AssertionError(f"no answer from the guest\n{self.guest.console()}")
        return self.guest.answers[self.number]


class Guest:
    """A running guest; leaving the block ends it, as a power cut would.

    modules   kernel modules ("nbd nbds_max=4" has options), programs: on the host's PATH or paths, with what they need
    files     {path in the guest: contents}
    disks     images on the host: /dev/vda and on; vhost_user: sockets of servers, after them, each with the
              device's options behind a space
    args      more for QEMU
    counting  one CPU, whose clock goes on by one nanosecond with each instruction: CPU times are counts of instructions
    linux     (version, suite of the archive that has it; None: those that the machine uses)
    boots_from_disk  by the BIOS, from the first of vhost_user, which bootable_disk() has made
    """

    def __init__(self, modules=(), programs=(), files=None, disks=(), vhost_user=(), args=(), memory=512, cpus=2,
                 linux=(KERNEL, None), counting=False, boots_from_disk=False):
        for tool in ("qemu-system-x86_64", "busybox", "dpkg", "depmod"):
            if not have(tool):
                skip(f"not installed: {tool}")
        image, module_folder = kernel(*linux)
        self.stack = undo_stack()
        self.dir = self.stack.enter_context(harness.scratch_dir(parent="/dev/shm"))
        self.answers, self.buffer, self.nr_started = {}, b"", 0
        modules = ["virtio_pci", "virtio_console", *modules, *(VIRTIO_DISK if disks or vhost_user else ())]
        try:
            if not boots_from_disk:
                _initramfs(os.path.join(self.dir, "initramfs"), module_folder, modules, programs, files or {})
        except BaseException:
            self.stack.close()
            raise
        direct = ["-kernel", image, "-initrd", os.path.join(self.dir, "initramfs"),
                  "-append", "console=ttyS0 panic=-1 quiet mitigations=off"]
        self.command = [
            have("qemu-system-x86_64"), "-cpu", "max", "-m", str(memory), "-smp", str(1 if counting else cpus),
            "-accel", "tcg,thread=" + ("single" if counting else "multi"), "-display", "none", "-nodefaults",
            "-no-reboot", "-serial", f"file:{self.dir}/console", *([] if boots_from_disk else direct),
            "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=agent"]
        for number, disk in enumerate(disks):
            self.command += ["-drive", f"if=none,id=disk{number},format=raw,discard=unmap,file={disk}",
                             "-device", f"virtio-blk-pci,drive=disk{number}"]
        if vhost_user:  # the server maps the guest's memory
            self.command += ["-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on",
                             "-machine", "memory-backend=mem"]
        for number, path in enumerate(vhost_user):
            path, _, options = path.partition(" ")
            boot = ",bootindex=1" if boots_from_disk and not number else ""
            self.command += ["-chardev", f"socket,id=vhost{number},path={path}", "-device",
                             f"vhost-user-blk-pci,chardev=vhost{number},{options or f'num-queues={cpus}'}{boot}"]
        if counting:
            self.command += ["-icount", "shift=0,sleep=off"]
        self.command += args

    def __enter__(self):
        try:
            self.boot()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind, *_):
        if kind is not None and kind is not unittest.SkipTest:
            print(self.console(), flush=True)
        self.stack.close()

    def boot(self):
        lock = self.stack.enter_context(open(os.path.join(CACHE, "one-guest"), "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        for last in (False, False, True):
            self.start_machine()
            try:
                Job(self, 0).wait()
                return
            except AssertionError:
                # Linux patches its own code while it boots, and now and then an emulated CPU meets the breakpoint
                # that should keep it out. It has nothing to do with what is tested: once more.
                if last or "Oops: int3" not in self.console():
                    raise
                self.kill()

    def start_machine(self):
        ours, theirs = socket.socketpair()
        self.socket = self.stack.enter_context(ours)
        with theirs, open(os.path.join(self.dir, "qemu"), "w") as output:
            self.process = subprocess.Popen(
                [*self.command, "-chardev", f"socket,id=agent,fd={theirs.fileno()}"], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, preexec_fn=die_with_parent, pass_fds=[theirs.fileno()])
        self.stack.callback(self.kill)

    def kill(self):
        """A power cut."""
        self.process.kill()
        self.process.wait()

    def console(self):
        text = ""
        for name in ("qemu", "console"):
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self.dir, name), errors="replace") as file:
                text += f"guest's {name}:\n" + "".join(file.readlines()[-60:])
        return text

    def receive(self, timeout):
        """Take what has come, or comes in time. False: nothing."""
        if not select.select([self.socket], [], [], max(0, timeout))[0]:
            return False
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = self.socket.recv(1 << 16)
        if not data:
            raise AssertionError(f"the guest has ended\n{self.console()}")
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            number, status, *output = line.decode().split(" ")
            text = base64.b64decode(output[0] if output else "").decode(errors="replace")
            self.answers[int(number)] = (int(status), text)
        return True

    def start(self, script):
        """Have a script run while the host does something else."""
        self.nr_started += 1
        self.socket.sendall(f"{self.nr_started} {base64.b64encode(script.encode()).decode()}\n".encode())
        return Job(self, self.nr_started)

    def run(self, script, status=0, timeout=PATIENCE):
        """Run a script to its end; its exit status has to be `status` (None: any). Returns its output."""
        ended, output = self.start(script).wait(timeout)
        if status is not None and ended != status:
            raise AssertionError(f"exit status {ended}, not {status}, in the guest:\n{script}\n{output}")
        return output


def run(script, **options):
    """A guest for one script: (exit status, output)."""
    with Guest(**options) as guest:
        return guest.start(script).wait()


@functools.cache
def why_not():
    """What keeps these tests from running, or None."""
    if harness.QUICK:
        return "guests run in the plain run of the tests only"
    if harness.sanitized():
        return "guests run the plain program only"
    return None


def long_test(thing):
    """Too long for every commit."""
    return unittest.skipUnless(os.environ.get("BIGHT_TEST_LONG") == "1", "takes long; set BIGHT_TEST_LONG=1")(thing)


class GuestCase(unittest.TestCase):
    def setUp(self):
        if why_not():
            self.skipTest(why_not())
        self.dir = self.enterContext(harness.scratch_dir())

    def guest(self, **options):
        return self.enterContext(Guest(**options))
