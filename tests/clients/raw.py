"""A strict NBD client for the tests: sends any bytes, and refuses whatever a server may not answer.

Real clients forgive a lot and cannot be told to misbehave. This one checks every rule of the protocol on what it reads
(a breach raises ProtocolError), and it speaks extended headers, which the packaged clients do not.
"""
import contextlib
import select
import socket
import struct

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPT_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
EXT_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXT_REPLY_MAGIC = 0x6E8A278C

FLAG_C_FIXED_NEWSTYLE, FLAG_C_NO_ZEROES = 1, 2

(OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK_EXPORT, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY,
 OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS) = range(1, 12)

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = range(1, 5)
REP_ERR = 1 << 31
(REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID, REP_ERR_PLATFORM, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_SHUTDOWN,
 REP_ERR_BLOCK_SIZE_REQD, REP_ERR_TOO_BIG, REP_ERR_EXT_HEADER_REQD) = range(REP_ERR + 1, REP_ERR + 11)

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

(HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN,
 SEND_RESIZE, SEND_CACHE, SEND_FAST_ZERO, BLOCK_STATUS_PAYLOAD) = (1 << bit for bit in range(13))

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
COMMANDS = ("READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS")
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

REPLY_FLAG_DONE = 1
REPLY_NONE, REPLY_DATA, REPLY_HOLE, REPLY_STATUS, REPLY_STATUS_EXT = 0, 1, 2, 5, 6
REPLY_ERROR, REPLY_ERROR_OFFSET = 0x8001, 0x8002

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
ERRORS = (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN)

STATE_HOLE, STATE_ZERO = 1, 2
MAX_PAYLOAD = 32 << 20
# far beyond what anything takes: reached only by a hang
PATIENCE = 120
MODES = ("simple", "structured", "extended")


class ProtocolError(AssertionError):
    """The server sent what the protocol forbids."""


class Closed(Exception):
    """The server closed the connection."""


class OptionRefused(Exception):
    """An option was answered with an error."""

    def __init__(self, option, kind, message):
        super().__init__(f"option {option}: error {kind - REP_ERR}: {message}")
        self.kind = kind


def check(condition, what):
    if not condition:
        raise ProtocolError(what)


def check_text(data, what):
    check(len(data) <= 4096, f"{what}: {len(data)} bytes is longer than a string may be")
    check(b"\0" not in data, f"{what}: holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what}: not UTF-8: {error}") from None


def option_bytes(option, data=b"", magic=IHAVEOPT, length=None):
    return struct.pack(">QII", magic, option, len(data) if length is None else length) + data


def info_data(export="", infos=()):
    name = export.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(export, queries):
    strings = [query.encode() for query in queries]
    return struct.pack(">I", len(export.encode())) + export.encode() + struct.pack(">I", len(strings)) + b"".join(
        struct.pack(">I", len(string)) + string for string in strings)


def request_bytes(command, offset=0, length=0, flags=0, cookie=0, data=b"", extended=False, magic=None):
    """The header of a request with its payload; nothing is checked, so that it can be wrong."""
    if extended:
        return struct.pack(">IHHQQQ", EXT_REQUEST_MAGIC if magic is None else magic, flags, command, cookie, offset,
                           length) + data
    return struct.pack(">IHHQQI", REQUEST_MAGIC if magic is None else magic, flags, command, cookie, offset,
                       length) + data


class Request:
    """A request in flight, and at its end what was answered to it."""

    def __init__(self, command, offset, length, flags):
        self.command, self.offset, self.length, self.flags = command, offset, length, flags
        self.error = 0
        self.data = None
        self.extents = None
        self.chunks = []  # (type, offset, length) of content chunks
        self.error_chunks = 0
        self.contexts = {}  # metadata context id -> [(length, flags)]

    def __str__(self):
        name = COMMANDS[self.command] if self.command < len(COMMANDS) else f"command {self.command}"
        return f"{name} {self.offset}+{self.length} flags {self.flags:#x}"


class Client:
    """One connection. Calls block, for at most `timeout` seconds without progress."""

    def __init__(self, address, timeout=PATIENCE):
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else
                                  socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.timeout = timeout
        self.buffer = bytearray()
        self.mode = "simple"
        self.size = self.flags = None
        self.minimum = 1
        self.info = {}
        self.contexts = {}
        self.pending = {}
        self.finished = {}
        self.last_cookie = 0
        try:
            # blocking, with the kernel's timeout: a nonblocking connect does not wait for a place in the backlog
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 
                                 struct.pack("ll", int(timeout), int(timeout % 1 * 1e6)))
            self.sock.connect(address)
        except BlockingIOError:
            self.sock.close()
            raise TimeoutError("the server accepts no connection") from None
        except BaseException:
            self.sock.close()
            raise
        self.sock.setblocking(False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def reset(self):
        """Close so that the other side sees an error and not an orderly end (on TCP an RST)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # bytes

    def ready(self, events):
        """Wait until the socket can do one of `events`; says which."""
        poller = select.poll()
        poller.register(self.sock, events)
        found = poller.poll(self.timeout * 1000)
        if not found:
            raise TimeoutError("the server neither sends nor takes bytes")
        return found[0][1]

    def send(self, data):
        """Send everything; takes in replies meanwhile, so that neither side can wait for the other for ever."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view, socket.MSG_NOSIGNAL):]
            except BlockingIOError:
                if self.ready(select.POLLIN | select.POLLOUT) & select.POLLIN:
                    self.fill()
            except (BrokenPipeError, ConnectionResetError):
                raise Closed("while sending") from None

    def fill(self, size=1 << 18):
        while True:
            try:
                data = self.sock.recv(size)
                break
            except BlockingIOError:
                self.ready(select.POLLIN)
            except ConnectionResetError:
                raise Closed("connection reset") from None
        if not data:
            raise Closed(f"end of stream, {len(self.buffer)} bytes unread")
        self.buffer += data

    def recv(self, count):
        while len(self.buffer) < count:
            self.fill(max(1 << 18, count - len(self.buffer)))
        data = bytes(memoryview(self.buffer)[:count])
        del self.buffer[:count]
        return data

    def unpack(self, layout):
        return struct.unpack(layout, self.recv(struct.calcsize(layout)))

    def drain(self):
        """Read until the server closes; what came is thrown away."""
        with contextlib.suppress(Closed):
            while True:
                self.fill()
                self.buffer.clear()

    # handshake

    def greet(self, flags=FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
        magic, opt_magic, server_flags = self.unpack(">QQH")
        check(magic == NBDMAGIC and opt_magic == IHAVEOPT, "greeting: wrong magic")
        check(server_flags & ~3 == 0, f"greeting: unknown handshake flags {server_flags:#x}")
        self.no_zeroes = bool(flags & FLAG_C_NO_ZEROES)
        self.send(struct.pack(">I", flags))
        return server_flags

    def option(self, option, data=b""):
        """Send an option; returns its replies as (type, payload), the last of which is the final one."""
        self.send(option_bytes(option, data))
        return self.option_replies(option)

    def option_replies(self, option):
        replies = []
        allowed = {OPT_LIST: REP_SERVER, OPT_INFO: REP_INFO, OPT_GO: REP_INFO, OPT_LIST_META_CONTEXT: REP_META_CONTEXT,
                   OPT_SET_META_CONTEXT: REP_META_CONTEXT}
        while True:
            magic, echoed, kind, length = self.unpack(">QIII")
            check(magic == OPT_REPLY_MAGIC, f"option reply: wrong magic {magic:#x}")
            check(echoed == option, f"option {option}: the reply names option {echoed}")
            check(length <= 1 << 16, f"option {option}: a reply of {length} bytes")
            payload = self.recv(length)
            replies.append((kind, payload))
            if kind & REP_ERR:
                check(kind <= REP_ERR_EXT_HEADER_REQD, f"option {option}: unknown error {kind:#x}")
                check_text(payload, "error message")
                return replies
            if kind == REP_ACK:
                check(not payload, f"option {option}: data in an ACK")
                if option in (OPT_GO, OPT_INFO):
                    check(any(k == REP_INFO and p[:2] == b"\0\0" for k, p in replies), "ACK without INFO_EXPORT")
                return replies
            check(kind == allowed.get(option), f"option {option}: reply type {kind}")

    def must(self, option, data=b""):
        """An option that has to succeed; returns the payloads before the ACK."""
        replies = self.option(option, data)
        if replies[-1][0] != REP_ACK:
            raise OptionRefused(option, replies[-1][0], replies[-1][1].decode())
        return [payload for _, payload in replies[:-1]]

    def list(self):
        exports = {}
        for payload in self.must(OPT_LIST):
            length = struct.unpack(">I", payload[:4])[0]
            check(length <= len(payload) - 4, "LIST: the name is longer than its reply")
            name = check_text(payload[4:4 + length], "LIST: name")
            check(name not in exports, f"LIST: {name!r} twice")
            exports[name] = check_text(payload[4 + length:], "LIST: description")
        return exports

    def query(self, option, export="", infos=()):
        """INFO or GO; returns {information type: value}."""
        found = {}
        for payload in self.must(option, info_data(export, infos)):
            check(len(payload) >= 2, "INFO: shorter than its type")
            kind = struct.unpack(">H", payload[:2])[0]
            check(kind not in found, f"INFO: type {kind} twice")
            body = payload[2:]
            if kind == INFO_EXPORT:
                check(len(body) == 10, "INFO_EXPORT: wrong length")
                found[kind] = struct.unpack(">QH", body)
            elif kind == INFO_BLOCK_SIZE:
                check(len(body) == 12, "INFO_BLOCK_SIZE: wrong length")
                minimum, preferred, maximum = found[kind] = struct.unpack(">III", body)
                check(minimum & (minimum - 1) == 0 and 1 <= minimum <= 65536, f"minimum block size {minimum}")
                check(preferred & (preferred - 1) == 0 and preferred >= max(minimum, 512), f"preferred {preferred}")
                check(maximum == 0xFFFFFFFF or maximum % minimum == 0, f"maximum block size {maximum}")
            else:
                found[kind] = check_text(body, f"INFO {kind}")
        check(found[INFO_EXPORT][1] & HAS_FLAGS, "HAS_FLAGS is clear")
        return found

    def set_mode(self, mode):
        if mode == "structured":
            self.must(OPT_STRUCTURED_REPLY)
        elif mode == "extended":
            self.must(OPT_EXTENDED_HEADERS)
        self.mode = mode

    def meta(self, option, export="", queries=("base:allocation",)):
        """LIST or SET_META_CONTEXT; returns {name: id}."""
        contexts = {}
        for payload in self.must(option, meta_data(export, queries)):
            check(len(payload) >= 4, "META_CONTEXT: shorter than its id")
            name = check_text(payload[4:], "META_CONTEXT: name")
            check(name not in contexts, f"META_CONTEXT: {name} twice")
            contexts[name] = struct.unpack(">I", payload[:4])[0]
        if option == OPT_SET_META_CONTEXT:
            check(len(set(contexts.values())) == len(contexts), "META_CONTEXT: the ids are not unique")
            self.contexts = contexts
        return contexts

    def go(self, export="", infos=(INFO_BLOCK_SIZE,)):
        self.info = self.query(OPT_GO, export, infos)
        self.enter(*self.info[INFO_EXPORT])
        if INFO_BLOCK_SIZE in infos and INFO_BLOCK_SIZE in self.info:
            self.minimum = self.info[INFO_BLOCK_SIZE][0]

    def export_name(self, export=""):
        self.send(option_bytes(OPT_EXPORT_NAME, export.encode()))
        self.enter(*self.unpack(">QH"))
        if not self.no_zeroes:
            check(self.recv(124) == bytes(124), "EXPORT_NAME: the padding is not zero")

    def enter(self, size, flags):
        self.size, self.flags = size, flags
        check(flags & HAS_FLAGS, "HAS_FLAGS is clear")
        check(bool(flags & SEND_DF) <= (self.mode != "simple"), "SEND_DF without structured replies")
        check(flags & SEND_WRITE_ZEROES or not flags & SEND_FAST_ZERO, "SEND_FAST_ZERO without SEND_WRITE_ZEROES")

    # transmission

    def request(self, command, offset=0, length=0, flags=0, data=b"", cookie=None):
        """The bytes of a request that is then expected to be answered; PAYLOAD_LEN is set where it has to be."""
        if cookie is None:
            self.last_cookie = cookie = self.last_cookie + 1
        check(cookie not in self.pending, "test: cookie is in use")
        if command == WRITE and not length:
            length = len(data)
        if self.mode == "extended" and command == WRITE and length:
            flags |= PAYLOAD_LEN
        if command != DISC:
            self.pending[cookie] = Request(command, offset, length, flags)
        return cookie, request_bytes(command, offset, length, flags, cookie, data, self.mode == "extended")

    def issue(self, command, offset=0, length=0, flags=0, data=b"", cookie=None):
        cookie, message = self.request(command, offset, length, flags, data, cookie)
        self.send(message)
        return cookie

    def wait(self, cookie):
        while cookie not in self.finished:
            self.step()
        return self.finished.pop(cookie)

    def wait_any(self):
        while not self.finished:
            self.step()
        return self.finished.popitem()

    def step(self):
        """Take in one message of the server; the request that it ends moves to `finished`."""
        magic = self.unpack(">I")[0]
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = self.unpack(">IQ")
            check(self.mode != "extended", "simple reply after extended headers were negotiated")
            request = self.lookup(cookie)
            check(error == 0 or error in ERRORS, f"{request}: error {error} is not of the protocol")
            check(not request.chunks and not request.error_chunks, f"{request}: simple reply after chunks")
            check(self.mode == "simple" or request.command != READ, "simple reply to a read in structured mode")
            check(error or request.command != BLOCK_STATUS, "simple success to BLOCK_STATUS")
            request.error = error
            if request.command == READ and not error:
                request.data = self.recv(request.length)
            self.finish(cookie)
            return
        if magic == STRUCTURED_REPLY_MAGIC and self.mode == "structured":
            flags, kind, cookie, length = self.unpack(">HHQI")
            request = self.lookup(cookie)
        elif magic == EXT_REPLY_MAGIC and self.mode == "extended":
            flags, kind, cookie, offset, length = self.unpack(">HHQQQ")
            request = self.lookup(cookie)
            check(offset == request.offset, f"{request}: the reply's header says offset {offset}")
        else:
            raise ProtocolError(f"reply magic {magic:#x} in {self.mode} mode")
        check(flags & ~REPLY_FLAG_DONE == 0, f"{request}: unknown reply flags {flags:#x}")
        check(length <= MAX_PAYLOAD + 64, f"{request}: chunk of {length} bytes")
        done = bool(flags & REPLY_FLAG_DONE)
        self.chunk(request, kind, self.recv(length), done)
        if done:
            self.conclude(request)
            self.finish(cookie)

    def lookup(self, cookie):
        check(cookie in self.pending, f"reply to cookie {cookie:#x}, which is not in flight")
        return self.pending[cookie]

    def finish(self, cookie):
        self.finished[cookie] = self.pending.pop(cookie)

    def chunk(self, request, kind, payload, done):
        if kind == REPLY_NONE:
            check(not payload and done, f"{request}: NONE with a payload or without DONE")
        elif kind in (REPLY_DATA, REPLY_HOLE):
            check(request.command == READ, f"{request}: content in the reply")
            check(len(payload) >= 9 if kind == REPLY_DATA else len(payload) == 12, f"{request}: content chunk's length")
            offset = struct.unpack(">Q", payload[:8])[0]
            length = len(payload) - 8 if kind == REPLY_DATA else struct.unpack(">I", payload[8:])[0]
            check(length, f"{request}: an empty hole")
            start = offset - request.offset
            check(0 <= start and start + length <= request.length, f"{request}: content at {offset}+{length}")
            check(all(offset + length <= o or o + n <= offset for _, o, n in request.chunks),
                  f"{request}: content at {offset}+{length} overlaps")
            check(not request.flags & DF or not request.chunks, f"{request}: fragmented in spite of DF")
            request.chunks.append((kind, offset, length))
            if request.data is None:
                request.data = bytearray(request.length)
            if kind == REPLY_DATA:
                request.data[start:start + length] = memoryview(payload)[8:]
        elif kind in (REPLY_STATUS, REPLY_STATUS_EXT):
            check(request.command == BLOCK_STATUS, f"{request}: block status in the reply")
            self.status(request, kind, payload)
        elif kind in (REPLY_ERROR, REPLY_ERROR_OFFSET):
            tail = 8 if kind == REPLY_ERROR_OFFSET else 0
            check(len(payload) >= 6 + tail, f"{request}: error chunk too short")
            error, length = struct.unpack(">IH", payload[:6])
            check(error in ERRORS, f"{request}: error {error} is not of the protocol")
            check(len(payload) == 6 + length + tail, f"{request}: the message's length does not fit its chunk")
            check_text(payload[6:6 + length], "error message")
            if tail:
                offset = struct.unpack(">Q", payload[-8:])[0]
                check(request.offset <= offset < request.offset + request.length, f"{request}: error at {offset}")
            request.error = request.error or error
            request.error_chunks += 1
        else:
            raise ProtocolError(f"{request}: chunk type {kind}")

    def status(self, request, kind, payload):
        head, entry = (4, 8) if kind == REPLY_STATUS else (8, 16)
        check(kind == REPLY_STATUS or self.mode == "extended", "BLOCK_STATUS_EXT without extended headers")
        check(len(payload) > head and (len(payload) - head) % entry == 0, f"{request}: status chunk's length")
        context = struct.unpack(">I", payload[:4])[0]
        check(context in self.contexts.values(), f"{request}: context {context} was not negotiated")
        check(context not in request.contexts, f"{request}: context {context} twice")
        extents = list(struct.iter_unpack(">II" if kind == REPLY_STATUS else ">QQ", payload[head:]))
        if kind == REPLY_STATUS_EXT:
            count = struct.unpack(">I", payload[4:8])[0]
            check(count in (0, len(extents)), f"{request}: descriptor count {count}, {len(extents)} came")
        check(all(length and length % self.minimum == 0 for length, _ in extents), f"{request}: lengths {extents}")
        check(sum(length for length, _ in extents[:-1]) < request.length, f"{request}: more than was asked for")
        check(request.offset + sum(length for length, _ in extents) <= self.size, f"{request}: past the end")
        if request.flags & REQ_ONE:
            check(len(extents) == 1 and extents[0][0] <= request.length, f"{request}: REQ_ONE, {extents}")
        request.contexts[context] = extents

    def conclude(self, request):
        """What must hold of a whole reply."""
        if request.error:
            return
        if request.command == READ:
            got = sum(length for _, _, length in request.chunks)
            check(got == request.length, f"{request}: success with {got} bytes")
            if request.data is None:
                request.data = b""
        if request.command == BLOCK_STATUS and request.length:
            check(set(request.contexts) == set(self.contexts.values()), f"{request}: contexts {request.contexts}")
            request.extents = request.contexts.get(self.contexts.get("base:allocation"))

    # whole commands

    def command(self, command, offset=0, length=0, flags=0, data=b""):
        """Send and wait; returns the answered request."""
        return self.wait(self.issue(command, offset, length, flags, data))

    def expect(self, error, command, offset=0, length=0, flags=0, data=b""):
        """The same, where the error is known before; `error` is a value or a tuple of them."""
        request = self.command(command, offset, length, flags, data)
        allowed = error if isinstance(error, tuple) else (error,)
        if request.error not in allowed:
            raise AssertionError(f"{request} in {self.mode} mode: error {request.error}, not {error}")
        return request

    def read(self, offset, length, flags=0):
        return bytes(self.expect(0, READ, offset, length, flags).data)

    def write(self, offset, data, flags=0):
        self.expect(0, WRITE, offset, len(data), flags, data)

    def flush(self):
        self.expect(0, FLUSH)

    def block_status(self, offset, length, flags=0):
        return self.expect(0, BLOCK_STATUS, offset, length, flags).extents

    def allocation(self, offset=0, length=None):
        """Walk over the range; returns [(offset, length, flags)], neighbours of the same flags merged."""
        end = self.size if length is None else offset + length
        extents = []
        while offset < end:
            for size, flags in self.block_status(offset, min(end - offset, 0xFFFFF000)):
                size = min(size, end - offset)
                if extents and extents[-1][2] == flags:
                    extents[-1] = (extents[-1][0], extents[-1][1] + size, flags)
                elif size:
                    extents.append((offset, size, flags))
                offset += size
        return extents

    def disconnect(self):
        """DISC, then wait for the server to close."""
        self.send(self.request(DISC)[1])
        while True:
            try:
                self.fill()
            except Closed:
                break
        check(not self.buffer, "bytes after DISC")
        self.close()


def connect(address, mode="structured", export="", meta=True, timeout=PATIENCE):
    """A client in the transmission phase."""
    client = Client(address, timeout)
    try:
        client.greet()
        client.set_mode(mode)
        if meta and mode != "simple":
            client.meta(OPT_SET_META_CONTEXT, export)
        client.go(export)
    except BaseException:
        client.close()
        raise
    return client
