// What a file system can give, shared by all the devices of this process that have their images on it: what
// one of them has promised, another one does not promise again.
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

struct space {
    struct space *next;
    dev_t dev;
    unsigned nr_users;
    pthread_mutex_t lock; // asking, and what follows from the answer
    // In pages.
    _Atomic int64_t nr_promised, max_promised;
};

// That of the file system of fd, or for -1 one of its own without an end. NULL: out of memory. Cold.
struct space *space_get(int fd);

// nr_promised pages of its are not wanted any more. Cold.
void space_put(struct space *space, int64_t nr_promised);

// Asks the file system of fd. Cold.
void space_refresh(struct space *space, int fd);

// Whether it can give nr_pages now, which are promised like own_promised others, beside what is promised to
// other devices. 0 or -ENOSPC. Cold.
int space_check(struct space *space, int fd, int64_t own_promised, int64_t nr_pages);
