#include "rings.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ring/workers.h"

static struct ring *make_ring(void **state)
{
    struct ring *ring;
    struct err err;

    assert_int_equal(ring_create(ring_ops_of(state), &ring, &err), 0);
    return ring;
}

static void end_ring(struct ring *ring)
{
    workers_stop(); // R5
    ring_destroy(ring);
}

// An operation that remembers how it ended.
struct tracked {
    struct ring_op op;
    int nr_done, res;
    unsigned order; // of all that were done
};

static unsigned nr_all_done;
static bool is_in_queue;

static void tracked_done(struct ring_op *op, int res)
{
    struct tracked *tracked = container_of(op, struct tracked, op);

    assert_false(is_in_queue); // R2
    tracked->nr_done++;
    tracked->res = res;
    tracked->order = nr_all_done++;
}

static void queue(struct ring *ring, struct tracked *tracked)
{
    tracked->op.done = tracked_done;
    is_in_queue = true;
    ring_queue(ring, &tracked->op);
    is_in_queue = false;
}

static void watchdog_done(struct ring_op *op, int res)
{
    (void)op;
    (void)res;
    fail_msg("nothing has come for 20 s: a wake-up was lost");
}

static int run_until_done(struct ring *ring, struct tracked *tracked)
{
    struct ring_op watchdog = {.done = watchdog_done, .code = RING_TIMEOUT, .timeout_ns = 20 * NSEC_PER_SEC};

    ring_queue(ring, &watchdog);
    while (!tracked->nr_done)
        assert_int_equal(ring_run(ring), 0);
    ring_cancel_timeout(ring, &watchdog);
    assert_int_equal(tracked->nr_done, 1);
    return tracked->res;
}

static int scratch_file(void)
{
    char path[] = "/tmp/bight-ring.XXXXXX";
    int fd = mkstemp(path);

    assert_true(fd >= 0);
    unlink(path);
    return fd;
}

static void make_pair(int *fds)
{
    int bytes = 8192;

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

// ---- Posts

#define NR_POSTERS 4
#define NR_POSTS 5000

struct post {
    struct ring_op op;
    unsigned poster, number;
};

struct poster {
    struct ring *ring;
    pthread_t thread;
    unsigned nr_done;
    struct post posts[NR_POSTS];
};

static struct poster *posters;
static unsigned nr_misplaced;

static void post_done(struct ring_op *op, int res)
{
    struct post *post = container_of(op, struct post, op);

    nr_misplaced += posters[post->poster].nr_done++ != post->number || res != (int)post->number;
}

static void *poster_main(void *arg)
{
    struct poster *poster = arg;

    for (unsigned i = 0; i < NR_POSTS; i++)
        ring_post(poster->ring, &poster->posts[i].op, (int)i);
    return NULL;
}

static void posts_of_many_threads_are_all_done_each_thread_in_order(void **state)
{
    struct ring *ring = make_ring(state);

    nr_misplaced = 0;
    posters = calloc(NR_POSTERS, sizeof(*posters));
    for (unsigned i = 0; i < NR_POSTERS; i++) {
        posters[i].ring = ring;
        for (unsigned j = 0; j < NR_POSTS; j++)
            posters[i].posts[j] = (struct post){.op = {.done = post_done}, .poster = i, .number = j};
        assert_int_equal(pthread_create(&posters[i].thread, NULL, poster_main, &posters[i]), 0);
    }
    for (unsigned i = 0; i < NR_POSTERS; i++) {
        while (posters[i].nr_done < NR_POSTS)
            assert_int_equal(ring_run(ring), 0);
    }
    for (unsigned i = 0; i < NR_POSTERS; i++)
        pthread_join(posters[i].thread, NULL);
    assert_int_equal(nr_misplaced, 0);
    free(posters);
    end_ring(ring);
}

static void *post_later(void *arg)
{
    struct tracked *tracked = arg;

    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    ring_post(tracked->op.ring, &tracked->op, 42);
    return NULL;
}

static void a_post_wakes_a_ring_that_sleeps(void **state)
{
    struct ring *ring = make_ring(state);
    pthread_t thread;

    for (unsigned i = 0; i < 3; i++) {
        struct tracked tracked = {.op = {.done = tracked_done, .ring = ring}};

        assert_int_equal(pthread_create(&thread, NULL, post_later, &tracked), 0);
        assert_int_equal(run_until_done(ring, &tracked), 42);
        pthread_join(thread, NULL);
    }
    end_ring(ring);
}

static void the_owner_may_post_to_itself(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked tracked[10] = {0};

    for (unsigned i = 0; i < 10; i++) {
        tracked[i].op.done = tracked_done;
        ring_post(ring, &tracked[i].op, (int)i);
        assert_int_equal(tracked[i].nr_done, 0);
    }
    for (unsigned i = 0; i < 10; i++)
        assert_int_equal(run_until_done(ring, &tracked[i]), i);
    end_ring(ring);
}

static void free_done(struct ring_op *op, int res)
{
    (void)res;
    memset(op, 0xee, sizeof(*op));
    free(op);
    nr_all_done++;
}

static int return_7(struct ring_op *op)
{
    (void)op;
    return 7;
}

static void an_operation_is_its_owners_again_once_it_is_done(void **state)
{
    struct ring *ring = make_ring(state);
    unsigned nr = 0;
    int fd = scratch_file();

    nr_all_done = 0;
    for (unsigned i = 0; i < 100; i++) {
        struct ring_op *ops[4];

        for (unsigned j = 0; j < 4; j++, nr++) {
            ops[j] = calloc(1, sizeof(*ops[j]));
            ops[j]->done = free_done;
        }
        ring_post(ring, ops[0], 0);
        ops[1]->code = RING_CALL;
        ops[1]->call = return_7;
        ring_queue(ring, ops[1]);
        ops[2]->code = RING_TIMEOUT;
        ops[2]->timeout_ns = i * 1000;
        ring_queue(ring, ops[2]);
        ops[3]->code = RING_FSYNC;
        ops[3]->fd = fd;
        ring_queue(ring, ops[3]);
    }
    while (nr_all_done < nr)
        assert_int_equal(ring_run(ring), 0);
    close(fd);
    end_ring(ring);
}

// ---- Timers

static void timers_end_in_the_order_of_their_time_and_not_before_it(void **state)
{
    static const unsigned ms[] = {30, 10, 20, 0, 10, 25};
    static const unsigned order[] = {5, 1, 3, 0, 2, 4}; // the two of 10 ms as they were queued
    struct ring *ring = make_ring(state);
    struct tracked timers[ARRAY_SIZE(ms)] = {0};
    uint64_t begin_ns = util_now_ns();

    nr_all_done = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(ms); i++) {
        timers[i].op.code = RING_TIMEOUT;
        timers[i].op.timeout_ns = ms[i] * 1000000ULL;
        queue(ring, &timers[i]);
    }
    assert_int_equal(run_until_done(ring, &timers[0]), 0);
    assert_true(util_now_ns() - begin_ns >= 30000000);
    for (unsigned i = 0; i < ARRAY_SIZE(ms); i++) {
        assert_int_equal(timers[i].nr_done, 1);
        assert_int_equal(timers[i].order, order[i]);
    }
    end_ring(ring);
}

static void a_cancelled_timer_is_never_done(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked timers[3] = {0};

    for (unsigned i = 0; i < 3; i++) {
        timers[i].op.code = RING_TIMEOUT;
        timers[i].op.timeout_ns = (i + 1) * 1000000ULL;
        queue(ring, &timers[i]);
    }
    assert_true(ring_cancel_timeout(ring, &timers[1].op));
    assert_false(ring_cancel_timeout(ring, &timers[1].op));
    run_until_done(ring, &timers[2]);
    assert_int_equal(timers[0].nr_done, 1);
    assert_int_equal(timers[1].nr_done, 0);
    assert_false(ring_cancel_timeout(ring, &timers[0].op));
    end_ring(ring);
}

struct periodic {
    struct ring_op op;
    struct ring *ring;
    unsigned nr_done;
};

static void periodic_done(struct ring_op *op, int res)
{
    struct periodic *periodic = container_of(op, struct periodic, op);

    (void)res;
    if (++periodic->nr_done == 20)
        return;
    op->timeout_ns = periodic->nr_done % 2 ? 0 : 100000;
    ring_queue(periodic->ring, op);
}

static void a_timer_may_be_queued_again_by_itself(void **state)
{
    struct ring *ring = make_ring(state);
    struct periodic periodic = {.op = {.done = periodic_done, .code = RING_TIMEOUT}, .ring = ring};

    ring_queue(ring, &periodic.op);
    while (periodic.nr_done < 20)
        assert_int_equal(ring_run(ring), 0);
    end_ring(ring);
}

static void queue_timer_done(struct ring_op *op, int res)
{
    struct periodic *periodic = container_of(op, struct periodic, op);

    (void)res;
    periodic->op = (struct ring_op){.done = periodic_done, .code = RING_TIMEOUT, .timeout_ns = 1000000};
    periodic->nr_done = 19;
    ring_queue(periodic->ring, &periodic->op);
}

// Here a POLL that is ready at once; what it queues counts for the sleep of the same turn.
static void a_timer_is_heeded_whoever_queues_it(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked watchdog = {.op = {.code = RING_TIMEOUT, .timeout_ns = 5 * NSEC_PER_SEC}};
    struct periodic periodic = {.op = {.done = queue_timer_done, .code = RING_POLL, .events = POLLOUT},
                                .ring = ring};
    int fds[2];

    make_pair(fds);
    periodic.op.fd = fds[0];
    queue(ring, &watchdog);
    ring_queue(ring, &periodic.op);
    while (periodic.nr_done < 20)
        assert_int_equal(ring_run(ring), 0);
    assert_int_equal(watchdog.nr_done, 0);
    ring_remove_fd(ring, fds[0]);
    close(fds[0]);
    close(fds[1]);
    end_ring(ring);
}

// The owner looks at what done() has told it before the ring sleeps again.
static void a_turn_ends_once_something_is_done(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked watchdog = {.op = {.code = RING_TIMEOUT, .timeout_ns = 5 * NSEC_PER_SEC}};
    struct tracked poll_op = {.op = {.code = RING_POLL, .events = POLLOUT}};
    int fds[2];

    make_pair(fds);
    poll_op.op.fd = fds[0];
    queue(ring, &watchdog);
    queue(ring, &poll_op);
    while (!poll_op.nr_done)
        assert_int_equal(ring_run(ring), 0);
    assert_int_equal(watchdog.nr_done, 0);
    ring_remove_fd(ring, fds[0]);
    close(fds[0]);
    close(fds[1]);
    end_ring(ring);
}

// ---- Hooks

struct hook {
    struct ring_hook hook;
    struct ring *ring;
    unsigned nr_runs, nr_again, nr_done_before;
};

static void hook_run(struct ring_hook *ring_hook)
{
    struct hook *hook = container_of(ring_hook, struct hook, hook);

    hook->nr_runs++;
    hook->nr_done_before = nr_all_done;
    if (hook->nr_again) {
        hook->nr_again--;
        ring_defer(hook->ring, ring_hook);
    }
}

static struct hook *deferred_by_done;

static void defer_done(struct ring_op *op, int res)
{
    tracked_done(op, res);
    ring_defer(deferred_by_done->ring, &deferred_by_done->hook);
}

static void a_hook_runs_once_after_all_completions_of_the_batch(void **state)
{
    struct ring *ring = make_ring(state);
    struct hook hook = {.hook = {.run = hook_run}, .ring = ring};
    struct tracked tracked[20] = {0};

    nr_all_done = 0;
    deferred_by_done = &hook;
    for (unsigned i = 0; i < 20; i++) {
        tracked[i].op.done = defer_done;
        ring_post(ring, &tracked[i].op, 0);
    }
    assert_int_equal(ring_run(ring), 0);
    assert_int_equal(nr_all_done, 20); // one inbox, one batch
    assert_int_equal(hook.nr_runs, 1);
    assert_int_equal(hook.nr_done_before, 20);
    end_ring(ring);
}

static void a_hook_that_defers_itself_runs_in_the_next_batch(void **state)
{
    struct ring *ring = make_ring(state);
    struct hook hook = {.hook = {.run = hook_run}, .ring = ring, .nr_again = 3};
    struct hook other = {.hook = {.run = hook_run}, .ring = ring};

    ring_defer(ring, &hook.hook);
    ring_defer(ring, &other.hook);
    ring_defer(ring, &hook.hook);
    for (unsigned i = 1; i <= 4; i++) {
        assert_int_equal(ring_run(ring), 0); // a hook is waiting: it does not sleep
        assert_int_equal(hook.nr_runs, i);
        assert_int_equal(other.nr_runs, 1);
    }
    end_ring(ring);
}

// ---- Files

static void prep_rw(struct tracked *tracked, enum ring_code code, int fd, const struct iovec *iov,
                    unsigned nr_iov, uint64_t offset)
{
    *tracked = (struct tracked){.op = {.code = code,
                                       .fd = fd,
                                       .buf_index = -1,
                                       .rw = {.iov = iov, .nr_iov = nr_iov, .offset_bytes = offset}}};
}

static int do_rw(struct ring *ring, enum ring_code code, int fd, void *buf, size_t len, uint64_t offset)
{
    struct iovec iov = {buf, len};
    struct tracked tracked;

    prep_rw(&tracked, code, fd, &iov, 1, offset);
    queue(ring, &tracked);
    return run_until_done(ring, &tracked);
}

static void files_are_read_and_written_at_offsets_with_lists(void **state)
{
    struct ring *ring = make_ring(state);
    int fd = scratch_file();
    char a[] = "abc", b[] = "defgh", c[8] = "", d[20] = "";
    struct iovec out[2] = {{a, 3}, {b, 5}}, in[2] = {{c, 2}, {d, 20}};
    struct tracked tracked;

    prep_rw(&tracked, RING_WRITE, fd, out, 2, 1000000);
    queue(ring, &tracked);
    assert_int_equal(run_until_done(ring, &tracked), 8);
    tracked = (struct tracked){.op = {.code = RING_FSYNC, .fd = fd}};
    queue(ring, &tracked);
    assert_int_equal(run_until_done(ring, &tracked), 0);
    prep_rw(&tracked, RING_READ, fd, in, 2, 1000001);
    queue(ring, &tracked);
    assert_int_equal(run_until_done(ring, &tracked), 7); // short: the file ends there
    assert_memory_equal(c, "bc", 2);
    assert_memory_equal(d, "defgh", 5);
    assert_int_equal(do_rw(ring, RING_READ, fd, d, 20, 2000000), 0);
    assert_int_equal(lseek(fd, 0, SEEK_END), 1000008);
    close(fd);
    end_ring(ring);
}

static void errors_are_negative_errnos(void **state)
{
    struct ring *ring = make_ring(state);
    int fd = open("/dev/null", O_RDONLY), full = open("/dev/full", O_WRONLY), dir = open("/", O_RDONLY),
        pipe_fds[2];
    char buf[4096] = "";
    struct tracked tracked = {.op = {.code = RING_FSYNC, .fd = 900}};

    assert_int_equal(pipe(pipe_fds), 0);
    assert_int_equal(do_rw(ring, RING_WRITE, fd, buf, 1, 0), -EBADF);
    assert_int_equal(do_rw(ring, RING_WRITE, full, buf, 1, 0), -ENOSPC);
    assert_int_equal(do_rw(ring, RING_READ, dir, buf, 1, 0), -EISDIR);
    queue(ring, &tracked);
    assert_int_equal(run_until_done(ring, &tracked), -EBADF);
    tracked = (struct tracked){.op = {.code = RING_RECV, .fd = pipe_fds[0], .recv = {buf, sizeof(buf)}}};
    queue(ring, &tracked);
    assert_int_equal(run_until_done(ring, &tracked), -ENOTSOCK);
    close(fd);
    close(full);
    close(dir);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    end_ring(ring);
}

#define NR_READS 3000

static void more_operations_than_the_ring_has_entries_are_all_done_once(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked *reads = calloc(NR_READS, sizeof(*reads));
    struct iovec *iovs = calloc(NR_READS, sizeof(*iovs));
    uint32_t *numbers = calloc(NR_READS, sizeof(*numbers));
    int fd = scratch_file();

    for (uint32_t i = 0; i < NR_READS; i++)
        numbers[i] = i;
    assert_int_equal(pwrite(fd, numbers, NR_READS * sizeof(*numbers), 0), NR_READS * sizeof(*numbers));
    memset(numbers, 0xff, NR_READS * sizeof(*numbers));
    for (uint32_t i = 0; i < NR_READS; i++) {
        iovs[i] = (struct iovec){&numbers[i], sizeof(numbers[i])};
        prep_rw(&reads[i], RING_READ, fd, &iovs[i], 1, i * sizeof(numbers[i]));
        queue(ring, &reads[i]);
    }
    for (uint32_t i = 0; i < NR_READS; i++)
        assert_int_equal(run_until_done(ring, &reads[i]), sizeof(numbers[i]));
    for (uint32_t i = 0; i < NR_READS; i++) {
        assert_int_equal(reads[i].nr_done, 1);
        assert_int_equal(numbers[i], i);
    }
    close(fd);
    free(reads);
    free(iovs);
    free(numbers);
    end_ring(ring);
}

static void a_number_that_is_used_again_means_the_new_file(void **state)
{
    struct ring *ring = make_ring(state);

    for (int i = 'a'; i < 'f'; i++) {
        int fd = scratch_file();
        char c = (char)i;

        ring_add_fd(ring, fd);
        assert_int_equal(do_rw(ring, RING_WRITE, fd, &c, 1, 0), 1);
        c = 0;
        assert_int_equal(pread(fd, &c, 1, 0), 1);
        assert_int_equal(c, i);
        ring_remove_fd(ring, fd);
        ring_remove_fd(ring, fd); // one that was never added is no error either
        close(fd);
    }
    end_ring(ring);
}

static void high_file_descriptors_are_served_as_well(void **state)
{
    struct ring *ring = make_ring(state);
    struct rlimit old, limit;
    int low = scratch_file(), fd;
    char buf[] = "x";

    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    limit = (struct rlimit){min_of(old.rlim_max, 4096), old.rlim_max};
    setrlimit(RLIMIT_NOFILE, &limit);
    fd = fcntl(low, F_DUPFD_CLOEXEC, 2000);
    if (fd < 0)
        skip();
    ring_add_fd(ring, fd);
    assert_int_equal(do_rw(ring, RING_WRITE, fd, buf, 1, 0), 1);
    assert_int_equal(do_rw(ring, RING_READ, fd, buf, 1, 0), 1);
    ring_remove_fd(ring, fd);
    close(fd);
    close(low);
    setrlimit(RLIMIT_NOFILE, &old);
    end_ring(ring);
}

// R6: the kernel tells by the end of a pipe that the last one who has it open has gone.
static void what_is_pinned_stays_open_whatever_its_number(void **state)
{
    struct ring *ring = make_ring(state);
    struct rlimit old, limit;
    int pipe_fds[2], low, fd = -1;
    char c;

    if (!ring->ops->add_fd) { // nothing is in flight after its process
        end_ring(ring);
        return;
    }
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    limit = (struct rlimit){min_of(old.rlim_max, 4096), old.rlim_max};
    setrlimit(RLIMIT_NOFILE, &limit);
    for (unsigned round = 0; round < 20; round++) {
        assert_int_equal(pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK), 0);
        low = pipe_fds[1];
        fd = round % 2 ? fcntl(low, F_DUPFD_CLOEXEC, 2000) : dup(low);
        if (fd < 0)
            fd = dup(low); // this user may not have so many
        ring_pin_fd(ring, fd);
        close(low);
        close(fd);
        assert_int_equal(read(pipe_fds[0], &c, 1), -1); // no end
        ring_remove_fd(ring, fd);
        while (read(pipe_fds[0], &c, 1) < 0)
            usleep(1000); // the kernel takes its time
        close(pipe_fds[0]);
    }
    setrlimit(RLIMIT_NOFILE, &old);
    end_ring(ring);
}

static void registered_memory_is_used_and_given_back(void **state)
{
    struct ring *ring = make_ring(state);
    int fd = scratch_file();
    char *buf = aligned_alloc(4096, 8192);

    for (unsigned round = 0; round < 40; round++) { // more often than there are places
        int index = ring_add_buf(ring, buf, 8192);  // -1 is an answer, too
        struct iovec iov = {buf + 100, 8000};
        struct tracked tracked;

        for (unsigned i = 0; i < 8192; i++)
            buf[i] = (char)(i * 7 + round);
        prep_rw(&tracked, RING_WRITE, fd, &iov, 1, 0);
        tracked.op.buf_index = index;
        queue(ring, &tracked);
        assert_int_equal(run_until_done(ring, &tracked), 8000);
        memset(buf, 0, 8192);
        prep_rw(&tracked, RING_READ, fd, &iov, 1, 0);
        tracked.op.buf_index = index;
        queue(ring, &tracked);
        assert_int_equal(run_until_done(ring, &tracked), 8000);
        for (unsigned i = 0; i < 8192; i++)
            assert_int_equal(buf[i], i < 100 || i >= 8100 ? 0 : (char)(i * 7 + round));
        ring_remove_buf(ring, index);
    }
    free(buf);
    close(fd);
    end_ring(ring);
}

// ---- Sockets

#define STREAM_BYTES (2 * 1024 * 1024)

struct stream {
    struct ring *ring;
    struct ring_op send_op, recv_op;
    struct msghdr msg;
    struct iovec iov[3];
    uint8_t *out, *in;
    size_t nr_sent, nr_received;
    int error;
};

static void stream_send(struct stream *stream)
{
    size_t left = STREAM_BYTES - stream->nr_sent, third = left / 3;

    stream->iov[0] = (struct iovec){stream->out + stream->nr_sent, third};
    stream->iov[1] = (struct iovec){stream->out + stream->nr_sent + third, third};
    stream->iov[2] = (struct iovec){stream->out + stream->nr_sent + 2 * third, left - 2 * third};
    stream->msg = (struct msghdr){.msg_iov = stream->iov, .msg_iovlen = 3};
    ring_queue(stream->ring, &stream->send_op);
}

static void stream_sent(struct ring_op *op, int res)
{
    struct stream *stream = container_of(op, struct stream, send_op);

    if (res <= 0) {
        stream->error = res ? res : -EPIPE;
        return;
    }
    stream->nr_sent += (size_t)res;
    if (stream->nr_sent < STREAM_BYTES) // a send may be short
        stream_send(stream);
}

static void stream_recv(struct stream *stream)
{
    stream->recv_op.recv.buf = stream->in + stream->nr_received;
    stream->recv_op.recv.len_bytes = (uint32_t)min_of(STREAM_BYTES - stream->nr_received, 5000);
    ring_queue(stream->ring, &stream->recv_op);
}

static void stream_received(struct ring_op *op, int res)
{
    struct stream *stream = container_of(op, struct stream, recv_op);

    if (res <= 0) {
        stream->error = res ? res : -EPIPE;
        return;
    }
    stream->nr_received += (size_t)res;
    if (stream->nr_received < STREAM_BYTES)
        stream_recv(stream);
}

// Both ends of both directions in one ring, each fd with a reader and a writer that wait.
static void a_stream_passes_a_socket_that_is_smaller_than_a_message(void **state)
{
    struct ring *ring = make_ring(state);
    struct stream streams[2] = {{.ring = ring}, {.ring = ring}};
    struct tracked watchdog = {.op = {.code = RING_TIMEOUT, .timeout_ns = 20 * NSEC_PER_SEC}};
    uint64_t seed = 5;
    int fds[2];

    make_pair(fds);
    ring_add_fd(ring, fds[0]);
    for (unsigned i = 0; i < 2; i++) {
        struct stream *stream = &streams[i];

        stream->out = malloc(STREAM_BYTES);
        stream->in = calloc(1, STREAM_BYTES);
        for (size_t j = 0; j < STREAM_BYTES; j++)
            stream->out[j] = (uint8_t)unit_random(&seed);
        stream->send_op =
            (struct ring_op){.done = stream_sent, .code = RING_SENDMSG, .fd = fds[i], .msg = &stream->msg};
        stream->recv_op = (struct ring_op){.done = stream_received, .code = RING_RECV, .fd = fds[!i]};
        stream_recv(stream);
        stream_send(stream);
    }
    queue(ring, &watchdog);
    while ((streams[0].nr_received < STREAM_BYTES || streams[1].nr_received < STREAM_BYTES) &&
           !streams[0].error && !streams[1].error)
        assert_int_equal(ring_run(ring), 0);
    while (streams[0].nr_sent < STREAM_BYTES || streams[1].nr_sent < STREAM_BYTES)
        assert_int_equal(ring_run(ring), 0);
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(streams[i].error, 0);
        assert_int_equal(watchdog.nr_done, 0);
        assert_memory_equal(streams[i].in, streams[i].out, STREAM_BYTES);
        free(streams[i].in);
        free(streams[i].out);
        ring_remove_fd(ring, fds[i]);
        close(fds[i]);
    }
    end_ring(ring);
}

static void the_end_of_a_stream_is_a_recv_of_nothing(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked tracked = {0};
    char buf[16];
    int fds[2];

    make_pair(fds);
    tracked.op = (struct ring_op){.code = RING_RECV, .fd = fds[0], .recv = {buf, sizeof(buf)}};
    queue(ring, &tracked);
    assert_int_equal(write(fds[1], "hello", 5), 5);
    assert_int_equal(run_until_done(ring, &tracked), 5);
    assert_memory_equal(buf, "hello", 5);
    tracked.nr_done = 0;
    queue(ring, &tracked);
    close(fds[1]);
    assert_int_equal(run_until_done(ring, &tracked), 0);
    ring_remove_fd(ring, fds[0]);
    close(fds[0]);
    end_ring(ring);
}

// Gets the operation waiting in the kernel before it is ended from this side.
static void run_for_a_while(struct ring *ring)
{
    struct tracked timer = {.op = {.code = RING_TIMEOUT, .timeout_ns = 5000000}};

    queue(ring, &timer);
    run_until_done(ring, &timer);
}

static void a_shutdown_ends_the_recv_that_waits(void **state)
{
    static const int hows[] = {SHUT_RD, SHUT_RDWR};
    struct ring *ring = make_ring(state);

    for (unsigned i = 0; i < 2; i++) {
        struct tracked tracked = {0};
        char buf[16];
        int fds[2];

        make_pair(fds);
        tracked.op = (struct ring_op){.code = RING_RECV, .fd = fds[0], .recv = {buf, sizeof(buf)}};
        queue(ring, &tracked);
        run_for_a_while(ring);
        assert_int_equal(tracked.nr_done, 0);
        shutdown(fds[0], hows[i]);
        assert_int_equal(run_until_done(ring, &tracked), 0);
        ring_remove_fd(ring, fds[0]);
        close(fds[0]);
        close(fds[1]);
    }
    end_ring(ring);
}

static void a_shutdown_ends_the_send_that_waits(void **state)
{
    struct ring *ring = make_ring(state);
    char *buf = calloc(1, STREAM_BYTES);
    struct iovec iov = {buf, STREAM_BYTES};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    struct tracked tracked = {0};
    int fds[2], res;

    make_pair(fds);
    tracked.op = (struct ring_op){.code = RING_SENDMSG, .fd = fds[0], .msg = &msg};
    queue(ring, &tracked);
    run_for_a_while(ring);
    shutdown(fds[0], SHUT_RDWR);
    res = run_until_done(ring, &tracked);
    if (res > 0) { // what went before; the rest fails
        assert_true(res < STREAM_BYTES);
        tracked.nr_done = 0;
        queue(ring, &tracked);
        res = run_until_done(ring, &tracked);
    }
    assert_int_equal(res, -EPIPE);
    ring_remove_fd(ring, fds[0]);
    close(fds[0]);
    close(fds[1]);
    free(buf);
    end_ring(ring);
}

// ---- Events

static struct tracked event_op(enum ring_code code, int fd)
{
    return (struct tracked){.op = {.code = code, .fd = fd}};
}

// Blocking ones and others: who made the eventfd may change that at any time.
static void an_event_is_waited_for_and_signalled(void **state)
{
    for (unsigned round = 0; round < 4; round++) {
        int flags = round & 1 ? EFD_NONBLOCK : 0, fd = eventfd(0, EFD_CLOEXEC | flags);
        struct ring *ring = make_ring(state);
        struct tracked wait = event_op(RING_EVENT_WAIT, fd), signal = event_op(RING_EVENT_SIGNAL, fd);
        uint64_t count;

        if (round & 2)
            ring_add_fd(ring, fd);
        queue(ring, &wait);
        queue(ring, &signal);
        assert_true(run_until_done(ring, &signal) >= 0);
        assert_true(run_until_done(ring, &wait) >= 0);
        assert_int_equal(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
        assert_int_equal(read(fd, &count, sizeof(count)), -1); // the wait has reset it
        ring_remove_fd(ring, fd);
        close(fd);
        end_ring(ring);
    }
}

static void a_wait_for_an_event_is_cancelled(void **state)
{
    int fd = eventfd(0, EFD_CLOEXEC);
    struct ring *ring = make_ring(state);
    struct tracked wait = event_op(RING_EVENT_WAIT, fd);

    queue(ring, &wait);
    run_for_a_while(ring);
    assert_int_equal(wait.nr_done, 0);
    ring_cancel(ring, &wait.op);
    assert_int_equal(run_until_done(ring, &wait), -ECANCELED);
    wait.nr_done = 0;
    queue(ring, &wait); // and at once, before it was submitted
    ring_cancel(ring, &wait.op);
    assert_int_equal(run_until_done(ring, &wait), -ECANCELED);
    ring_remove_fd(ring, fd);
    close(fd);
    end_ring(ring);
}

// One whose counter is full would make a write block.
static void a_signal_that_nobody_takes_is_cancelled(void **state)
{
    uint64_t full = UINT64_MAX - 1;
    int fd = eventfd(0, EFD_CLOEXEC);
    struct ring *ring = make_ring(state);
    struct tracked signal = event_op(RING_EVENT_SIGNAL, fd);

    assert_int_equal(write(fd, &full, sizeof(full)), sizeof(full));
    queue(ring, &signal);
    run_for_a_while(ring);
    assert_int_equal(signal.nr_done, 0);
    ring_cancel(ring, &signal.op);
    run_until_done(ring, &signal);
    ring_remove_fd(ring, fd);
    close(fd);
    end_ring(ring);
}

static void *fill_event(void *arg)
{
    uint64_t full = UINT64_MAX - 1;

    while (write(*(int *)arg, &full, sizeof(full)) == sizeof(full))
        ;
    return NULL;
}

// Between a look at it and the signal as well.
static void an_event_that_others_fill_all_the_time_keeps_no_ring_waiting(void **state)
{
    int fd = eventfd(0, EFD_CLOEXEC);
    struct ring *ring = make_ring(state);
    struct tracked signal = event_op(RING_EVENT_SIGNAL, fd), turn = {.op.done = tracked_done};
    struct pollfd pfd = {.fd = fd, .events = POLLIN};
    pthread_t filler;
    uint64_t count;

    pthread_create(&filler, NULL, fill_event, &fd);
    for (unsigned i = 0; i < 50000; i++) {
        signal.nr_done = 0;
        queue(ring, &signal);
        ring_post(ring, &turn.op, 0); // whether it is done or not
        run_until_done(ring, &turn);
        if (!signal.nr_done)
            ring_cancel(ring, &signal.op);
        run_until_done(ring, &signal);
        if (poll(&pfd, 1, 0) == 1) // nobody else does
            assert_int_equal(read(fd, &count, sizeof(count)), sizeof(count));
        turn.nr_done = 0;
    }
    pthread_cancel(filler);
    pthread_join(filler, NULL);
    ring_remove_fd(ring, fd);
    close(fd);
    end_ring(ring);
}

// ---- Pollers

struct counted {
    struct ring_poller poller;
    unsigned nr_left, nr_polls, nr_arms;
    bool is_shy; // has something just when it is armed
};

static bool counted_poll(struct ring_poller *poller)
{
    struct counted *counted = container_of(poller, struct counted, poller);

    counted->nr_polls++;
    if (!counted->nr_left)
        return false;
    counted->nr_left--;
    return true;
}

static bool counted_arm(struct ring_poller *poller)
{
    struct counted *counted = container_of(poller, struct counted, poller);

    counted->nr_arms++;
    if (!counted->is_shy)
        return true;
    counted->is_shy = false;
    counted->nr_left = 1;
    return false;
}

static void a_poller_is_asked_until_it_has_nothing_and_armed_before_the_sleep(void **state)
{
    struct counted counted = {.poller = {.poll = counted_poll, .arm = counted_arm}, .nr_left = 5};
    struct tracked timer = {.op = {.code = RING_TIMEOUT, .timeout_ns = 1000000}};
    struct ring *ring = make_ring(state);

    ring_add_poller(ring, &counted.poller, 0);
    for (unsigned i = 0; i < 5; i++) {
        assert_int_equal(ring_run(ring), 0);
        assert_int_equal(counted.nr_polls, i + 1);
        assert_int_equal(counted.nr_arms, 0);
    }
    counted.is_shy = true;
    assert_int_equal(ring_run(ring), 0); // would sleep for ever if it went by the first look
    assert_int_equal(counted.nr_arms, 1);
    assert_int_equal(ring_run(ring), 0);
    assert_int_equal(counted.nr_left, 0);
    queue(ring, &timer);
    run_until_done(ring, &timer);
    assert_true(counted.nr_arms >= 2);
    ring_remove_poller(ring, &counted.poller);
    counted.nr_polls = 0;
    timer.nr_done = 0;
    timer.op.timeout_ns = 1000000;
    queue(ring, &timer);
    run_until_done(ring, &timer);
    assert_int_equal(counted.nr_polls, 0);
    end_ring(ring);
}

static void a_ring_looks_for_more_as_long_as_it_is_told_to(void **state)
{
    struct counted counted = {.poller = {.poll = counted_poll, .arm = counted_arm}, .nr_left = 2};
    struct ring *ring = make_ring(state);

    ring_add_poller(ring, &counted.poller, 3600 * NSEC_PER_SEC);
    for (unsigned i = 0; i < 100; i++)
        assert_int_equal(ring_run(ring), 0);
    assert_int_equal(counted.nr_polls, 100);
    assert_int_equal(counted.nr_arms, 0);
    ring_remove_poller(ring, &counted.poller);
    end_ring(ring);
}

static void poll_tells_what_came(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked tracked = {0};
    char c;
    int fds[2];

    make_pair(fds);
    tracked.op = (struct ring_op){.code = RING_POLL, .fd = fds[0], .events = POLLIN};
    queue(ring, &tracked);
    run_for_a_while(ring);
    assert_int_equal(tracked.nr_done, 0);
    assert_int_equal(write(fds[1], "x", 1), 1);
    assert_true(run_until_done(ring, &tracked) & POLLIN);
    assert_int_equal(read(fds[0], &c, 1), 1);
    tracked.nr_done = 0; // one shot: it has to be asked for again
    queue(ring, &tracked);
    run_for_a_while(ring);
    assert_int_equal(tracked.nr_done, 0);
    close(fds[1]);
    assert_true(run_until_done(ring, &tracked) & (POLLIN | POLLHUP));
    ring_remove_fd(ring, fds[0]);
    close(fds[0]);
    end_ring(ring);
}

// ---- Calls

struct call {
    struct tracked tracked;
    pthread_t thread;
    pthread_barrier_t *barrier;
};

static int call_remember_thread(struct ring_op *op)
{
    struct call *call = container_of(op, struct call, tracked.op);

    call->thread = pthread_self();
    return -123;
}

static void a_call_is_made_on_another_thread_and_done_on_this_one(void **state)
{
    struct ring *ring = make_ring(state);
    struct call call = {.tracked = {.op = {.code = RING_CALL, .call = call_remember_thread}}};

    queue(ring, &call.tracked);
    assert_int_equal(run_until_done(ring, &call.tracked), -123);
    assert_false(pthread_equal(call.thread, pthread_self()));
    end_ring(ring);
}

static int call_scratch(struct ring_op *op)
{
    char *scratch = workers_scratch();

    (void)op;
    if (!scratch || (uintptr_t)scratch % 4096 || scratch != workers_scratch())
        return -1;
    memset(scratch, 0x55, WORKERS_SCRATCH_BYTES);
    return 0;
}

static void a_worker_has_an_aligned_buffer_of_its_own(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked calls[20] = {0};

    for (unsigned i = 0; i < 20; i++) {
        calls[i].op = (struct ring_op){.code = RING_CALL, .call = call_scratch};
        queue(ring, &calls[i]);
    }
    for (unsigned i = 0; i < 20; i++)
        assert_int_equal(run_until_done(ring, &calls[i]), 0);
    end_ring(ring);
}

static pthread_mutex_t meeting_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t meeting_cond = PTHREAD_COND_INITIALIZER;
static unsigned nr_met, nr_expected;

// Waits until all that are expected are here; gives up after some seconds.
static int call_meet(struct ring_op *op)
{
    struct timespec until;
    int ret = 0;

    (void)op;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 3;
    pthread_mutex_lock(&meeting_lock);
    if (++nr_met == nr_expected)
        pthread_cond_broadcast(&meeting_cond);
    while (nr_met < nr_expected && !ret)
        ret = -pthread_cond_timedwait(&meeting_cond, &meeting_lock, &until);
    pthread_mutex_unlock(&meeting_lock);
    return ret;
}

// Else a call that blocks holds up others although there are threads to be had.
static void calls_run_at_once_also_when_they_come_in_a_burst(void **state)
{
    struct ring *ring = make_ring(state);
    struct tracked first = {.op = {.code = RING_CALL, .call = return_7}}, calls[8];

    queue(ring, &first); // one thread is there, and idle again
    run_until_done(ring, &first);
    run_for_a_while(ring);
    nr_met = 0;
    nr_expected = ARRAY_SIZE(calls);
    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++) {
        calls[i] = (struct tracked){.op = {.code = RING_CALL, .call = call_meet}};
        queue(ring, &calls[i]);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(calls); i++)
        assert_int_equal(run_until_done(ring, &calls[i]), 0);
    end_ring(ring);
}

static void workers_start_again_after_they_were_stopped(void **state)
{
    struct ring *ring = make_ring(state);

    for (unsigned i = 0; i < 20; i++) {
        struct tracked calls[5] = {0};

        for (unsigned j = 0; j < 5; j++) {
            calls[j].op = (struct ring_op){.code = RING_CALL, .call = return_7};
            queue(ring, &calls[j]);
        }
        workers_stop(); // what is queued is run to its end
        for (unsigned j = 0; j < 5; j++)
            assert_int_equal(run_until_done(ring, &calls[j]), 7);
    }
    end_ring(ring);
}

static int command(struct ring *ring, int fd, uint32_t data_bytes)
{
    static const uint8_t data[RING_CMD_BYTES];
    struct tracked tracked = {
        .op = {.code = RING_CMD, .fd = fd, .cmd = {.data = data, .data_bytes = data_bytes}}};

    queue(ring, &tracked);
    return run_until_done(ring, &tracked);
}

static void a_command_reaches_its_driver_or_is_not_supported(void **state)
{
    struct ring *ring = make_ring(state);
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t addr_len = sizeof(addr);
    int fd = scratch_file(), udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), res;

    assert_int_equal(command(ring, fd, 0), -EOPNOTSUPP); // files know none
    assert_int_equal(command(ring, fd, RING_CMD_BYTES), -EOPNOTSUPP);
    assert_int_equal(bind(udp, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_int_equal(getsockname(udp, (struct sockaddr *)&addr, &addr_len), 0);
    assert_int_equal(sendto(udp, "hello", 5, 0, (struct sockaddr *)&addr, sizeof(addr)), 5);
    res = command(ring, udp, 0); // SOCKET_URING_OP_SIOCINQ is 0, since 6.6
    if (ring->ops == &ring_threads_ops || res != 5)
        assert_int_equal(res, -EOPNOTSUPP);
    close(udp);
    close(fd);
    end_ring(ring);
}

// ---- The choice

static void every_kind_is_chosen_by_its_name(void **state)
{
    const struct ring_ops *ops = ring_ops_of(state);
    struct err err;

    assert_ptr_equal(ring_choose(ops->name, &err), ops);
    assert_non_null(ring_choose("auto", &err));
}

static void an_unknown_kind_is_refused_in_one_line(void **state)
{
    static const char *const names[] = {"", "epoll", "Auto", "uring ", "thread"};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        struct err err = {""};

        assert_null(ring_choose(names[i], &err));
        assert_non_null(strstr(err.line, "; use auto, uring or threads"));
        assert_null(strchr(err.line, '\n'));
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(posts_of_many_threads_are_all_done_each_thread_in_order),
        cmocka_unit_test(a_post_wakes_a_ring_that_sleeps),
        cmocka_unit_test(the_owner_may_post_to_itself),
        cmocka_unit_test(an_operation_is_its_owners_again_once_it_is_done),
        cmocka_unit_test(timers_end_in_the_order_of_their_time_and_not_before_it),
        cmocka_unit_test(a_cancelled_timer_is_never_done),
        cmocka_unit_test(a_timer_may_be_queued_again_by_itself),
        cmocka_unit_test(a_timer_is_heeded_whoever_queues_it),
        cmocka_unit_test(a_turn_ends_once_something_is_done),
        cmocka_unit_test(a_hook_runs_once_after_all_completions_of_the_batch),
        cmocka_unit_test(a_hook_that_defers_itself_runs_in_the_next_batch),
        cmocka_unit_test(files_are_read_and_written_at_offsets_with_lists),
        cmocka_unit_test(errors_are_negative_errnos),
        cmocka_unit_test(more_operations_than_the_ring_has_entries_are_all_done_once),
        cmocka_unit_test(a_number_that_is_used_again_means_the_new_file),
        cmocka_unit_test(high_file_descriptors_are_served_as_well),
        cmocka_unit_test(what_is_pinned_stays_open_whatever_its_number),
        cmocka_unit_test(registered_memory_is_used_and_given_back),
        cmocka_unit_test(a_stream_passes_a_socket_that_is_smaller_than_a_message),
        cmocka_unit_test(the_end_of_a_stream_is_a_recv_of_nothing),
        cmocka_unit_test(a_shutdown_ends_the_recv_that_waits),
        cmocka_unit_test(a_shutdown_ends_the_send_that_waits),
        cmocka_unit_test(an_event_is_waited_for_and_signalled),
        cmocka_unit_test(a_wait_for_an_event_is_cancelled),
        cmocka_unit_test(a_signal_that_nobody_takes_is_cancelled),
        cmocka_unit_test(an_event_that_others_fill_all_the_time_keeps_no_ring_waiting),
        cmocka_unit_test(a_poller_is_asked_until_it_has_nothing_and_armed_before_the_sleep),
        cmocka_unit_test(a_ring_looks_for_more_as_long_as_it_is_told_to),
        cmocka_unit_test(poll_tells_what_came),
        cmocka_unit_test(a_command_reaches_its_driver_or_is_not_supported),
        cmocka_unit_test(a_call_is_made_on_another_thread_and_done_on_this_one),
        cmocka_unit_test(a_worker_has_an_aligned_buffer_of_its_own),
        cmocka_unit_test(calls_run_at_once_also_when_they_come_in_a_burst),
        cmocka_unit_test(workers_start_again_after_they_were_stopped),
        cmocka_unit_test(every_kind_is_chosen_by_its_name),
        cmocka_unit_test(an_unknown_kind_is_refused_in_one_line),
    };

    return run_on_both_rings(tests);
}
