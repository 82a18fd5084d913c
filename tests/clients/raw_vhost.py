"""The front-end's side of vhost-user by hand: every field of a message, a descriptor or a ring can be wrong."""
import array
import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import struct

import harness
from harness import K, PATIENCE

(GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE) = range(1, 6)
(SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR,
 GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE) = range(8, 19)
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE = 21, 24, 25, 31, 32, 34
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38
VERSION, REPLY, NEED_REPLY = 1, 4, 8
PROTOCOL_F = {"MQ": 0, "REPLY_ACK": 3, "BACKEND_REQ": 5, "CONFIG": 9, "INFLIGHT_SHMFD": 12, "RESET_DEVICE": 13,
              "CONFIGURE_MEM_SLOTS": 15}
F_RO, F_FLUSH, F_CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES = 5, 9, 11, 13, 14
F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1, F_PACKED = 28, 29, 30, 32, 34
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
NEXT, WRITE, INDIRECT = 1, 2, 4
GUEST, USER = 0x40000000, 0x7F0000000000
WCE_AT, CONFIG_BYTES = 32, 60


class Closed(Exception):
    """The server has hung up."""


def bits(*numbers):
    return sum(1 << number for number in numbers)


class Raw:
    """A connection on which nothing was said yet, with memory to share. Layout of the memory: a split ring of
    `size` entries at 0, headers and data from 64 KiB on."""

    def __init__(self, path, memory=256 * K, size=16):
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.memfd = os.memfd_create("raw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.stack.callback(os.close, self.memfd)
        os.truncate(self.memfd, memory)
        self.memory = self.stack.enter_context(contextlib.closing(mmap.mmap(self.memfd, memory)))
        self.bytes, self.size = memory, size
        self.avail_at, self.used_at = 16 * size, 16 * size + 64 + 2 * size
        self.avail = self.used = 0
        self.acks = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def eventfd(self, value=0, flags=os.EFD_NONBLOCK | os.EFD_CLOEXEC):
        fd = os.eventfd(value, flags)
        self.stack.callback(os.close, fd)
        return fd

    # Messages

    def send(self, request, payload=b"", fds=(), flags=VERSION, size=None):
        header = struct.pack("=III", request, flags, len(payload) if size is None else size)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([header + payload], ancillary)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self, count):
        data = b""
        while len(data) < count:
            try:
                more, fds, _, _ = socket.recv_fds(self.socket, count - len(data), 4)
            except ConnectionResetError:
                more, fds = b"", []
            self.passed = [self.stack.callback(os.close, fd) and fd or fd for fd in fds] or getattr(self, "passed", [])
            if not more:
                raise Closed
            data += more
        return data

    def reply(self):
        request, flags, size = struct.unpack("=III", self.receive(12))
        assert flags & REPLY, flags
        return self.receive(size)

    def ask(self, request, payload=b"", fds=()):
        self.send(request, payload, fds)
        return self.reply()

    def u64(self, request):
        return struct.unpack("=Q", self.ask(request))[0]

    def tell(self, request, payload=b"", fds=()):
        """With an acknowledgement: whether it went well."""
        self.send(request, payload, fds, VERSION | (NEED_REPLY if self.acks else 0))
        return not self.acks or struct.unpack("=Q", self.reply())[0] == 0

    def is_closed(self):
        """Wait for the server to hang up."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return True

    def negotiate(self, off=(F_PACKED, F_EVENT_IDX), acks=True):
        self.features = self.u64(GET_FEATURES) & ~bits(*off)
        protocol = self.u64(GET_PROTOCOL_FEATURES)
        if not acks:
            protocol &= ~bits(PROTOCOL_F["REPLY_ACK"])
        self.send(SET_PROTOCOL_FEATURES, struct.pack("=Q", protocol))
        self.acks = acks
        assert self.tell(SET_OWNER)
        assert self.tell(SET_FEATURES, struct.pack("=Q", self.features))
        return self

    def region(self, guest=GUEST, size=None, user=USER, offset=0):
        return struct.pack("=QQQQ", guest, self.bytes if size is None else size, user, offset)

    def share(self):
        return self.tell(SET_MEM_TABLE, struct.pack("=II", 1, 0) + self.region(), [self.memfd])

    def state(self, index, num):
        return struct.pack("=II", index, num)

    def addr(self, index=0, desc=None, used=None, avail=None, flags=0):
        return struct.pack("=IIQQQQ", index, flags, USER if desc is None else desc,
                           USER + self.used_at if used is None else used,
                           USER + self.avail_at if avail is None else avail, 0)

    def start(self, index=0, num=None, base=0, addr=None, enable=True):
        """Sets a ring up in full. Whether all of it was accepted."""
        self.kick, self.call, self.err = self.eventfd(), self.eventfd(), self.eventfd()
        told = self.tell(SET_VRING_NUM, self.state(index, num or self.size))
        told &= self.tell(SET_VRING_BASE, self.state(index, base))
        told &= self.tell(SET_VRING_ADDR, addr or self.addr(index))
        told &= self.tell(SET_VRING_CALL, struct.pack("=Q", index), [self.call])
        told &= self.tell(SET_VRING_ERR, struct.pack("=Q", index), [self.err])
        told &= self.tell(SET_VRING_KICK, struct.pack("=Q", index), [self.kick])
        if enable:
            told &= self.tell(SET_VRING_ENABLE, self.state(index, 1))
        return told

    def ready(self, **options):
        self.negotiate(**options)
        assert self.share() and self.start()
        return self

    # The ring

    def put(self, at, data):
        self.memory[at:at + len(data)] = data

    def desc(self, i, at, length, flags=0, following=0, absolute=False):
        self.put(16 * i, struct.pack("<QIHH", at if absolute else GUEST + at, length, flags, following))

    def header(self, at, kind, sector=0):
        self.put(at, struct.pack("<IIQ", kind, 0, sector))

    def make_available(self, head, index=None):
        self.put(self.avail_at + 4 + 2 * (self.avail % self.size), struct.pack("<H", head))
        self.avail = (self.avail + 1) & 0xFFFF
        self.put(self.avail_at + 2, struct.pack("<H", self.avail if index is None else index))
        os.eventfd_write(self.kick, 1)

    def wait_used(self):
        """(id, len) of the next one."""
        deadline = harness.time.monotonic() + PATIENCE
        while struct.unpack_from("<H", self.memory, self.used_at + 2)[0] == self.used:
            if harness.time.monotonic() > deadline:
                raise AssertionError("nothing is used")
            if self.is_signalled(self.err, 0):
                raise AssertionError("the ring is broken")
            select.select([self.call], [], [], 0.01)
        entry = struct.unpack_from("<II", self.memory, self.used_at + 4 + 8 * (self.used % self.size))
        self.used = (self.used + 1) & 0xFFFF
        return entry

    def is_signalled(self, fd, timeout=PATIENCE):
        return bool(select.select([fd], [], [], timeout)[0])

    def request(self, kind, sector=0, out=b"", into=0, pieces=1):
        """One request in separate descriptors: (status, what was read, length)."""
        at = 64 * K
        self.header(at, kind, sector)
        self.put(at + 4096, out)
        self.put(at + 16, b"\xff")
        self.desc(0, at, 16, NEXT, 1)
        last = 1
        if out or into:
            self.desc(1, at + 4096, len(out) or into, NEXT | (0 if out else WRITE), 2)
            last = 2
        self.desc(last, at + 16, 1, WRITE)
        self.make_available(0)
        head, length = self.wait_used()
        assert head == 0
        return self.memory[at + 16], self.memory[at + 4096:at + 4096 + into], length
