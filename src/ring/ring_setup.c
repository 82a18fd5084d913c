// The cold part of the rings: which kinds there are, and how one begins and ends.

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ring/ring.h"
#include "util/util.h"

static const struct ring_ops *const ring_table[] = {
    &ring_uring_ops, // the first that works is what "auto" takes
    &ring_threads_ops,
};

const struct ring_ops *ring_choose(const char *name, struct err *err)
{
    bool is_auto = !strcmp(name, "auto");

    for (unsigned i = 0; i < ARRAY_SIZE(ring_table); i++) {
        struct ring *ring;

        if (!is_auto && strcmp(name, ring_table[i]->name))
            continue;
        if (!ring_create(ring_table[i], &ring, err)) {
            log_verbose("ring: %s (%s)", ring_table[i]->name, ring->mode);
            ring_destroy(ring);
            return ring_table[i];
        }
        if (!is_auto)
            return NULL;
        log_verbose("ring: %s; trying the next kind", err->line);
    }
    if (!is_auto)
        err_usage(err, "--ring: %s: no such ring; use auto, uring or threads", name);
    return NULL;
}

int ring_guard_fd = -1;

int ring_create(const struct ring_ops *ops, struct ring **ring, struct err *err)
{
    int ret = ops->create(ring, err);

    assert(ret < 0 || (*ring)->ops == ops);
    if (!ret && ring_guard_fd >= 0)
        ring_pin_fd(*ring, ring_guard_fd);
    return ret;
}

void ring_destroy(struct ring *ring)
{
    ring->ops->destroy(ring);
}

int ring_init(struct ring *ring, const struct ring_ops *ops)
{
    ring->ops = ops;
    ring->now_ns = util_now_ns();
    ring->timers = NULL;
    ring->hooks = NULL;
    ring->pollers = NULL;
    ring->poll_ns = 0;
    ring->busy_ns = 0;
    ring->hooks_tail = &ring->hooks;
    atomic_init(&ring->inbox, NULL);
    atomic_init(&ring->is_woken, false);
    ring->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return ring->wake_fd < 0 ? -errno : 0;
}

void ring_exit(struct ring *ring)
{
    close(ring->wake_fd);
}
