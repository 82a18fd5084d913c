// The vhost-user protocol as far as a block device needs it: QEMU's docs/interop/vhost-user.rst. All
// numbers are in the machine's byte order.
#pragma once

#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdint.h>

// "Front-end message types"
enum {
    VU_GET_FEATURES = 1,
    VU_SET_FEATURES = 2,
    VU_SET_OWNER = 3,
    VU_RESET_OWNER = 4,
    VU_SET_MEM_TABLE = 5,
    VU_SET_VRING_NUM = 8,
    VU_SET_VRING_ADDR = 9,
    VU_SET_VRING_BASE = 10,
    VU_GET_VRING_BASE = 11,
    VU_SET_VRING_KICK = 12,
    VU_SET_VRING_CALL = 13,
    VU_SET_VRING_ERR = 14,
    VU_GET_PROTOCOL_FEATURES = 15,
    VU_SET_PROTOCOL_FEATURES = 16,
    VU_GET_QUEUE_NUM = 17,
    VU_SET_VRING_ENABLE = 18,
    VU_SET_BACKEND_REQ_FD = 21,
    VU_GET_CONFIG = 24,
    VU_SET_CONFIG = 25,
    VU_GET_INFLIGHT_FD = 31,
    VU_SET_INFLIGHT_FD = 32,
    VU_RESET_DEVICE = 34,
    VU_GET_MAX_MEM_SLOTS = 36,
    VU_ADD_MEM_REG = 37,
    VU_REM_MEM_REG = 38,
    VU_REQUEST_NR,
};

// "Back-end message types"
#define VU_BACKEND_CONFIG_CHANGE_MSG 2

// "Header"
#define VU_VERSION 1U
#define VU_VERSION_MASK 3U
#define VU_REPLY (1U << 2)
#define VU_NEED_REPLY (1U << 3)

// "Protocol features"
#define VU_PROTOCOL_F_MQ 0
#define VU_PROTOCOL_F_REPLY_ACK 3
#define VU_PROTOCOL_F_BACKEND_REQ 5
#define VU_PROTOCOL_F_CONFIG 9
#define VU_PROTOCOL_F_INFLIGHT_SHMFD 12
#define VU_PROTOCOL_F_RESET_DEVICE 13
#define VU_PROTOCOL_F_CONFIGURE_MEM_SLOTS 15

#define VU_F_PROTOCOL_FEATURES 30 // a virtio feature bit

#define VU_BIT(n) (1ULL << (n))

#define VU_MAX_FDS 8       // with a message
#define VU_TABLE_REGIONS 8 // in SET_MEM_TABLE
#define VU_MAX_CONFIG_BYTES 256
#define VU_CONFIG_F_MIGRATION 1 // flags of SET_CONFIG
#define VU_VRING_INDEX_MASK 0xffU
#define VU_VRING_NO_FD (1U << 8)

struct vu_header {
    uint32_t request, flags, size; // size: of the payload
};

struct vu_vring_state {
    uint32_t index, num;
};

struct vu_vring_addr {
    uint32_t index, flags;
    uint64_t desc, used, avail; // in the front-end's address space
    uint64_t log;
};

struct vu_region {
    uint64_t guest, size, user, mmap_offset;
};

struct vu_mem_table {
    uint32_t nr_regions, padding;
    struct vu_region regions[VU_TABLE_REGIONS];
};

struct vu_mem_reg {
    uint64_t padding;
    struct vu_region region;
};

struct vu_config {
    uint32_t offset, size, flags;
    uint8_t payload[VU_MAX_CONFIG_BYTES];
};

struct vu_inflight {
    uint64_t mmap_size, mmap_offset;
    uint16_t nr_queues, queue_size;
};

union vu_payload {
    uint64_t u64;
    struct vu_vring_state state;
    struct vu_vring_addr addr;
    struct vu_mem_table table;
    struct vu_mem_reg reg;
    struct vu_config config;
    struct vu_inflight inflight;
};

// "Inflight I/O tracking": a queue's region of the shared buffer.
struct vu_desc_state_split {
    uint8_t inflight, padding[5];
    uint16_t next;
    uint64_t counter;
};

struct vu_inflight_split {
    uint64_t features;
    uint16_t version, desc_num, last_batch_head, used_idx;
    struct vu_desc_state_split desc[];
};

struct vu_desc_state_packed {
    uint8_t inflight, padding;
    uint16_t next, last, num;
    uint64_t counter;
    uint16_t id, flags;
    uint32_t len;
    uint64_t addr;
};

struct vu_inflight_packed {
    uint64_t features;
    uint16_t version, desc_num, free_head, old_free_head, used_idx, old_used_idx;
    uint8_t used_wrap_counter, old_used_wrap_counter, padding[7];
    struct vu_desc_state_packed desc[];
};

#define VU_INFLIGHT_VERSION 1
