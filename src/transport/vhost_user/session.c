#include "transport/vhost_user/session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/device.h"
#include "util/util.h"

// What a message needs stopped (S1): vrings, or the channel for the back-end's own messages.
enum quiesce { QUIESCE_NONE, QUIESCE_ONE, QUIESCE_ALL, QUIESCE_BACKEND };

struct handler {
    const char *name;
    uint32_t min_bytes, max_bytes; // of the payload
    enum quiesce quiesce;
    unsigned max_fds;
    bool has_vring; // the payload begins with a vring's index
    // Required. 0: it is done, or a negative errno.
    int (*run)(struct session *session);
    // Answers by itself; else an acknowledgement is all that the front-end may ask for.
    bool has_reply;
};

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static bool session_has(const struct session *session, unsigned protocol_feature)
{
    return session->protocol_features & VU_BIT(protocol_feature);
}

// ---- Replies

static int session_send(struct session *session, const void *payload, uint32_t bytes, int fd)
{
    struct vu_header header = {session->header.request, VU_VERSION | VU_REPLY, bytes};
    struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, bytes}};
    char control[CMSG_SPACE(sizeof(int))];
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};
    ssize_t n;

    if (fd >= 0) {
        struct cmsghdr *cmsg;

        memset(control, 0, sizeof(control));
        msg.msg_control = control;
        msg.msg_controllen = sizeof(control);
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
    }
    // Who does not read what it has asked for has no use for us.
    n = sendmsg(session->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    return n == (ssize_t)(sizeof(header) + bytes) ? 0 : -EPIPE;
}

static int session_send_u64(struct session *session, uint64_t value)
{
    return session_send(session, &value, sizeof(value), -1);
}

// ---- Features

static int run_get_features(struct session *session)
{
    return session_send_u64(session, config_features(session->options.dev));
}

// 5.2.5: without FLUSH there is no cache that the guest knows of, and who could turn it off sees it off.
static bool session_has_writeback(const struct session *session)
{
    uint64_t both = VU_BIT(VIRTIO_BLK_F_FLUSH) | VU_BIT(VIRTIO_BLK_F_CONFIG_WCE);

    return *session->options.has_writeback && (session->features & both) != VU_BIT(VIRTIO_BLK_F_CONFIG_WCE);
}

static void session_set_cache_mode(struct session *session)
{
    bool is_writethrough =
        !(session->features & VU_BIT(VIRTIO_BLK_F_FLUSH)) ||
        ((session->features & VU_BIT(VIRTIO_BLK_F_CONFIG_WCE)) && !*session->options.has_writeback);

    atomic_store(&session->is_writethrough, is_writethrough);
}

static int run_set_features(struct session *session)
{
    if (session->payload.u64 & ~config_features(session->options.dev))
        return -EINVAL;
    session->features = session->payload.u64;
    session_set_cache_mode(session);
    return 0;
}

static int run_get_protocol_features(struct session *session)
{
    return session_send_u64(session, CONFIG_PROTOCOL_FEATURES);
}

static int run_set_protocol_features(struct session *session)
{
    if (session->payload.u64 & ~CONFIG_PROTOCOL_FEATURES)
        return -EINVAL;
    session->protocol_features = session->payload.u64;
    return 0;
}

static int run_set_owner(struct session *session)
{
    (void)session;
    return 0;
}

static int run_get_queue_num(struct session *session)
{
    return session_send_u64(session, CONFIG_MAX_QUEUES);
}

// ---- Memory

static int run_set_mem_table(struct session *session)
{
    const struct vu_mem_table *table = &session->payload.table;
    uint32_t nr = table->nr_regions;
    int ret = 0;

    if (nr > VU_TABLE_REGIONS || nr != session->nr_fds ||
        session->header.size < offsetof(struct vu_mem_table, regions) + nr * sizeof(table->regions[0]))
        return -EINVAL;
    memory_clear(&session->memory);
    for (uint32_t i = 0; i < nr && !ret; i++)
        ret = memory_add(&session->memory, &table->regions[i], session->fds[i]);
    if (ret < 0)
        memory_clear(&session->memory);
    return ret;
}

static int run_get_max_mem_slots(struct session *session)
{
    return session_send_u64(session, MEMORY_MAX_REGIONS);
}

static int run_add_mem_reg(struct session *session)
{
    if (session->nr_fds != 1)
        return -EINVAL;
    return memory_add(&session->memory, &session->payload.reg.region, session->fds[0]);
}

static int run_rem_mem_reg(struct session *session)
{
    return memory_remove(&session->memory, &session->payload.reg.region);
}

// ---- Vrings

static struct virtqueue *session_vq(struct session *session)
{
    return &session->vqs[session->payload.state.index & VU_VRING_INDEX_MASK]; // checked at the door
}

static int run_set_vring_num(struct session *session)
{
    if (!session->payload.state.num || session->payload.state.num > VIRTQUEUE_MAX_SIZE)
        return -EINVAL;
    session_vq(session)->num = session->payload.state.num;
    return 0;
}

static int run_set_vring_addr(struct session *session)
{
    struct virtqueue *vq = session_vq(session);

    if (session->payload.addr.flags) // VHOST_VRING_F_LOG: was not offered
        return -EINVAL;
    vq->addr = session->payload.addr;
    vq->has_addr = true;
    vq->is_broken = false;
    return 0;
}

static int run_set_vring_base(struct session *session)
{
    session_vq(session)->base = session->payload.state.num;
    return 0;
}

static int run_get_vring_base(struct session *session)
{
    struct virtqueue *vq = session_vq(session);
    struct vu_vring_state state = {vq->index, vq->base};

    vq->is_kick_set = false; // "Ring states": stopped
    vq->is_broken = false;
    close_fd(&vq->kick_fd);
    return session_send(session, &state, sizeof(state), -1);
}

static int run_set_vring_enable(struct session *session)
{
    if (session->payload.state.num > 1)
        return -EINVAL;
    session_vq(session)->is_enabled = session->payload.state.num;
    return 0;
}

// Anything else might block who reads or writes it. Without /proc it cannot be told.
static bool is_eventfd(int fd)
{
    static const char eventfd_name[] = "anon_inode:[eventfd]";
    char path[32], name[sizeof(eventfd_name)];
    ssize_t n;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    n = readlink(path, name, sizeof(name));
    return n < 0 || (n == sizeof(eventfd_name) - 1 && !memcmp(name, eventfd_name, (size_t)n));
}

static int session_take_eventfd(struct session *session, int *to)
{
    bool has_fd = !(session->payload.u64 & VU_VRING_NO_FD);

    if (session->nr_fds != has_fd || (has_fd && !is_eventfd(session->fds[0])))
        return -EINVAL;
    close_fd(to);
    if (has_fd) {
        fcntl(session->fds[0], F_SETFL, O_RDWR | O_NONBLOCK);
        *to = session->fds[0];
        session->fds[0] = -1; // S2
    }
    return 0;
}

static int run_set_vring_kick(struct session *session)
{
    struct virtqueue *vq = session_vq(session);
    int ret = session_take_eventfd(session, &vq->kick_fd);

    if (ret < 0)
        return ret;
    vq->is_kick_set = true;
    vq->is_broken = false;
    return 0;
}

static int run_set_vring_call(struct session *session)
{
    return session_take_eventfd(session, &session_vq(session)->call_fd);
}

static int run_set_vring_err(struct session *session)
{
    return session_take_eventfd(session, &session_vq(session)->err_fd);
}

// ---- Configuration space

static int run_get_config(struct session *session)
{
    struct vu_config *config = &session->payload.config;
    uint32_t head_bytes = offsetof(struct vu_config, payload);
    uint8_t space[VU_MAX_CONFIG_BYTES] = {0};
    struct virtio_blk_config blk;

    if (config->size > VU_MAX_CONFIG_BYTES || config->offset > VU_MAX_CONFIG_BYTES - config->size ||
        session->header.size < head_bytes)
        return session_send(session, NULL, 0, -1); // which says that it cannot be had
    config_fill(session->options.dev, session_has_writeback(session), &blk);
    memcpy(space, &blk, sizeof(blk));
    memcpy(config->payload, space + config->offset, config->size);
    return session_send(session, config, head_bytes + config->size, -1);
}

// The cache mode is all that can be written.
static int run_set_config(struct session *session)
{
    const struct vu_config *config = &session->payload.config;
    uint32_t wce_at = offsetof(struct virtio_blk_config, wce);
    bool is_migration = config->flags == VU_CONFIG_F_MIGRATION;

    if (config->size > VU_MAX_CONFIG_BYTES ||
        session->header.size < offsetof(struct vu_config, payload) + config->size ||
        config->offset > wce_at || config->size <= wce_at - config->offset)
        return -EINVAL;
    if (!is_migration && (config->flags || config->size != 1 ||
                          !(config_features(session->options.dev) & VU_BIT(VIRTIO_BLK_F_CONFIG_WCE))))
        return -EINVAL;
    *session->options.has_writeback = config->payload[wce_at - config->offset];
    session_set_cache_mode(session);
    return 0;
}

static void session_backend_ended(struct ring_op *op, int res);

// A stream between two ends without a name. The front-end's end of a connection to us is none (S4).
static bool is_socket_pair(int fd)
{
    struct sockaddr_un peer = {.sun_family = AF_UNSPEC};
    socklen_t peer_len = sizeof(peer), type_len = sizeof(int);
    int type = 0;

    return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_len) && type == SOCK_STREAM &&
           !getpeername(fd, (struct sockaddr *)&peer, &peer_len) && peer_len == sizeof(peer.sun_family) &&
           peer.sun_family == AF_UNIX;
}

static int run_set_backend_req_fd(struct session *session)
{
    if (session->nr_fds != 1 || !is_socket_pair(session->fds[0]))
        return -EINVAL;
    session->backend_fd = session->fds[0];
    session->fds[0] = -1; // S2
    session->backend_op = (struct ring_op){.done = session_backend_ended,
                                           .code = RING_POLL,
                                           .fd = session->backend_fd,
                                           .events = POLLIN};
    ring_queue(session->options.ring, &session->backend_op);
    return 0;
}

void session_device_changed(struct session *session)
{
    struct vu_header header = {VU_BACKEND_CONFIG_CHANGE_MSG, VU_VERSION, 0};

    if (session->backend_fd < 0 || !session_has(session, VU_PROTOCOL_F_CONFIG))
        return;
    if (send(session->backend_fd, &header, sizeof(header), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        log_limited("vhost-user: %s: telling the guest of the new size: %s", session->options.dev->name,
                    strerror(errno));
}

// ---- What is in flight

// Room for either kind of ring: whether it will be packed may not be known yet.
static int run_get_inflight_fd(struct session *session)
{
    struct vu_inflight *inflight = &session->payload.inflight, answer = {0};
    int fd, ret;

    if (!inflight->nr_queues || inflight->nr_queues > CONFIG_MAX_QUEUES || !inflight->queue_size ||
        inflight->queue_size > VIRTQUEUE_MAX_SIZE)
        return -EINVAL;
    answer = (struct vu_inflight){
        .mmap_size = inflight->nr_queues * virtqueue_inflight_bytes(true, inflight->queue_size),
        .nr_queues = inflight->nr_queues,
        .queue_size = inflight->queue_size,
    };
    fd = memfd_create("bight-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    ret = ftruncate(fd, (off_t)answer.mmap_size) < 0 ||
                  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0
              ? -errno
              : session_send(session, &answer, sizeof(answer), fd);
    close(fd);
    return ret;
}

static int run_set_inflight_fd(struct session *session)
{
    const struct vu_inflight *inflight = &session->payload.inflight;

    if (session->nr_fds != 1 || inflight->nr_queues > CONFIG_MAX_QUEUES ||
        inflight->queue_size > VIRTQUEUE_MAX_SIZE || inflight->mmap_offset % 8)
        return -EINVAL;
    memory_unmap(&session->inflight_map);
    session->inflight_desc = *inflight;
    return memory_map(&session->inflight_map, session->fds[0], inflight->mmap_offset, inflight->mmap_size,
                      &session->memory.is_lost, &session->inflight);
}

// The part of the inflight buffer that is this vring's, or NULL.
static void *session_inflight(const struct session *session, const struct virtqueue *vq)
{
    bool is_packed = session->features & VU_BIT(VIRTIO_F_RING_PACKED);
    uint64_t bytes = virtqueue_inflight_bytes(is_packed, session->inflight_desc.queue_size);

    if (!session->inflight_map.base || vq->index >= session->inflight_desc.nr_queues ||
        (vq->index + 1) * bytes > session->inflight_desc.mmap_size)
        return NULL;
    return session->inflight + vq->index * bytes;
}

// ---- Beginning again

static int run_reset_owner(struct session *session)
{
    for (unsigned i = 0; i < CONFIG_MAX_QUEUES; i++)
        session->vqs[i].is_enabled = false;
    return 0;
}

static void session_reset_vrings(struct session *session)
{
    for (unsigned i = 0; i < CONFIG_MAX_QUEUES; i++) {
        struct virtqueue *vq = &session->vqs[i];

        close_fd(&vq->kick_fd);
        close_fd(&vq->call_fd);
        close_fd(&vq->err_fd);
        virtqueue_init(vq, i);
    }
}

static int run_reset_device(struct session *session)
{
    session_reset_vrings(session);
    memory_unmap(&session->inflight_map);
    *session->options.has_writeback = true;
    session_set_cache_mode(session);
    return 0;
}

// ---- Messages

#define BYTES(type) .min_bytes = sizeof(type), .max_bytes = sizeof(type)

static const struct handler handlers[VU_REQUEST_NR] = {
    [VU_GET_FEATURES] = {"GET_FEATURES", .run = run_get_features, .has_reply = true},
    [VU_SET_FEATURES] = {"SET_FEATURES", BYTES(uint64_t), QUIESCE_ALL, .run = run_set_features},
    [VU_SET_OWNER] = {"SET_OWNER", .run = run_set_owner},
    [VU_RESET_OWNER] = {"RESET_OWNER", .quiesce = QUIESCE_ALL, .run = run_reset_owner},
    [VU_SET_MEM_TABLE] = {"SET_MEM_TABLE", offsetof(struct vu_mem_table, regions),
                          sizeof(struct vu_mem_table), QUIESCE_ALL, VU_MAX_FDS, .run = run_set_mem_table},
    [VU_SET_VRING_NUM] = {"SET_VRING_NUM", BYTES(struct vu_vring_state), QUIESCE_ONE, .has_vring = true,
                          .run = run_set_vring_num},
    [VU_SET_VRING_ADDR] = {"SET_VRING_ADDR", BYTES(struct vu_vring_addr), QUIESCE_ONE, .has_vring = true,
                           .run = run_set_vring_addr},
    [VU_SET_VRING_BASE] = {"SET_VRING_BASE", BYTES(struct vu_vring_state), QUIESCE_ONE, .has_vring = true,
                           .run = run_set_vring_base},
    [VU_GET_VRING_BASE] = {"GET_VRING_BASE", BYTES(struct vu_vring_state), QUIESCE_ONE, .has_vring = true,
                           .run = run_get_vring_base, .has_reply = true},
    [VU_SET_VRING_KICK] = {"SET_VRING_KICK", BYTES(uint64_t), QUIESCE_ONE, 1, .has_vring = true,
                           .run = run_set_vring_kick},
    [VU_SET_VRING_CALL] = {"SET_VRING_CALL", BYTES(uint64_t), QUIESCE_ONE, 1, .has_vring = true,
                           .run = run_set_vring_call},
    [VU_SET_VRING_ERR] = {"SET_VRING_ERR", BYTES(uint64_t), QUIESCE_ONE, 1, .has_vring = true,
                          .run = run_set_vring_err},
    [VU_GET_PROTOCOL_FEATURES] = {"GET_PROTOCOL_FEATURES", .run = run_get_protocol_features,
                                  .has_reply = true},
    [VU_SET_PROTOCOL_FEATURES] = {"SET_PROTOCOL_FEATURES", BYTES(uint64_t), .run = run_set_protocol_features},
    [VU_GET_QUEUE_NUM] = {"GET_QUEUE_NUM", .run = run_get_queue_num, .has_reply = true},
    [VU_SET_VRING_ENABLE] = {"SET_VRING_ENABLE", BYTES(struct vu_vring_state), QUIESCE_ONE, .has_vring = true,
                             .run = run_set_vring_enable},
    [VU_SET_BACKEND_REQ_FD] = {"SET_BACKEND_REQ_FD", 0, 8, QUIESCE_BACKEND, 1, .run = run_set_backend_req_fd},
    [VU_GET_CONFIG] = {"GET_CONFIG", offsetof(struct vu_config, payload), sizeof(struct vu_config),
                       .run = run_get_config, .has_reply = true},
    [VU_SET_CONFIG] = {"SET_CONFIG", offsetof(struct vu_config, payload), sizeof(struct vu_config),
                       .run = run_set_config},
    // Without the padding at the end, or with it.
    [VU_GET_INFLIGHT_FD] = {"GET_INFLIGHT_FD", offsetof(struct vu_inflight, queue_size) + 2,
                            sizeof(struct vu_inflight), .run = run_get_inflight_fd, .has_reply = true},
    [VU_SET_INFLIGHT_FD] = {"SET_INFLIGHT_FD", offsetof(struct vu_inflight, queue_size) + 2,
                            sizeof(struct vu_inflight), QUIESCE_ALL, 1, .run = run_set_inflight_fd},
    [VU_RESET_DEVICE] = {"RESET_DEVICE", .quiesce = QUIESCE_ALL, .run = run_reset_device},
    [VU_GET_MAX_MEM_SLOTS] = {"GET_MAX_MEM_SLOTS", .run = run_get_max_mem_slots, .has_reply = true},
    [VU_ADD_MEM_REG] = {"ADD_MEM_REG", BYTES(struct vu_mem_reg), QUIESCE_ALL, 1, .run = run_add_mem_reg},
    // A file descriptor that comes with it is not needed.
    [VU_REM_MEM_REG] = {"REM_MEM_REG", BYTES(struct vu_mem_reg), QUIESCE_ALL, 1, .run = run_rem_mem_reg},
};

// NULL: the message makes no sense.
static const struct handler *session_handler(const struct session *session)
{
    const struct vu_header *header = &session->header;
    const struct handler *handler;

    if (header->request >= VU_REQUEST_NR || (header->flags & VU_VERSION_MASK) != VU_VERSION ||
        (header->flags & VU_REPLY))
        return NULL;
    handler = &handlers[header->request];
    if (!handler->run || header->size < handler->min_bytes)
        return NULL;
    // Many front-ends send an empty payload where none is asked for.
    if (header->size > max_of(handler->max_bytes, sizeof(uint64_t)))
        return NULL;
    return handler;
}

static void session_close_fds(struct session *session)
{
    while (session->nr_fds)
        close_fd(&session->fds[--session->nr_fds]);
}

static void session_free(struct session *session)
{
    struct session_options options = session->options;

    ring_remove_fd(options.ring, session->fd);
    close(session->fd);
    session_close_fds(session);
    session_reset_vrings(session);
    memory_unmap(&session->inflight_map);
    memory_clear(&session->memory);
    free(session);
    options.closed(options.arg);
}

static void session_run_message(struct session *session);

// What was waited for has come to its end: S1, S3. The session may be gone after this.
static void session_go_on(struct session *session)
{
    if (session->nr_pending)
        return;
    if (session->is_message_held) {
        session->is_message_held = false;
        session_run_message(session);
    } else if (session->is_closing && !session->is_poll_queued) {
        session_free(session);
    }
}

static void session_pending_over(struct session *session)
{
    session->nr_pending--;
    session_go_on(session);
}

// S4.
static void session_backend_ended(struct ring_op *op, int res)
{
    struct session *session = container_of(op, struct session, backend_op);

    (void)res;
    ring_remove_fd(session->options.ring, session->backend_fd);
    close_fd(&session->backend_fd);
    if (!session->is_backend_stopping)
        return;
    session->is_backend_stopping = false;
    session_pending_over(session);
}

static void session_stop_backend(struct session *session)
{
    if (session->backend_fd < 0 || session->is_backend_stopping)
        return;
    session->is_backend_stopping = true;
    session->nr_pending++;
    ring_cancel(session->options.ring, &session->backend_op);
}

static struct session *virtqueue_session(struct virtqueue *vq)
{
    return container_of(vq - vq->index, struct session, vqs[0]);
}

static void session_vring_stopped(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, stopped_op);

    (void)res;
    virtqueue_reclaim(vq);
    session_pending_over(virtqueue_session(vq));
}

static void session_stop_vring(struct session *session, struct virtqueue *vq)
{
    if (!vq->is_running || vq->is_stop_sent)
        return;
    vq->is_stop_sent = true;
    session->nr_pending++;
    virtqueue_stop(vq, session_vring_stopped);
}

void session_close(struct session *session)
{
    if (session->is_closing)
        return;
    session->is_closing = true;
    session->is_message_held = false;
    shutdown(session->fd, SHUT_RDWR); // ends the POLL that is queued
    session_stop_backend(session);
    for (unsigned i = 0; i < CONFIG_MAX_QUEUES; i++)
        session_stop_vring(session, &session->vqs[i]);
    session_go_on(session);
}

static void session_fail(struct session *session, const char *what, int error)
{
    log_limited("vhost-user: %s: %s: %s; hanging up", session->options.dev->name, what, strerror(-error));
    session_close(session);
}

static void session_err_told(struct ring_op *op, int res)
{
    struct virtqueue *vq = container_of(op, struct virtqueue, err_op);
    struct session *session = virtqueue_session(vq);

    (void)res;
    ring_remove_fd(session->options.ring, op->fd);
    session_pending_over(session);
}

// A vring that cannot be started.
static void session_break_vring(struct session *session, struct virtqueue *vq, int error)
{
    struct ring *ring = session->options.ring;

    vq->is_broken = true;
    log_limited("vhost-user: %s: queue %u: its rings cannot be used: %s", session->options.dev->name,
                vq->index, strerror(-error));
    if (vq->err_fd < 0)
        return;
    vq->err_op = (struct ring_op){.done = session_err_told, .code = RING_EVENT_SIGNAL, .fd = vq->err_fd};
    session->nr_pending++;
    ring_queue(ring, &vq->err_op);
    ring_cancel(ring, &vq->err_op); // if nobody takes it, it is not waited for
}

static void session_start_vrings(struct session *session)
{
    struct virtqueue_env env = {
        .dev = session->options.dev,
        .main_ring = session->options.ring,
        .memory = &session->memory,
        .is_writethrough = &session->is_writethrough,
        .features = session->features,
        .inflight_size = session->inflight_desc.queue_size,
        .poll_ns = session->options.poll_ns,
    };
    bool is_enabled = !(session->features & VU_BIT(VU_F_PROTOCOL_FEATURES));

    for (unsigned i = 0; i < CONFIG_MAX_QUEUES; i++) {
        struct virtqueue *vq = &session->vqs[i];
        int ret;

        if (vq->is_running || !virtqueue_is_ready(vq, is_enabled))
            continue;
        env.inflight = session_inflight(session, vq);
        ret = virtqueue_start(vq, &env);
        if (ret < 0)
            session_break_vring(session, vq, ret);
    }
}

// ---- Receiving

static void session_receive(struct session *session);

// A message and, if it was asked for, its acknowledgement.
static void session_run_message(struct session *session)
{
    const struct handler *handler = &handlers[session->header.request];
    bool wants_ack = (session->header.flags & VU_NEED_REPLY) && !handler->has_reply &&
                     session_has(session, VU_PROTOCOL_F_REPLY_ACK);
    int ret = handler->run(session);

    session_close_fds(session); // S2
    session->in_len = 0;
    if (wants_ack) {
        if (ret < 0)
            log_limited("vhost-user: %s: %s: %s", session->options.dev->name, handler->name, strerror(-ret));
        ret = session_send_u64(session, ret < 0);
    }
    if (ret < 0) { // there is no other way to tell it
        session_fail(session, handler->name, ret);
        return;
    }
    session_start_vrings(session);
    session_receive(session);
}

static void session_begin_message(struct session *session)
{
    const struct handler *handler = session_handler(session);
    uint64_t index = 0;

    if (handler &&
        handler->has_vring) // with a file descriptor it is the lowest byte of 8, and a bit is a flag
        index = handler->max_fds ? session->payload.u64 & ~(uint64_t)VU_VRING_NO_FD
                                 : session->payload.state.index;
    if (!handler || session->nr_fds > handler->max_fds || index >= CONFIG_MAX_QUEUES) {
        session_fail(session, handler ? handler->name : "a message", -EPROTO);
        return;
    }
    session->is_message_held = true; // S1
    if (handler->quiesce == QUIESCE_ONE)
        session_stop_vring(session, &session->vqs[index]);
    if (handler->quiesce == QUIESCE_BACKEND)
        session_stop_backend(session);
    for (unsigned i = 0; handler->quiesce == QUIESCE_ALL && i < CONFIG_MAX_QUEUES; i++)
        session_stop_vring(session, &session->vqs[i]);
    session_go_on(session);
}

// More file descriptors than there is room for are closed by the kernel.
static int session_take_fds(struct session *session, struct msghdr *msg)
{
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
        unsigned nr = (unsigned)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int));

        if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
            continue;
        for (unsigned i = 0; i < nr; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(fd));
            if (session->nr_fds < VU_MAX_FDS)
                session->fds[session->nr_fds++] = fd;
            else
                close(fd);
        }
    }
    return msg->msg_flags & MSG_CTRUNC ? -EMFILE : 0;
}

// Header first, then the payload. 1: the message is there, 0: not yet, or a negative errno.
static int session_recv(struct session *session)
{
    size_t head = sizeof(session->header);

    for (;;) {
        char control[CMSG_SPACE(VU_MAX_FDS * sizeof(int))];
        size_t at = session->in_len, want = at < head ? head : head + session->header.size;
        struct iovec iov = {(char *)&session->header + at, want - at};
        struct msghdr msg = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof(control)};
        ssize_t n;

        if (at >= head) {
            if (session->header.size > sizeof(session->payload))
                return -EMSGSIZE;
            if (at == want)
                return 1;
            iov.iov_base = (char *)&session->payload + (at - head);
        }
        n = recvmsg(session->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        if (session_take_fds(session, &msg) < 0)
            return -EMFILE;
        if (!n)
            return -ECONNRESET;
        session->in_len += (size_t)n;
    }
}

// S4: one that waits with half a message is not held any longer than that.
static bool session_holds_socket(const struct session *session)
{
    int type;

    for (unsigned i = 0; i < session->nr_fds; i++) {
        if (!getsockopt(session->fds[i], SOL_SOCKET, SO_TYPE, &type, &(socklen_t){sizeof(type)}))
            return true;
    }
    return false;
}

static void session_readable(struct ring_op *op, int res)
{
    struct session *session = container_of(op, struct session, poll_op);
    int ret;

    (void)res;
    session->is_poll_queued = false;
    if (session->is_closing) {
        session_go_on(session);
        return;
    }
    ret = session_recv(session);
    if (!ret && session_holds_socket(session))
        ret = -EPROTO;
    if (!ret)
        session_receive(session);
    else if (ret > 0)
        session_begin_message(session);
    else if (ret == -ECONNRESET)
        session_close(session);
    else
        session_fail(session, "a message", ret);
}

static void session_receive(struct session *session)
{
    session->is_poll_queued = true;
    session->poll_op =
        (struct ring_op){.done = session_readable, .code = RING_POLL, .fd = session->fd, .events = POLLIN};
    ring_queue(session->options.ring, &session->poll_op);
}

struct session *session_create(int fd, const struct session_options *options)
{
    struct session *session = aligned_alloc(_Alignof(struct session), sizeof(*session));

    if (!session)
        return NULL;
    memset(session, 0, sizeof(*session));
    session->options = *options;
    session->fd = fd;
    session->backend_fd = -1;
    session_set_cache_mode(session);
    for (unsigned i = 0; i < CONFIG_MAX_QUEUES; i++)
        virtqueue_init(&session->vqs[i], i);
    session_receive(session);
    return session;
}
