// Runs tests on both kinds of ring: their *state is the kind's struct ring_ops.
#pragma once

#include "unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ring/ring.h"

// Valgrind does not see what an io_uring writes, and takes it for uninitialised.
static inline bool is_under_valgrind(void)
{
    const char *preload = getenv("LD_PRELOAD");

    return preload && strstr(preload, "vgpreload");
}

// Skips the test where the kernel or valgrind forbids this kind.
static inline const struct ring_ops *ring_ops_of(void **state)
{
    const struct ring_ops *ops = *state;
    struct ring *ring = NULL;
    struct err err;

    if (ops == &ring_uring_ops && (is_under_valgrind() || ring_create(ops, &ring, &err) < 0))
        skip();
    if (ring)
        ring_destroy(ring);
    return ops;
}

static inline int run_on_ring(const struct ring_ops *ops, const struct CMUnitTest *tests, size_t nr_tests)
{
    struct CMUnitTest *copies = calloc(nr_tests, sizeof(*copies));
    char(*names)[160] = calloc(nr_tests, sizeof(*names));
    int nr_failed;

    for (size_t i = 0; i < nr_tests; i++) {
        snprintf(names[i], sizeof(names[i]), "%s (%s)", tests[i].name, ops->name);
        copies[i] = tests[i];
        copies[i].name = names[i];
        copies[i].initial_state = (void *)ops;
    }
    nr_failed = _cmocka_run_group_tests(ops->name, copies, nr_tests, NULL, NULL);
    free(names);
    free(copies);
    return nr_failed;
}

// Threads first: what an io_uring leaves to be done at its end interrupts this thread's epoll_wait(), which
// would wake a ring that has forgotten to.
#define run_on_both_rings(tests)                                \
    (run_on_ring(&ring_threads_ops, tests, ARRAY_SIZE(tests)) + \
     run_on_ring(&ring_uring_ops, tests, ARRAY_SIZE(tests)))
