// What sizes and places a device takes.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define LIMITS_MAX_TRANSFER_BYTES (32U * 1024 * 1024) // READ, WRITE: what every NBD client may send

struct limits {
    uint64_t size_bytes;
    uint32_t min_block_bytes;       // offsets and lengths are multiples of it; 1: any byte
    uint32_t preferred_block_bytes; // smaller or unaligned is slower
    uint32_t max_transfer_bytes;    // of one READ or WRITE
    uint64_t max_buf_bytes;         // of memory that transports hold for requests, on each queue (queue.h Q5)
    bool is_read_only;
};

struct image;

// block_bytes: what the user asked for, 0 for nothing. Pure.
struct limits limits_of(const struct image *image, uint32_t block_bytes);
