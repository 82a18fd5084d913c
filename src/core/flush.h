// Durability: what a device may promise, and how it keeps it.
#pragma once

#include <stdbool.h>

enum flush_action {
    FLUSH_NOTHING,   // nothing is volatile
    FLUSH_FDATASYNC, // fdatasync of the image
    FLUSH_BOTH,      // of the image if it was written to, and of the device that the map redirects to
};

enum fua_action {
    FUA_NOTHING, // a write is durable when it is complete
    FUA_DSYNC,   // RWF_DSYNC, or fdatasync after what is no write(2)
};

struct durability_in {
    bool is_read_only;
    bool is_stored;     // the io keeps what is written (false: null)
    bool is_sync;       // the fd was opened with O_SYNC or O_DSYNC
    bool has_writeback; // what is written stays with us at first
    bool has_device_fd; // the map may redirect past the image's fd
};

struct durability {
    bool has_volatile_cache; // advertise a write cache, FLUSH and FUA
    enum flush_action flush;
    enum fua_action fua;
};

// The one place that decides what is advertised. Pure.
struct durability flush_durability(const struct durability_in *in);

struct rq;
struct device;

// A FLUSH begins: covers every write of the device that is complete. Ends with rq->ran() where that is set,
// as rq_run() does. Queue's thread.
void flush_submit(struct rq *rq);

// RWF_* for this write. Queue's thread.
int flush_rw_flags(const struct rq *rq);

// An fsync, or a write that implied one, failed with error (< 0): the kernel has told that once and
// will not again, so every FLUSH from now on fails. Any thread.
void flush_failed(struct device *dev, int error);

// A write of rq failed with error: with FUA, that may have been its fsync. Any thread.
void flush_write_failed(const struct rq *rq, int error);

// Something of rq, a write, has gone to where the map or, for what is no WRITE, the image said. Any thread.
void flush_note_write(const struct rq *rq);

// All that is complete becomes durable, at the end of a device or before a change. 0, or the error that
// stays (F2). Cold; blocks.
int flush_all(struct device *dev);
