// What linux/fuse.h of older headers lacks of the kernel's protocol; "7.40" is the version of the protocol
// that brought it.
#pragma once

#include <linux/fuse.h>
#include <stdint.h>

#define FUSE_PROTO_MINOR 42     // the newest that we know
#define FUSE_PROTO_MIN_MINOR 31 // Linux 5.4

#ifndef FUSE_DIRECT_IO_ALLOW_MMAP // 7.39
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#endif
#ifndef FUSE_HAS_RESEND // 7.40
#define FUSE_HAS_RESEND (1ULL << 39)
#define FUSE_NOTIFY_RESEND 7
#define FUSE_PASSTHROUGH (1ULL << 37)
#define FOPEN_PASSTHROUGH (1U << 7)

struct fuse_backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};

#define FUSE_DEV_IOC_BACKING_OPEN _IOW(229, 1, struct fuse_backing_map)
// What such headers call these members of struct fuse_init_out and fuse_open_out.
#define FUSE_INIT_STACK_DEPTH unused[0]
#define FUSE_OPEN_BACKING_ID padding
#else
#define FUSE_INIT_STACK_DEPTH max_stack_depth
#define FUSE_OPEN_BACKING_ID backing_id
#endif
#ifndef FUSE_OVER_IO_URING // 7.42
#define FUSE_OVER_IO_URING (1ULL << 41)
#define FUSE_URING_IN_OUT_HEADER_SZ 128
#define FUSE_URING_OP_IN_OUT_SZ 128

struct fuse_uring_ent_in_out {
    uint64_t flags;
    uint64_t commit_id;
    uint32_t payload_sz;
    uint32_t padding;
    uint64_t reserved;
};

struct fuse_uring_req_header {
    char in_out[FUSE_URING_IN_OUT_HEADER_SZ]; // struct fuse_in_header, then struct fuse_out_header
    char op_in[FUSE_URING_OP_IN_OUT_SZ];      // the operation's own header
    struct fuse_uring_ent_in_out ring_ent_in_out;
};

enum {
    FUSE_IO_URING_CMD_REGISTER = 1,
    FUSE_IO_URING_CMD_COMMIT_AND_FETCH = 2,
};

struct fuse_uring_cmd_req {
    uint64_t flags;
    uint64_t commit_id;
    uint16_t qid;
    uint8_t padding[6];
};
#endif
