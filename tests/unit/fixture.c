#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ring/workers.h"

void fixture_make_dir(char dir[64])
{
    const char *base = getenv("TMPDIR");

    if (!base || strlen(base) > 40)
        base = "/var/tmp";
    snprintf(dir, 64, "%s/bight-unit.XXXXXX", base);
    assert_non_null(mkdtemp(dir));
}

void fixture_make_file(const char *path, uint64_t size_bytes)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)size_bytes), 0);
    close(fd);
}

struct fixture fixture_create(const struct fixture_options *options)
{
    struct device_options device = {
        .name = "disk",
        .io = options->io ? options->io : "null",
        .map = "linear",
        .ring = options->ring,
        .nr_queues = options->nr_queues ? options->nr_queues : 1,
        .depth = 64,
        .block_bytes = options->block_bytes,
        .writeback_bytes = options->writeback_bytes,
        .image = options->image,
    };
    struct fixture fixture = {.is_stopped = false};
    struct err err = {""};

    workers_set_max(options->nr_workers ? options->nr_workers : 16);
    fixture_make_dir(fixture.dir);
    snprintf(fixture.path, sizeof(fixture.path), "%s/disk", fixture.dir);
    fixture_make_file(fixture.path, options->size_bytes ? options->size_bytes : MiB);
    if (device_create(&fixture.dev, fixture.path, &device, &err) < 0)
        fail_msg("%s", err.line);
    return fixture;
}

void fixture_stop(struct fixture *fixture)
{
    fixture->stop_error = device_stop(fixture->dev);
    workers_stop();
    fixture->is_stopped = true;
}

int fixture_destroy(struct fixture *fixture)
{
    if (!fixture->is_stopped)
        fixture_stop(fixture);
    device_destroy(fixture->dev);
    unlink(fixture->path);
    rmdir(fixture->dir);
    return fixture->stop_error;
}

static void frq_done(struct rq *rq)
{
    struct fixture_rq *frq = container_of(rq, struct fixture_rq, rq);

    if (frq->again && frq->again(frq))
        return;
    atomic_fetch_add(&frq->nr_done, 1);
    sem_post(&frq->sem);
}

void fixture_rq_init(struct fixture_rq *frq, enum req_op op, unsigned flags, uint64_t offset, void *buf,
                     uint64_t len)
{
    *frq = (struct fixture_rq){
        .rq = {.op = (uint8_t)op,
               .flags = (uint8_t)flags,
               .buf_index = -1,
               .offset_bytes = offset,
               .len_bytes = len,
               .done = frq_done},
        .iov = {{buf, len}},
    };
    if (buf) {
        frq->rq.iov = frq->iov;
        frq->rq.nr_iov = 1;
    }
    sem_init(&frq->sem, 0, 0);
}

static void frq_submit(struct ring_op *op, int res)
{
    struct fixture_rq *frq = container_of(op, struct fixture_rq, post);

    (void)res;
    queue_submit(frq->queue, &frq->rq);
}

void fixture_submit(struct queue *queue, struct fixture_rq *frq)
{
    frq->queue = queue;
    frq->post = (struct ring_op){.done = frq_submit};
    ring_post(queue->ring, &frq->post, 0);
}

static void wait_for(sem_t *sem)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    while (sem_timedwait(sem, &until) < 0) {
        if (errno != EINTR)
            fail_msg("not done in 60 s");
    }
}

int fixture_wait(struct fixture_rq *frq)
{
    wait_for(&frq->sem);
    assert_int_equal(atomic_load(&frq->nr_done), 1);
    return frq->rq.error;
}

int fixture_do(struct device *dev, enum req_op op, unsigned flags, uint64_t offset, void *buf, uint64_t len)
{
    struct fixture_rq frq;

    fixture_rq_init(&frq, op, flags, offset, buf, len);
    fixture_submit(&dev->queues[0], &frq);
    return fixture_wait(&frq);
}

struct on_queue {
    struct ring_op op;
    void (*call)(void *arg);
    void *arg;
    sem_t sem;
};

static void on_queue_done(struct ring_op *op, int res)
{
    struct on_queue *on_queue = container_of(op, struct on_queue, op);

    (void)res;
    on_queue->call(on_queue->arg);
    sem_post(&on_queue->sem);
}

void fixture_on_queue(struct queue *queue, void (*call)(void *arg), void *arg)
{
    struct on_queue on_queue = {.op = {.done = on_queue_done}, .call = call, .arg = arg};

    sem_init(&on_queue.sem, 0, 0);
    ring_post(queue->ring, &on_queue.op, 0);
    wait_for(&on_queue.sem);
}
