// What the kernel's ublk driver speaks: Documentation/block/ublk.rst, include/uapi/linux/ublk_cmd.h. The
// headers of Debian 12 end at Linux 6.1; this has what is used of the later ones too.
#pragma once

#include <stdint.h>

// Control commands. Since 6.4 they are sent as ioctl numbers, before as they are here.
enum ublk_cmd {
    UBLK_GET_QUEUE_AFFINITY = 0x01,
    UBLK_GET_DEV_INFO = 0x02,
    UBLK_ADD_DEV = 0x04,
    UBLK_DEL_DEV = 0x05,
    UBLK_START_DEV = 0x06,
    UBLK_STOP_DEV = 0x07,
    UBLK_SET_PARAMS = 0x08,
    UBLK_START_USER_RECOVERY = 0x10,
    UBLK_END_USER_RECOVERY = 0x11,
    UBLK_GET_DEV_INFO2 = 0x12, // 6.5: with the path of the device, so for unprivileged ones too
    UBLK_GET_FEATURES = 0x13,  // 6.5
    UBLK_DEL_DEV_ASYNC = 0x14, // 6.9
    UBLK_UPDATE_SIZE = 0x15,   // 6.16, with UBLK_F_UPDATE_SIZE
    UBLK_FETCH = 0x20,         // of /dev/ublkcN
    UBLK_COMMIT_AND_FETCH = 0x21,
};

#define UBLK_F_USER_RECOVERY (1ULL << 3)         // without a server, requests wait
#define UBLK_F_USER_RECOVERY_REISSUE (1ULL << 4) // also those that it had
#define UBLK_F_UNPRIVILEGED_DEV (1ULL << 5)
#define UBLK_F_CMD_IOCTL_ENCODE (1ULL << 6)
#define UBLK_F_USER_COPY (1ULL << 7) // 6.5: data is read and written at /dev/ublkcN
#define UBLK_F_UPDATE_SIZE (1ULL << 10)
#define UBLK_F_AUTO_BUF_REG (1ULL << 11) // 6.16: the request's pages are a registered buffer of the ring

enum ublk_state {
    UBLK_DEAD,
    UBLK_LIVE,
    UBLK_QUIESCED, // no server; waits for recovery
};

#define UBLK_MAX_ID ((1U << 20) - 1) // a minor number
#define UBLK_MAX_DEPTH 4096          // also the stride of the queues' descriptors at /dev/ublkcN

struct ublk_ctrl_cmd {
    uint32_t dev_id;
    uint16_t queue_id; // UINT16_MAX: none
    uint16_t len;
    uint64_t addr;
    uint64_t data;
    uint16_t dev_path_len; // unprivileged: addr begins with that many bytes of path
    uint16_t pad;
    uint32_t reserved;
};

struct ublk_dev_info {
    uint16_t nr_hw_queues, queue_depth, state, pad0;
    uint32_t max_io_buf_bytes, dev_id;
    int32_t ublksrv_pid;
    uint32_t pad1;
    uint64_t flags;         // UBLK_F_*
    uint64_t ublksrv_flags; // kept for the server
    uint32_t owner_uid, owner_gid;
    uint64_t reserved1, reserved2;
};

#define UBLK_PARAM_BASIC (1U << 0)
#define UBLK_PARAM_DISCARD (1U << 1)
#define UBLK_PARAM_DMA_ALIGN (1U << 4) // 6.15

#define UBLK_ATTR_READ_ONLY (1U << 0)
#define UBLK_ATTR_VOLATILE_CACHE (1U << 2)
#define UBLK_ATTR_FUA (1U << 3)

struct ublk_params {
    uint32_t len, types;
    struct {
        uint32_t attrs;
        uint8_t logical_bs_shift, physical_bs_shift, io_opt_shift, io_min_shift;
        uint32_t max_sectors, chunk_sectors;
        uint64_t dev_sectors, virt_boundary_mask;
    } basic;
    struct {
        uint32_t alignment, granularity, max_sectors, max_write_zeroes_sectors;
        uint16_t max_segments, reserved0;
    } discard;
    uint32_t others[12]; // device numbers, zones
    struct {
        uint32_t alignment_mask, reserved0;
    } dma;
};

enum ublk_op {
    UBLK_OP_READ = 0,
    UBLK_OP_WRITE = 1,
    UBLK_OP_FLUSH = 2,
    UBLK_OP_DISCARD = 3,
    UBLK_OP_WRITE_ZEROES = 5,
};

#define UBLK_IO_F_FUA (1U << 13)
#define UBLK_IO_F_NOUNMAP (1U << 15)
#define UBLK_IO_F_NEED_REG_BUF (1U << 17) // AUTO_BUF_REG: it did not work out

// One a tag, in memory that the kernel writes and we read.
struct ublk_io_desc {
    uint32_t op_flags; // enum ublk_op in the low byte
    uint32_t nr_sectors;
    uint64_t start_sector;
    uint64_t addr; // of the buffer that we gave
};

struct ublk_io_cmd {
    uint16_t q_id, tag;
    int32_t result; // bytes of READ and WRITE, or a negative errno
    uint64_t addr;  // of the tag's buffer
};

// With AUTO_BUF_REG, of the submission's addr: the index of the tag's buffer, and what to do when it is
// taken.
#define UBLK_AUTO_BUF_REG_FALLBACK (1U << 16)

// With USER_COPY: where a request's data is in /dev/ublkcN.
#define UBLK_DATA_OFFSET 0x80000000ULL
#define UBLK_DATA_TAG_SHIFT 25
#define UBLK_DATA_QUEUE_SHIFT 41
