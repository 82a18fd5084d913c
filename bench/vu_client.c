#include "vu_client.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/util.h"

// Where the memory is, for the guest and for the front-end: not at the same place, and not at 0.
#define GUEST_BASE 0x100000000ULL
#define USER_BASE 0x700000000000ULL
#define RING_BYTES(size) round_up(16ULL * (size) + 2 * (3 + (size)) + 64 + 6 + 8ULL * (size), 4096)
#define RING_AVAIL_AT(size) (16ULL * (size))
#define RING_USED_AT(size) round_up(16ULL * (size) + 2 * (3 + (size)), 64)
#define EVENT_WRAP (1U << VRING_PACKED_EVENT_F_WRAP_CTR)

#define acquire16(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define release16(at, v) __atomic_store_n(at, v, __ATOMIC_RELEASE)

// ---- Messages

static int send_message(int fd, const struct vu_header *header, const void *payload, const int *fds,
                        unsigned nr_fds)
{
    struct iovec iov[2] = {{(void *)header, sizeof(*header)}, {(void *)payload, header->size}};
    char control[CMSG_SPACE(16 * sizeof(int))];
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};

    if (nr_fds) {
        struct cmsghdr *cmsg;

        memset(control, 0, sizeof(control));
        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
        cmsg = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, nr_fds * sizeof(int));
    }
    return sendmsg(fd, &msg, MSG_NOSIGNAL) == (ssize_t)(sizeof(*header) + header->size) ? 0 : -EPIPE;
}

static int receive_all(int fd, void *buf, size_t bytes, int *passed_fd)
{
    while (bytes) {
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec iov = {buf, bytes};
        struct msghdr msg = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof(control)};
        ssize_t n = recvmsg(fd, &msg, MSG_CMSG_CLOEXEC);
        struct cmsghdr *cmsg;

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -ECONNRESET;
        cmsg = CMSG_FIRSTHDR(&msg);
        if (cmsg && cmsg->cmsg_type == SCM_RIGHTS && passed_fd)
            memcpy(passed_fd, CMSG_DATA(cmsg), sizeof(int));
        buf = (char *)buf + n;
        bytes -= (size_t)n;
    }
    return 0;
}

int vuc_message(struct vuc *vuc, uint32_t request, const void *payload, uint32_t bytes, const int *fds,
                unsigned nr_fds, void *reply, uint32_t reply_bytes, int *reply_fd)
{
    bool wants_ack = !reply && vuc->protocol_features & VU_BIT(VU_PROTOCOL_F_REPLY_ACK);
    struct vu_header header = {request, VU_VERSION | (wants_ack ? VU_NEED_REPLY : 0), bytes};
    uint64_t ack = 0;
    int ret = send_message(vuc->fd, &header, payload, fds, nr_fds);

    if (ret < 0 || (!reply && !wants_ack))
        return ret;
    if (!reply) {
        reply = &ack;
        reply_bytes = sizeof(ack);
    }
    ret = receive_all(vuc->fd, &header, sizeof(header), reply_fd);
    if (!ret && (header.request != request || !(header.flags & VU_REPLY) || header.size > reply_bytes))
        return -EBADMSG;
    if (!ret)
        ret = receive_all(vuc->fd, reply, header.size, NULL);
    if (ret < 0)
        return ret;
    return ack ? -EREMOTEIO : (int)header.size;
}

static int set_u64(struct vuc *vuc, uint32_t request, uint64_t value)
{
    return vuc_message(vuc, request, &value, sizeof(value), NULL, 0, NULL, 0, NULL);
}

static int get_u64(struct vuc *vuc, uint32_t request, uint64_t *value)
{
    int ret = vuc_message(vuc, request, NULL, 0, NULL, 0, value, sizeof(*value), NULL);

    return ret < 0 ? ret : ret == sizeof(*value) ? 0 : -EBADMSG;
}

static int set_state(struct vuc *vuc, uint32_t request, uint32_t index, uint32_t num)
{
    struct vu_vring_state state = {index, num};

    return vuc_message(vuc, request, &state, sizeof(state), NULL, 0, NULL, 0, NULL);
}

static int set_fd(struct vuc *vuc, uint32_t request, uint32_t index, int fd)
{
    uint64_t value = index | (fd < 0 ? VU_VRING_NO_FD : 0);

    return vuc_message(vuc, request, &value, sizeof(value), &fd, fd >= 0, NULL, 0, NULL);
}

// ---- Connecting

static int negotiate(struct vuc *vuc)
{
    uint64_t offered;
    // What every back-end has: secure erase came later.
    struct vu_config config = {.size = offsetof(struct virtio_blk_config, max_secure_erase_sectors)};
    uint32_t bytes = offsetof(struct vu_config, payload) + config.size;
    int ret = get_u64(vuc, VU_GET_FEATURES, &offered);

    if (ret < 0)
        return ret;
    vuc->features = offered & ~vuc->options.features_off;
    ret = get_u64(vuc, VU_GET_PROTOCOL_FEATURES, &offered);
    if (ret < 0)
        return ret;
    // What others have beyond these is not for us to take.
    offered &= VU_BIT(VU_PROTOCOL_F_MQ) | VU_BIT(VU_PROTOCOL_F_REPLY_ACK) | VU_BIT(VU_PROTOCOL_F_CONFIG) |
               VU_BIT(VU_PROTOCOL_F_INFLIGHT_SHMFD) | VU_BIT(VU_PROTOCOL_F_CONFIGURE_MEM_SLOTS) |
               VU_BIT(VU_PROTOCOL_F_BACKEND_REQ) | VU_BIT(VU_PROTOCOL_F_RESET_DEVICE);
    ret = set_u64(vuc, VU_SET_PROTOCOL_FEATURES, offered);
    if (ret < 0)
        return ret;
    vuc->protocol_features = offered;
    ret = vuc_message(vuc, VU_SET_OWNER, NULL, 0, NULL, 0, NULL, 0, NULL);
    if (ret < 0)
        return ret;
    ret = vuc_message(vuc, VU_GET_CONFIG, &config, bytes, NULL, 0, &config, sizeof(config), NULL);
    if (ret < 0)
        return ret;
    memcpy(&vuc->config, config.payload, config.size);
    return set_u64(vuc, VU_SET_FEATURES, vuc->features);
}

static int share_memory(struct vuc *vuc)
{
    unsigned nr = vuc->options.nr_regions;
    struct vu_mem_table table = {.nr_regions = nr};
    uint64_t bytes = round_up(vuc->memory_bytes / nr, 4096);
    int fds[VU_TABLE_REGIONS];

    for (unsigned i = 0; i < nr; i++) {
        uint64_t at = i * bytes, left = vuc->memory_bytes - at;

        table.regions[i] = (struct vu_region){GUEST_BASE + at, min_of(bytes, left), USER_BASE + at, at};
        fds[i] = vuc->memfd;
    }
    return vuc_message(vuc, VU_SET_MEM_TABLE, &table,
                       (uint32_t)(offsetof(struct vu_mem_table, regions) + nr * sizeof(table.regions[0])),
                       fds, nr, NULL, 0, NULL);
}

static int share_inflight(struct vuc *vuc)
{
    uint32_t bytes = sizeof(vuc->inflight);
    int ret;

    if (!vuc->options.has_inflight)
        return 0;
    vuc->inflight = (struct vu_inflight){.nr_queues = (uint16_t)vuc->options.nr_queues,
                                         .queue_size = (uint16_t)vuc->options.queue_size};
    if (vuc->inflight_fd < 0) {
        ret = vuc_message(vuc, VU_GET_INFLIGHT_FD, &vuc->inflight, bytes, NULL, 0, &vuc->inflight, bytes,
                          &vuc->inflight_fd);
        if (ret < 0)
            return ret;
    } else {
        vuc->inflight.mmap_size = (uint64_t)lseek(vuc->inflight_fd, 0, SEEK_END);
    }
    return vuc_message(vuc, VU_SET_INFLIGHT_FD, &vuc->inflight, bytes, &vuc->inflight_fd, 1, NULL, 0, NULL);
}

static uint32_t queue_base(const struct vuc_queue *queue)
{
    uint32_t base = queue->used;

    if (!queue->is_packed)
        return base;
    base |= queue->used_wrap ? 0x8000U : 0;
    return base | base << 16;
}

static int start_queue(struct vuc_queue *queue)
{
    struct vuc *vuc = queue->vuc;
    uint64_t user = USER_BASE + queue->ring_at;
    struct vu_vring_addr addr = {.index = queue->index,
                                 .desc = user,
                                 .avail = user + RING_AVAIL_AT(queue->size),
                                 .used = user + RING_USED_AT(queue->size)};
    int ret = set_state(vuc, VU_SET_VRING_NUM, queue->index, queue->size);

    if (ret >= 0)
        ret = set_state(vuc, VU_SET_VRING_BASE, queue->index, queue_base(queue));
    if (ret >= 0)
        ret = vuc_message(vuc, VU_SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0, NULL, 0, NULL);
    if (ret >= 0)
        ret = set_fd(vuc, VU_SET_VRING_CALL, queue->index, queue->call_fd);
    if (ret >= 0)
        ret = set_fd(vuc, VU_SET_VRING_ERR, queue->index, queue->err_fd);
    if (ret >= 0)
        ret = set_fd(vuc, VU_SET_VRING_KICK, queue->index, queue->kick_fd);
    if (ret >= 0 && vuc->features & VU_BIT(VU_F_PROTOCOL_FEATURES))
        ret = set_state(vuc, VU_SET_VRING_ENABLE, queue->index, 1);
    return ret;
}

static void init_queue(struct vuc *vuc, unsigned index)
{
    struct vuc_queue *queue = &vuc->queues[index];
    unsigned size = vuc->options.queue_size;
    char *ring;

    *queue = (struct vuc_queue){
        .vuc = vuc,
        .index = index,
        .size = size,
        .is_packed = vuc->features & VU_BIT(VIRTIO_F_RING_PACKED),
        .has_event_idx = vuc->features & VU_BIT(VIRTIO_RING_F_EVENT_IDX),
        .kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .ring_at = index * (RING_BYTES(size) + (uint64_t)size * VUC_SLOT_BYTES),
        .nr_free = (uint16_t)size,
        .avail_wrap = true,
        .used_wrap = true,
        .next_id = calloc(size, sizeof(uint16_t)),
        .rqs = calloc(size, sizeof(struct vuc_rq *)),
    };
    queue->slots_at = queue->ring_at + RING_BYTES(size);
    ring = vuc->memory + queue->ring_at;
    queue->desc = (void *)ring;
    queue->packed = (void *)ring;
    queue->avail_ring = (void *)(ring + RING_AVAIL_AT(size));
    queue->driver_event = (void *)queue->avail_ring;
    queue->used_ring = (void *)(ring + RING_USED_AT(size));
    queue->device_event = (void *)queue->used_ring;
    memset(ring, 0, RING_BYTES(size));
    for (unsigned i = 0; i < size; i++)
        queue->next_id[i] = (uint16_t)(i + 1);
    if (queue->is_packed)
        queue->driver_event->flags = VRING_PACKED_EVENT_FLAG_DISABLE;
    else
        queue->avail_ring->flags = VRING_AVAIL_F_NO_INTERRUPT;
}

static int connect_to(const char *path)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof(sun.sun_path))
        return -ENAMETOOLONG;
    strcpy(sun.sun_path, path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&sun, sizeof(sun)) < 0)
        return -errno;
    return fd;
}

static int make_memory(struct vuc *vuc)
{
    const struct vuc_options *options = &vuc->options;
    unsigned size = options->queue_size;

    vuc->data_at = options->nr_queues * (RING_BYTES(size) + (uint64_t)size * VUC_SLOT_BYTES);
    vuc->memory_bytes = round_up(vuc->data_at + options->data_bytes, 4096);
    if (vuc->memfd < 0) {
        vuc->memfd = memfd_create("vu_client", MFD_CLOEXEC);
        if (vuc->memfd < 0 || ftruncate(vuc->memfd, (off_t)vuc->memory_bytes) < 0)
            return -errno;
    }
    vuc->memory =
        mmap(NULL, vuc->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, vuc->memfd, 0);
    return vuc->memory == MAP_FAILED ? -errno : 0;
}

int vuc_connect(struct vuc *vuc, const struct vuc_options *options)
{
    const char *what = "connecting";
    int ret;

    *vuc = (struct vuc){.options = *options,
                        .fd = -1,
                        .backend_fd = -1,
                        .memfd = options->memfd,
                        .inflight_fd = options->inflight_fd};
    ret = vuc->fd = connect_to(options->path);
    if (ret >= 0) {
        what = "negotiating";
        ret = negotiate(vuc);
    }
    if (ret >= 0) {
        what = "memory";
        ret = make_memory(vuc);
    }
    if (ret >= 0) {
        what = "inflight region";
        ret = share_inflight(vuc);
    }
    if (ret >= 0) {
        what = "memory table";
        ret = share_memory(vuc);
    }
    vuc->queues = calloc(options->nr_queues, sizeof(*vuc->queues));
    what = ret >= 0 ? "queues" : what;
    for (unsigned i = 0; i < options->nr_queues && ret >= 0; i++) {
        init_queue(vuc, i);
        ret = start_queue(&vuc->queues[i]);
    }
    if (ret < 0)
        fprintf(stderr, "vu_client: %s: %s: %s\n", options->path, what, strerror(-ret));
    return ret < 0 ? ret : 0;
}

static void free_all(struct vuc *vuc)
{
    close(vuc->fd);
    for (unsigned i = 0; i < vuc->options.nr_queues; i++) {
        close(vuc->queues[i].kick_fd);
        close(vuc->queues[i].call_fd);
        close(vuc->queues[i].err_fd);
        free(vuc->queues[i].next_id);
        free(vuc->queues[i].rqs);
    }
    free(vuc->queues);
    munmap(vuc->memory, vuc->memory_bytes);
}

void vuc_drop(struct vuc *vuc)
{
    free_all(vuc);
}

void vuc_disconnect(struct vuc *vuc)
{
    for (unsigned i = 0; i < vuc->options.nr_queues; i++) {
        struct vu_vring_state state = {i, 0};

        vuc_message(vuc, VU_GET_VRING_BASE, &state, sizeof(state), NULL, 0, &state, sizeof(state), NULL);
    }
    free_all(vuc);
    close(vuc->memfd);
    if (vuc->inflight_fd >= 0)
        close(vuc->inflight_fd);
}

// ---- Requests

uint64_t vuc_header_at(const struct vuc_queue *queue, const struct vuc_rq *rq)
{
    return queue->slots_at + (uint64_t)rq->slot * VUC_SLOT_BYTES;
}

uint64_t vuc_status_at(const struct vuc_queue *queue, const struct vuc_rq *rq)
{
    return vuc_header_at(queue, rq) + sizeof(struct virtio_blk_outhdr);
}

struct virtio_blk_outhdr *vuc_header(const struct vuc_queue *queue, const struct vuc_rq *rq)
{
    return (void *)(queue->vuc->memory + vuc_header_at(queue, rq));
}

volatile uint8_t *vuc_status(const struct vuc_queue *queue, const struct vuc_rq *rq)
{
    return (uint8_t *)queue->vuc->memory + vuc_status_at(queue, rq);
}

void vuc_prepare(struct vuc_queue *queue, struct vuc_rq *rq, uint32_t type, uint64_t sector, uint64_t data_at,
                 uint32_t data_bytes)
{
    bool is_in = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
    unsigned n = 0;

    *vuc_header(queue, rq) = (struct virtio_blk_outhdr){.type = type, .sector = sector};
    *vuc_status(queue, rq) = 0xff;
    rq->pieces[n++] = (struct vuc_piece){vuc_header_at(queue, rq), sizeof(struct virtio_blk_outhdr), false};
    if (data_bytes)
        rq->pieces[n++] = (struct vuc_piece){data_at, data_bytes, is_in};
    rq->pieces[n++] = (struct vuc_piece){vuc_status_at(queue, rq), 1, true};
    rq->nr_pieces = n;
    rq->is_indirect = false;
}

// The pieces as a table in the request's slot. The one piece that leads there.
static struct vuc_piece fill_table(struct vuc_queue *queue, struct vuc_rq *rq)
{
    uint64_t at = vuc_header_at(queue, rq) + VUC_TABLE_AT;
    struct vring_desc *split = (void *)(queue->vuc->memory + at);
    struct vring_packed_desc *packed = (void *)(queue->vuc->memory + at);

    for (unsigned i = 0; i < rq->nr_pieces; i++) {
        const struct vuc_piece *piece = &rq->pieces[i];
        uint16_t flags = piece->is_in ? VRING_DESC_F_WRITE : 0;

        if (queue->is_packed) {
            packed[i] = (struct vring_packed_desc){GUEST_BASE + piece->at, piece->len_bytes, 0, flags};
            continue;
        }
        if (i + 1 < rq->nr_pieces)
            flags |= VRING_DESC_F_NEXT;
        split[i] = (struct vring_desc){GUEST_BASE + piece->at, piece->len_bytes, flags, (uint16_t)(i + 1)};
    }
    return (struct vuc_piece){at, (uint32_t)(rq->nr_pieces * sizeof(*split)), false};
}

static bool submit_split(struct vuc_queue *queue, struct vuc_rq *rq, const struct vuc_piece *pieces,
                         uint16_t extra_flags)
{
    uint16_t at = queue->free_head;

    rq->head = at;
    queue->rqs[at] = rq;
    for (unsigned i = 0; i < rq->nr_descs; i++) {
        struct vring_desc *desc = &queue->desc[at];
        bool is_last = i + 1 == rq->nr_descs;

        *desc = (struct vring_desc){GUEST_BASE + pieces[i].at, pieces[i].len_bytes,
                                    (uint16_t)((pieces[i].is_in ? VRING_DESC_F_WRITE : 0) |
                                               (is_last ? 0 : VRING_DESC_F_NEXT) | extra_flags),
                                    queue->next_id[at]};
        at = queue->next_id[at];
    }
    queue->free_head = at;
    queue->avail_ring->ring[queue->avail & (queue->size - 1)] = rq->head;
    queue->avail++;
    release16(&queue->avail_ring->idx, queue->avail);
    return true;
}

static bool submit_packed(struct vuc_queue *queue, struct vuc_rq *rq, const struct vuc_piece *pieces,
                          uint16_t extra_flags)
{
    uint16_t first = queue->avail, first_flags = 0;

    rq->head = queue->free_head;
    queue->free_head = queue->next_id[rq->head];
    queue->rqs[rq->head] = rq;
    for (unsigned i = 0; i < rq->nr_descs; i++) {
        struct vring_packed_desc *desc = &queue->packed[queue->avail];
        uint16_t flags = (uint16_t)((pieces[i].is_in ? VRING_DESC_F_WRITE : 0) |
                                    (i + 1 == rq->nr_descs ? 0 : VRING_DESC_F_NEXT) | extra_flags |
                                    (queue->avail_wrap ? 1U << VRING_PACKED_DESC_F_AVAIL
                                                       : 1U << VRING_PACKED_DESC_F_USED));

        desc->addr = GUEST_BASE + pieces[i].at;
        desc->len = pieces[i].len_bytes;
        desc->id = rq->head;
        if (i)
            release16(&desc->flags, flags);
        else
            first_flags = flags;
        if (++queue->avail == queue->size) {
            queue->avail = 0;
            queue->avail_wrap = !queue->avail_wrap;
        }
    }
    release16(&queue->packed[first].flags, first_flags);
    queue->nr_unkicked += rq->nr_descs;
    return true;
}

bool vuc_submit(struct vuc_queue *queue, struct vuc_rq *rq)
{
    uint16_t nr_descs = (uint16_t)(rq->is_indirect ? 1 : rq->nr_pieces);
    struct vuc_piece table;
    const struct vuc_piece *pieces = rq->pieces;

    if (queue->nr_free < nr_descs)
        return false;
    queue->nr_free -= nr_descs;
    rq->nr_descs = nr_descs;
    if (rq->is_indirect) {
        table = fill_table(queue, rq);
        pieces = &table;
    }
    return (queue->is_packed ? submit_packed : submit_split)(queue, rq, pieces,
                                                             rq->is_indirect ? VRING_DESC_F_INDIRECT : 0);
}

static bool wants_kick(struct vuc_queue *queue)
{
    uint16_t old = queue->kicked, new = queue->avail, nr = queue->nr_unkicked, flags, off_wrap, event;

    __sync_synchronize();
    queue->kicked = new;
    queue->nr_unkicked = 0;
    if (!queue->is_packed) {
        if (old == new)
            return false;
        if (queue->has_event_idx)
            return vring_need_event(acquire16((uint16_t *)(void *)&queue->used_ring->ring[queue->size]), new,
                                    old);
        return !(acquire16(&queue->used_ring->flags) & VRING_USED_F_NO_NOTIFY);
    }
    flags = acquire16(&queue->device_event->flags);
    if (!nr || flags == VRING_PACKED_EVENT_FLAG_DISABLE)
        return false;
    if (flags != VRING_PACKED_EVENT_FLAG_DESC)
        return true;
    off_wrap = acquire16(&queue->device_event->off_wrap);
    event = off_wrap & (uint16_t)~EVENT_WRAP;
    if (!!(off_wrap & EVENT_WRAP) != queue->avail_wrap)
        event -= (uint16_t)queue->size;
    return vring_need_event(event, new, (uint16_t)(new - nr));
}

void vuc_kick(struct vuc_queue *queue)
{
    uint64_t one = 1;

    if (!wants_kick(queue))
        return;
    queue->nr_kicks++;
    if (write(queue->kick_fd, &one, sizeof(one)) < 0)
        abort();
}

static bool has_used(const struct vuc_queue *queue)
{
    uint16_t flags;

    if (!queue->is_packed)
        return acquire16(&queue->used_ring->idx) != queue->used;
    flags = acquire16(&queue->packed[queue->used].flags);
    return (flags >> VRING_PACKED_DESC_F_AVAIL & 1) == queue->used_wrap &&
           (flags >> VRING_PACKED_DESC_F_USED & 1) == queue->used_wrap;
}

struct vuc_rq *vuc_reap(struct vuc_queue *queue)
{
    struct vuc_rq *rq;
    uint32_t id, len;

    if (!has_used(queue))
        return NULL;
    if (queue->is_packed) {
        id = queue->packed[queue->used].id;
        len = queue->packed[queue->used].len;
    } else {
        const struct vring_used_elem *elem = &queue->used_ring->ring[queue->used & (queue->size - 1)];

        id = elem->id;
        len = elem->len;
    }
    rq = id < queue->size ? queue->rqs[id] : NULL;
    if (!rq) {
        fprintf(stderr, "vu_client: queue %u: %u is used and was not in flight\n", queue->index, id);
        abort();
    }
    queue->rqs[id] = NULL;
    rq->len = len;
    if (queue->is_packed) {
        queue->used += rq->nr_descs;
        if (queue->used >= queue->size) {
            queue->used -= (uint16_t)queue->size;
            queue->used_wrap = !queue->used_wrap;
        }
        queue->next_id[id] = queue->free_head;
    } else {
        uint16_t last = (uint16_t)id;

        queue->used++;
        for (unsigned i = 1; i < rq->nr_descs; i++)
            last = queue->next_id[last];
        queue->next_id[last] = queue->free_head;
    }
    queue->free_head = (uint16_t)id;
    queue->nr_free += rq->nr_descs;
    return rq;
}

bool vuc_arm(struct vuc_queue *queue)
{
    if (queue->is_packed) {
        queue->driver_event->off_wrap = (uint16_t)(queue->used | (queue->used_wrap ? EVENT_WRAP : 0));
        release16(&queue->driver_event->flags,
                  queue->has_event_idx ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE);
    } else if (queue->has_event_idx) {
        release16(&queue->avail_ring->ring[queue->size], queue->used);
    } else {
        release16(&queue->avail_ring->flags, 0);
    }
    __sync_synchronize();
    if (!has_used(queue))
        return true;
    return false;
}

bool vuc_sleep(struct vuc_queue *queue, int timeout_ms)
{
    struct pollfd pfds[2] = {{.fd = queue->call_fd, .events = POLLIN},
                             {.fd = queue->err_fd, .events = POLLIN}};
    uint64_t count;
    int n;

    do {
        n = poll(pfds, 2, timeout_ms);
    } while (n < 0 && errno == EINTR);
    if (n > 0 && pfds[1].revents) {
        fprintf(stderr, "vu_client: queue %u is broken\n", queue->index);
        exit(1);
    }
    if (n > 0 && read(queue->call_fd, &count, sizeof(count)) > 0)
        queue->nr_interrupts++;
    if (queue->is_packed)
        release16(&queue->driver_event->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
    else if (!queue->has_event_idx)
        release16(&queue->avail_ring->flags, VRING_AVAIL_F_NO_INTERRUPT);
    return n > 0;
}
