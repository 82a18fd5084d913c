#include "control/worker.h"

#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "core/stats.h"
#include "io/io.h"
#include "map/map.h"
#include "ring/workers.h"
#include "util/util.h"

// All lines in one write: who reads them sees all or none.
static void worker_print_stats(const struct worker *worker)
{
    char *text = NULL;
    size_t len = 0;
    FILE *file = open_memstream(&text, &len);

    if (!file)
        return;
    for (unsigned i = 0; i < worker->nr_devs; i++)
        stats_print(worker->devs[i], file);
    fclose(file);
    fputs(text, stderr);
    free(text);
}

static void worker_signalled(struct ring_op *op, int res)
{
    struct worker *worker = container_of(op, struct worker, signal_op);
    struct signalfd_siginfo info;

    (void)res;
    while (read(worker->signal_fd, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGUSR1) {
            worker_print_stats(worker);
        } else if (!worker->is_stopping) {
            log_verbose("signal %u: stopping", info.ssi_signo);
            worker_stop(worker);
        }
    }
    ring_queue(worker->ring, op);
}

static void worker_signals(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGHUP); // the terminal has gone: what is cached must not go with it
    sigaddset(set, SIGUSR1);
}

void worker_block_signals(void)
{
    sigset_t set;

    worker_signals(&set);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static int worker_catch_signals(struct worker *worker, struct err *err)
{
    sigset_t set;

    worker_block_signals();
    worker_signals(&set);
    worker->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (worker->signal_fd < 0)
        return err_set(err, -errno, "signalfd: %s", strerror(errno));
    worker->signal_op = (struct ring_op){.done = worker_signalled,
                                         .code = RING_POLL,
                                         .fd = worker->signal_fd,
                                         .events = POLLIN};
    return 0;
}

// A file descriptor a connection, some for each image and for each of its rings, and some more.
static void worker_raise_nofile(const struct worker_options *options)
{
    rlim_t wanted =
        options->max_connections + options->nr_images * (8 + 4ULL * options->device.nr_queues) + 256;
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= wanted)
        return;
    limit.rlim_cur = min_of(wanted, limit.rlim_max);
    setrlimit(RLIMIT_NOFILE, &limit);
}

static int worker_create_devices(struct worker *worker, struct err *err)
{
    const struct worker_options *options = worker->options;

    for (; worker->nr_devs < options->nr_images; worker->nr_devs++) {
        struct device_options device = options->device;
        struct device *dev;
        int ret;

        device.name = options->names[worker->nr_devs];
        ret = device_create(&dev, options->images[worker->nr_devs], &device, err);
        if (ret < 0)
            return ret;
        worker->devs[worker->nr_devs] = dev;
        log_verbose("%s: %s, %llu bytes, io %s, map %s, %u queues%s", dev->name, dev->image->path,
                    (unsigned long long)dev->limits.size_bytes, dev->io->ops->name, dev->map->ops->name,
                    dev->nr_queues, dev->image->is_read_only ? ", read-only" : "");
    }
    return 0;
}

// Everything that was created, in reverse. 0, or the error of a last flush.
static int worker_destroy_devices(struct worker *worker)
{
    int ret = 0;

    for (unsigned i = 0; i < worker->nr_devs; i++) {
        int error = device_stop(worker->devs[i]);

        if (error < 0) {
            log_line("%s: flushing: %s; what was written last may be lost", worker->devs[i]->name,
                     strerror(-error));
            ret = error;
        }
    }
    workers_stop(); // R5 of ring/ring.h: nobody posts any more
    for (unsigned i = 0; i < worker->nr_devs; i++)
        device_destroy(worker->devs[i]);
    return ret;
}

static int worker_loop(struct worker *worker, struct err *err)
{
    while (worker->transports.nr_running || worker->nr_pending) {
        int ret = ring_run(worker->ring);
        if (ret < 0)
            return err_set(err, ret, "main ring: %s", strerror(-ret));
    }
    return 0;
}

void worker_go_on_stopping(struct worker *worker)
{
    if (worker->options->stopping)
        worker->options->stopping(worker);
    transports_stop(&worker->transports);
}

void worker_stop(struct worker *worker)
{
    if (worker->is_stopping)
        return;
    worker->is_stopping = true;
    if (!worker->options->before_stop || !worker->options->before_stop(worker))
        worker_go_on_stopping(worker);
}

static int worker_start(struct worker *worker, struct err *err)
{
    const struct worker_options *options = worker->options;
    int ret = transports_start(&worker->transports,
                               &(struct transport_options){
                                   .devs = worker->devs,
                                   .nr_devs = worker->nr_devs,
                                   .max_connections = options->max_connections,
                                   .poll_ns = options->poll_ns,
                                   .ring = worker->ring,
                               },
                               options->holds, err);

    if (ret < 0)
        return ret;
    ring_queue(worker->ring, &worker->signal_op);
    return options->ready ? options->ready(worker, err) : 0;
}

int worker_run(const struct worker_options *options, struct err *err)
{
    struct worker worker = {.options = options, .devs = calloc(options->nr_images, sizeof(*worker.devs))};
    struct worker_options with_ring = *options;
    int ret, flush_ret;

    if (!worker.devs)
        return err_set(err, -ENOMEM, "out of memory");
    worker.options = &with_ring;
    workers_set_max(options->nr_workers);
    worker_raise_nofile(options);
    // What was a connection's goes back to the system with it: by itself glibc raises this to the largest
    // piece that was freed.
    mallopt(M_MMAP_THRESHOLD, 64 * KiB);
    with_ring.device.ring = ring_choose(options->ring_name, err);
    ret = with_ring.device.ring ? worker_catch_signals(&worker, err) : -EINVAL;
    if (ret < 0)
        goto out_free;
    ret = worker_create_devices(&worker, err);
    if (ret < 0)
        goto out_devices;
    ret = ring_create(with_ring.device.ring, &worker.ring, err);
    if (ret < 0)
        goto out_devices;
    ret = worker_start(&worker, err);
    if (ret < 0) {
        worker_stop(&worker);
        worker_loop(&worker, &(struct err){.line = ""});
    } else {
        log_verbose("ready");
        ret = worker_loop(&worker, err);
    }
    flush_ret = worker_destroy_devices(&worker);
    ring_destroy(worker.ring);
    transports_destroy(&worker.transports);
    if (!ret && flush_ret) {
        err->line[0] = '\0'; // said already, for each device
        ret = flush_ret;
    }
    goto out_signals;
out_devices:
    worker_destroy_devices(&worker);
out_signals:
    close(worker.signal_fd);
out_free:
    if (options->stopped)
        options->stopped(&worker, ret, err);
    free(worker.devs);
    return ret;
}
