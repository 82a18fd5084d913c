// A front-end and its guest. The first byte says which ring the device is on, and whether the messages begin
// with those that set up a queue, split or packed; then comes what is in the shared memory, a message's worth
// of which is each piece of the rest: request, how many files of which kind, length, payload.

#include "fuzz_device.h"

#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/vhost_user/session.h"
#include "util/util.h"

#define MEMORY_BYTES (64 * KiB)
#define GUEST_BASE 0x10000U
#define RING_SIZE 16
#define MAX_MESSAGES 64

static int memfd;
static char *memory;

struct front_end {
    int fd;
    bool is_closed;
    bool has_writeback;
};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    make_devices();
    memfd = memfd_create("guest", MFD_CLOEXEC);
    must(memfd >= 0 && !ftruncate(memfd, MEMORY_BYTES));
    memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    must(memory != MAP_FAILED);
    return 0;
}

static void front_end_closed(void *arg)
{
    struct front_end *front_end = arg;

    front_end->is_closed = true;
}

// What the server has read stays read: it may have hung up, which is no error.
static void send_message(struct front_end *front_end, uint32_t request, const void *payload, uint32_t bytes,
                         const int *fds, unsigned nr_fds)
{
    struct vu_header header = {request, VU_VERSION | VU_NEED_REPLY, bytes};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, bytes}};
    char control[CMSG_SPACE(16 * sizeof(int))] = {0};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};

    if (nr_fds) {
        struct cmsghdr *cmsg;

        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, nr_fds * sizeof(int));
    }
    sendmsg(front_end->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void send_setup(struct front_end *front_end, bool is_packed, int kick_fd)
{
    uint64_t features = config_features(devs[0]), zero = 0;
    uint64_t protocol_features = CONFIG_PROTOCOL_FEATURES;
    struct vu_mem_table table = {.nr_regions = 1, .regions = {{GUEST_BASE, MEMORY_BYTES, GUEST_BASE, 0}}};
    struct vu_vring_state num = {0, RING_SIZE}, base = {0, is_packed ? 0x8000 : 0}, enable = {0, 1};
    struct vu_vring_addr addr = {.desc = GUEST_BASE, .avail = GUEST_BASE + 256, .used = GUEST_BASE + 512};

    if (!is_packed)
        features &= ~VU_BIT(VIRTIO_F_RING_PACKED);
    send_message(front_end, VU_SET_PROTOCOL_FEATURES, &protocol_features, sizeof(features), NULL, 0);
    send_message(front_end, VU_SET_FEATURES, &features, sizeof(features), NULL, 0);
    send_message(front_end, VU_SET_MEM_TABLE, &table, offsetof(struct vu_mem_table, regions) + 32, &memfd, 1);
    send_message(front_end, VU_SET_VRING_NUM, &num, sizeof(num), NULL, 0);
    send_message(front_end, VU_SET_VRING_BASE, &base, sizeof(base), NULL, 0);
    send_message(front_end, VU_SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0);
    send_message(front_end, VU_SET_VRING_CALL, &zero, sizeof(zero), &kick_fd, 1);
    send_message(front_end, VU_SET_VRING_ERR, &zero, sizeof(zero), &kick_fd, 1);
    send_message(front_end, VU_SET_VRING_KICK, &zero, sizeof(zero), &kick_fd, 1);
    send_message(front_end, VU_SET_VRING_ENABLE, &enable, sizeof(enable), NULL, 0);
}

static void send_rest(struct front_end *front_end, const uint8_t *data, size_t len, int kick_fd)
{
    for (unsigned n = 0; n < MAX_MESSAGES && len >= 3; n++) {
        size_t bytes = min_of(data[2], len - 3);
        int fds[4] = {memfd, kick_fd, memfd, kick_fd};

        send_message(front_end, data[0] % 48, data + 3, (uint32_t)bytes, data[1] & 4 ? fds + 1 : fds,
                     data[1] & 3);
        data += 3 + bytes;
        len -= 3 + bytes;
    }
}

static void timed_out(struct ring_op *op, int res)
{
    (void)op;
    (void)res;
    must(!"it has come to its end");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    unsigned choice = len ? data[0] : 0;
    size_t memory_len = len > 3 ? min_of((size_t)data[1] << 8 | data[2], len - 3) : 0;
    struct front_end front_end = {.has_writeback = true};
    struct ring_op timer = {.done = timed_out, .code = RING_TIMEOUT, .timeout_ns = 15 * NSEC_PER_SEC};
    int fds[2], kick_fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    struct session *session;

    must(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    memset(memory, 0, MEMORY_BYTES);
    if (memory_len)
        memcpy(memory, data + 3, memory_len);
    front_end.fd = fds[0];
    session = session_create(fds[1], &(struct session_options){
                                         .dev = devs[choice & 1],
                                         .ring = the_main_ring,
                                         .has_writeback = &front_end.has_writeback,
                                         .closed = front_end_closed,
                                         .arg = &front_end,
                                     });
    must(session);
    if (choice & 2)
        send_setup(&front_end, choice & 4, kick_fd);
    if (len > 3)
        send_rest(&front_end, data + 3 + memory_len, len - 3 - memory_len, kick_fd);
    shutdown(front_end.fd, SHUT_WR);
    ring_queue(the_main_ring, &timer);
    while (!front_end.is_closed)
        must(ring_run(the_main_ring) >= 0);
    ring_cancel_timeout(the_main_ring, &timer);
    close(front_end.fd);
    close(kick_fd);
    return 0;
}
