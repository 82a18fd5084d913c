#include "ring/workers.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "ring/ring.h"

// Guarded by lock.
static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct ring_op *head, *tail;
    pthread_t *threads;
    unsigned nr_queued, nr_threads, nr_idle, max_threads;
    bool is_stopping;
} workers = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .max_threads = 16,
};

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_key_create(void)
{
    pthread_key_create(&scratch_key, free);
}

void *workers_scratch(void)
{
    void *buf;

    pthread_once(&scratch_once, scratch_key_create);
    buf = pthread_getspecific(scratch_key);
    if (!buf) {
        if (posix_memalign(&buf, 4096, WORKERS_SCRATCH_BYTES))
            return NULL;
        pthread_setspecific(scratch_key, buf);
    }
    return buf;
}

void workers_set_max(unsigned nr_threads)
{
    workers.max_threads = nr_threads;
}

unsigned workers_max(void)
{
    return workers.max_threads;
}

static int worker_rw(struct ring_op *op)
{
    const struct iovec *iov = op->rw.iov;
    int nr_iov = (int)op->rw.nr_iov;
    off_t offset = (off_t)op->rw.offset_bytes;
    ssize_t n;

    do {
        n = op->code == RING_READ ? preadv2(op->fd, iov, nr_iov, offset, op->rw_flags)
                                  : pwritev2(op->fd, iov, nr_iov, offset, op->rw_flags);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

static int worker_run(struct ring_op *op)
{
    switch (op->code) {
    case RING_READ:
    case RING_WRITE:
        return worker_rw(op);
    case RING_FSYNC:
        return fdatasync(op->fd) < 0 ? -errno : 0;
    case RING_CALL:
        return op->call(op);
    default:
        return -EINVAL; // nothing else blocks
    }
}

static void *worker_main(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&workers.lock);
    for (;;) {
        struct ring_op *op;

        while (!workers.head && !workers.is_stopping) {
            workers.nr_idle++;
            pthread_cond_wait(&workers.work, &workers.lock);
            workers.nr_idle--;
        }
        op = workers.head;
        if (!op)
            break;
        workers.head = op->next;
        workers.nr_queued--;
        pthread_mutex_unlock(&workers.lock);
        ring_post(op->ring, op, worker_run(op));
        pthread_mutex_lock(&workers.lock);
    }
    pthread_mutex_unlock(&workers.lock);
    return NULL;
}

// Signals are for the main thread.
static int worker_start(pthread_t *thread)
{
    sigset_t all, old;
    int ret;

    sigfillset(&all);
    sigdelset(&all, SIGBUS); // for who touches memory that has gone
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ret = pthread_create(thread, NULL, worker_main, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -ret;
}

// lock held.
static void workers_grow(void)
{
    if (!workers.threads)
        workers.threads = calloc(workers.max_threads, sizeof(*workers.threads));
    if (workers.threads && !worker_start(&workers.threads[workers.nr_threads]))
        workers.nr_threads++;
}

void workers_submit(struct ring_op *op)
{
    pthread_mutex_lock(&workers.lock);
    // Those that were woken for earlier ones still count as idle.
    if (workers.nr_idle <= workers.nr_queued && workers.nr_threads < workers.max_threads)
        workers_grow();
    if (!workers.nr_threads) {
        // Not even one thread can be had: the caller is told by way of its ring.
        pthread_mutex_unlock(&workers.lock);
        ring_post(op->ring, op, -ENOMEM);
        return;
    }
    op->next = NULL;
    if (workers.head)
        workers.tail->next = op;
    else
        workers.head = op;
    workers.tail = op;
    workers.nr_queued++;
    pthread_cond_signal(&workers.work);
    pthread_mutex_unlock(&workers.lock);
}

void workers_stop(void)
{
    pthread_mutex_lock(&workers.lock);
    workers.is_stopping = true;
    pthread_cond_broadcast(&workers.work);
    pthread_mutex_unlock(&workers.lock);
    for (unsigned i = 0; i < workers.nr_threads; i++)
        pthread_join(workers.threads[i], NULL);
    free(workers.threads);
    workers.threads = NULL;
    workers.nr_threads = 0;
    workers.is_stopping = false;
}
