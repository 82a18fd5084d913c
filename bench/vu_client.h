// The other side of vhost-user: what QEMU and its guest's driver do, in one small library for the load
// generator and the tests. One thread uses a queue.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "transport/vhost_user/proto.h"

#define VUC_MAX_PIECES 128
#define VUC_SLOT_BYTES 4096 // of a request: header and status, then its indirect table
#define VUC_TABLE_AT 256

struct vuc_options {
    const char *path;
    unsigned nr_queues, queue_size;
    uint64_t data_bytes;   // of memory for data
    unsigned nr_regions;   // that the memory is shared in
    uint64_t features_off; // not to be taken even when they are offered
    bool is_polling;       // no interrupts
    bool has_inflight;
    int memfd, inflight_fd; // -1: make one; else: those of a connection before
};

// A piece of a request, by its place in the memory.
struct vuc_piece {
    uint64_t at;
    uint32_t len_bytes;
    bool is_in; // the device writes it
};

struct vuc_rq {
    unsigned slot;
    unsigned nr_pieces;
    struct vuc_piece pieces[VUC_MAX_PIECES];
    bool is_indirect;
    uint16_t nr_descs; // in the ring
    uint16_t head;     // split: first descriptor; packed: id
    uint32_t len;      // what the device says it has written
    uint64_t begin_ns; // the caller's
    void *arg;
};

struct vuc;

struct vuc_queue {
    struct vuc *vuc;
    unsigned index, size;
    bool is_packed, has_event_idx;
    int kick_fd, call_fd, err_fd;
    uint64_t ring_at, slots_at; // in the memory
    uint16_t nr_free;           // descriptors
    uint16_t avail, used;       // split: counters; packed: places
    uint16_t kicked;            // avail at the last kick
    uint16_t nr_unkicked;       // packed: descriptors since then
    bool avail_wrap, used_wrap;
    uint16_t free_head; // split: list by next; packed: ids, by next_id
    uint16_t *next_id;
    struct vuc_rq **rqs; // by head
    struct vring_desc *desc;
    struct vring_avail *avail_ring;
    struct vring_used *used_ring;
    struct vring_packed_desc *packed;
    struct vring_packed_desc_event *driver_event, *device_event;
    uint64_t nr_kicks, nr_interrupts;
};

struct vuc {
    struct vuc_options options;
    int fd, backend_fd;
    int memfd, inflight_fd;
    char *memory;
    uint64_t memory_bytes, data_at;
    uint64_t features, protocol_features;
    struct virtio_blk_config config;
    struct vu_inflight inflight;
    struct vuc_queue *queues;
};

// Connects, negotiates, shares memory and starts the queues. 0 or a negative errno, with what failed on
// stderr.
int vuc_connect(struct vuc *vuc, const struct vuc_options *options);

// Stops the queues and hangs up.
void vuc_disconnect(struct vuc *vuc);

// Hangs up without a word; memfd and inflight_fd stay open for the next connection's options.
void vuc_drop(struct vuc *vuc);

// A message; its reply goes to reply (up to reply_bytes) when that is given. The reply's size, or a
// negative errno.
int vuc_message(struct vuc *vuc, uint32_t request, const void *payload, uint32_t bytes, const int *fds,
                unsigned nr_fds, void *reply, uint32_t reply_bytes, int *reply_fd);

// Fills in pieces: header, data (may be 0 bytes), status.
void vuc_prepare(struct vuc_queue *queue, struct vuc_rq *rq, uint32_t type, uint64_t sector, uint64_t data_at,
                 uint32_t data_bytes);

// The header and the status of a request, in the memory.
struct virtio_blk_outhdr *vuc_header(const struct vuc_queue *queue, const struct vuc_rq *rq);
volatile uint8_t *vuc_status(const struct vuc_queue *queue, const struct vuc_rq *rq);
uint64_t vuc_header_at(const struct vuc_queue *queue, const struct vuc_rq *rq);
uint64_t vuc_status_at(const struct vuc_queue *queue, const struct vuc_rq *rq);

// Makes it available. false: the ring is full.
bool vuc_submit(struct vuc_queue *queue, struct vuc_rq *rq);

// Tells the device of what was submitted, if it wants to know.
void vuc_kick(struct vuc_queue *queue);

// The next one that is done, or NULL.
struct vuc_rq *vuc_reap(struct vuc_queue *queue);

// Asks to be interrupted. false: something is done already.
bool vuc_arm(struct vuc_queue *queue);

// Sleeps until the interrupt that vuc_arm() has asked for, or timeout_ms. false: time is over.
bool vuc_sleep(struct vuc_queue *queue, int timeout_ms);
