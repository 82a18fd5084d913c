// Inside of write-back: request.c has the requests, flusher.c what goes below.
//
//  W1. What is under write-back and what is being zeroed never overlap, and no two writes below do: a
//      slot claims its range under lock, and so does what makes zeroes.
//  W2. A sync (a pass over the device, or the range of a FUA write) is over when it has been gathered from
//      start to end without being blocked, and all of its writes are done. What was dirty when it began
//      is below then, or has failed and is dirty still.
//  W3. A pass, as long as it lasts, counts as in flight on the first queue: a freeze waits for it, and
//      none begins on a frozen device but for requests that are in flight, and to drain it.
//  W4. Who waits for memory or space is woken when a write below is over, or when a pass is.
//  W5. Under load a write passes the cache by where that brings nothing: all of its places are FULL,
//      none of its sectors is cached, and it does not go on where the one before ended. It is of whole
//      sectors, and none that is written in part has its rest read meanwhile (nr_passing, nr_partial):
//      that rest would cover it. Other writes to the same sectors are not held back: a client that does
//      not wait for one before it sends the next gets either, with a cache or without.
//
// Threads: the first queue's owns the flusher's state; one worker at a time gathers; slots are written by
// all queues in turn; requests stay on their own queue's thread.
//
// Lock order: lock, and the locks of page_cache.h, delalloc.h and space.h, are taken one at a time, but for
// shard -> pool_lock.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "core/rq.h"
#include "writeback/delalloc.h"
#include "writeback/page_cache.h"
#include "writeback/writeback.h"

#define WB_NR_SLOTS 64U
#define WB_SLOT_PAGES 256U // 1 MiB a write
#define WB_GAP_BYTES (32 * KiB)
#define WB_FLUSH_SHARE 4 // G4
#define WB_FLUSH_MIN_PAGES 64U
#define WB_TICK_NS (NSEC_PER_SEC)
#define WB_MAX_AGE_NS (5 * NSEC_PER_SEC)
#define WB_PASS_BY_NS (NSEC_PER_SEC) // W5, and longer where as much as this part of
#define WB_PASS_BY_SHARE 8           // background_pages has come meanwhile

// One write below.
struct wb_slot {
    struct rq rq;
    struct writeback *wb;
    struct wb_slot *next_free;
    struct wb_sync *sync;
    uint64_t start, end; // W1; end is 0: free
    struct ring_op op;   // from thread to thread
    struct page_ref refs[WB_SLOT_PAGES];
    struct iovec iov[WB_SLOT_PAGES];
    unsigned nr_refs;
};

struct writeback {
    struct device *dev;
    struct page_cache cache;
    struct delalloc delalloc;
    uint64_t size_bytes; // of memory
    uint64_t device_bytes;
    unsigned background_pages; // a pass begins, at the latest
    unsigned soft_pages;       // writers are slowed down from here on
    char *zeroes;              // WB_GAP_BYTES of them

    // Any thread.
    atomic_bool is_kicked;
    struct ring_op kick_op;
    atomic_uint begin_pages; // a pass begins: G4
    atomic_int error;        // the last write-back's
    _Atomic uint64_t written_bytes, nr_writes, nr_throttled_total, bytes_per_s;
    _Atomic uint64_t nr_unblocks; // a slot or a zeroing is over
    _Atomic int64_t credit;       // pages that may come in beyond soft_pages
    atomic_uint nr_throttled;
    atomic_uint nr_tight; // waiting for space
    // W5
    _Atomic uint64_t pass_by_until_ns, passed_bytes; // since it was set
    _Atomic uint64_t nr_passed;
    atomic_uint nr_passing, nr_partial;
    // Written by the first queue's thread.
    atomic_bool is_in_pass, is_ticking;

    pthread_mutex_t lock;
    struct wb_slot *slots, *free_slots;
    unsigned nr_free_slots;
    struct rq *zeroing;                     // ranges: W1
    struct rq *throttled, **throttled_tail; // first come first
    struct rq *tight;
    struct rq *partials; // waiting until nr_passing is 0

    // The worker that gathers, and nobody while none does.
    struct wb_sync *fresh_sync; // A4: whose cursor fresh_end is about
    uint64_t fresh_end;
    unsigned next_queue;

    // The first queue's thread.
    struct wb_sync pass;
    bool is_job_running;
    struct rq *flushes, *pass_flushes; // for the next pass, and of this one
    struct rq *fuas;                   // the worker's while it gathers
    struct rq *new_fuas;               // that came meanwhile
    struct writeback_drain *drains, *pass_drains;
    struct rq *pass_tight;
    struct ring_op job_op, timer_op;
    uint64_t dirty_since_ns, retry_at_ns, rate_at_ns, rate_bytes;
    uint64_t flushed_bytes; // written_bytes at the last FLUSH: G4
};

// ---- flusher.c

void flusher_init(struct writeback *wb);

// The first queue's thread looks whether there is something to do. Any thread.
void flusher_kick(struct writeback *wb);

// Have rq's range written back (FUA), or everything (FLUSH); then written(rq, error) on rq's thread.
// Queue's thread.
void flusher_sync(struct rq *rq);

// ---- request.c

void request_synced(struct rq *rq, int error);

// Frames came free: those who wait go on. Any thread.
void request_wake(struct writeback *wb, unsigned nr_freed);

// A pass is over: space is to be had now, or it is not. Takes a list by wb.next.
void request_allocate_tight(struct rq *rqs);

// No memory is to be had, because what holds it cannot be written.
void request_fail_throttled(struct writeback *wb, int error);

// A slot is over: zeroing that it was in the way of goes on. lock held.
void request_wake_zeroing(struct writeback *wb);
