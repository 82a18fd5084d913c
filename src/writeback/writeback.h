// Write-back: between the core and the map. Writes are done when they are in the page cache; they go
// below in file order, in large pieces, once their places were allocated in large pieces.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ring/ring.h"
#include "util/log.h"

struct device;
struct image;
struct io;
struct map;
struct rq;
struct extent;
struct writeback;

#define WRITEBACK_DEFAULT_BYTES (64ULL * 1024 * 1024)
#define WRITEBACK_UNIT_BYTES (1024ULL * 1024) // what qemu-img asks XFS for, too
#define WRITEBACK_MIN_BYTES (1024ULL * 1024)
#define WRITEBACK_MAX_BYTES (1ULL << 40)
#define WRITEBACK_BUF_BYTES (8ULL * 1024 * 1024) // for requests on all queues, beside it

// What write-back needs to know beforehand. Main thread, or a worker; cold.
struct writeback_options {
    uint64_t size_bytes; // of memory, all told
    uint64_t unit_bytes; // of allocation; a power of two, a page or more
};

// "off", "on" or a size. 0 or -EINVAL.
int writeback_parse(const char *text, uint64_t *size_bytes);

// Takes what is dev's, or will be: image, map and io. 0 or a negative errno with err set.
int writeback_create(struct writeback **out, struct device *dev, const struct writeback_options *options,
                     const struct image *image, struct map *map, struct io *io, struct err *err);

// No queue uses it any more. What it holds is lost.
void writeback_destroy(struct writeback *wb);

// Takes a request over. false: it is none for write-back. Queue's thread.
bool writeback_submit(struct rq *rq);

// What the cache knows of [start, start + len): true and *ext filled, or false, and *len cut to what it
// knows nothing of. For block status. Any thread.
bool writeback_extent(struct writeback *wb, uint64_t start, uint64_t *len, struct extent *ext);

// Everything is written and flushed, while the device is frozen or has no clients.
struct writeback_drain {
    // On the first queue's thread. error: the first of what could not be written; lost_bytes of it.
    void (*done)(struct writeback_drain *drain, int error, uint64_t lost_bytes);
    // The rest is write-back's.
    struct writeback *wb;
    struct ring_op op;
    struct writeback_drain *next;
    int error;
};
void writeback_drain(struct writeback *wb, struct writeback_drain *drain);

// The same, and waits. Any thread that is no queue's.
int writeback_drain_wait(struct writeback *wb, uint64_t *lost_bytes);

struct writeback_stats {
    uint64_t size_bytes;      // of memory, at most
    uint64_t used_bytes;      // of it
    uint64_t dirty_bytes;     // not written yet
    uint64_t delayed_bytes;   // of those: without a place
    uint64_t reserved_bytes;  // promised to them
    uint64_t failed_bytes;    // could not be written, and will be tried again
    int error;                // the last such error, or 0
    uint64_t written_bytes;   // since the start
    uint64_t bytes_per_s;     // of late
    uint64_t nr_writes;       // requests to the image
    uint64_t nr_runs;         // that were allocated
    uint64_t nr_map_calls;    // for them
    uint64_t allocated_bytes; // by them
    uint64_t nr_throttled;    // writes that had to wait for memory
    uint64_t nr_passed;       // writes that went by the cache
};
// false: the device has no write-back. Any thread that device_create() and changes exclude.
bool writeback_stats(const struct device *dev, struct writeback_stats *stats);
