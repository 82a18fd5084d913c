// The transport: a file for each --fuse, a channel for each queue of its device. Cold, on the main thread.

#include "transport/fuse/fuse.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "transport/fuse/mount.h"
#include "transport/holders.h"
#include "util/util.h"

#define ENTRIES_MIN 16U // for each CPU

struct fuse_file {
    struct transport_hold *hold;
    struct device *dev;
    struct fuse_chan *chans; // a queue each
    unsigned nr_chans;       // the device is gone before they are
};

struct fuse_server {
    struct transport transport;
    struct fuse_file *files;
    unsigned nr_files;
    unsigned nr_running; // channels
    bool is_stopped;
};

int fuse_chan_create(struct fuse_chan *chan, struct device *dev, struct queue *queue, int fd,
                     size_t payload_bytes)
{
    size_t stride = FUSE_PAGE_BYTES + round_up(payload_bytes, FUSE_PAGE_BYTES);

    *chan = (struct fuse_chan){.dev = dev, .queue = queue, .fd = fd, .payload_bytes = payload_bytes};
    chan->start_op.done = fuse_chan_start;
    chan->stop_op.done = fuse_chan_stop;
    if (tags_create(&chan->tags, dev->depth, sizeof(struct fuse_rq)) < 0)
        return -ENOMEM;
    chan->mem_bytes = dev->depth * stride;
    // Address space: what is never touched takes no memory.
    chan->mem = mmap(NULL, chan->mem_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (chan->mem == MAP_FAILED) {
        tags_destroy(&chan->tags);
        return -ENOMEM;
    }
    for (unsigned i = 0; i < dev->depth; i++) {
        struct fuse_rq *frq = container_of(chan->tags.free[i], struct fuse_rq, rq);

        frq->chan = chan;
        frq->payload = chan->mem + (dev->depth - 1 - i) * stride + FUSE_PAGE_BYTES; // the warmest first
    }
    return 0;
}

// The channel's share of the entries: those of every nr_queues-th CPU.
static int chan_create_entries(struct fuse_chan *chan, unsigned nr_cpus)
{
    size_t stride = FUSE_PAGE_BYTES + round_up(chan->payload_bytes, FUSE_PAGE_BYTES);
    unsigned nr_queues = chan->dev->nr_queues, first = chan->queue->index;
    unsigned nr_mine = nr_cpus > first ? (nr_cpus - first + nr_queues - 1) / nr_queues : 0, nr_each;

    if (!nr_mine)
        return 0;
    nr_each = max_of(chan->dev->depth / nr_mine, ENTRIES_MIN);
    chan->entries = calloc(nr_mine * nr_each, sizeof(*chan->entries));
    if (!chan->entries)
        return -ENOMEM;
    chan->entry_mem_bytes = nr_mine * nr_each * stride;
    chan->entry_mem = mmap(NULL, chan->entry_mem_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (chan->entry_mem == MAP_FAILED) {
        chan->entry_mem_bytes = 0;
        return -ENOMEM;
    }
    chan->nr_entries = nr_mine * nr_each;
    for (unsigned i = 0; i < chan->nr_entries; i++) {
        struct fuse_entry *entry = &chan->entries[i];

        entry->cpu = (uint16_t)(first + i / nr_each * nr_queues);
        entry->header = (struct fuse_uring_req_header *)(void *)(chan->entry_mem + i * stride);
        entry->frq.chan = chan;
        entry->frq.is_entry = true;
        entry->frq.payload = chan->entry_mem + i * stride + FUSE_PAGE_BYTES;
        entry->iov[0] = (struct iovec){entry->header, sizeof(*entry->header)};
        entry->iov[1] = (struct iovec){entry->frq.payload, chan->payload_bytes};
    }
    return 0;
}

void fuse_chan_destroy(struct fuse_chan *chan)
{
    free(chan->entries);
    if (chan->entry_mem_bytes)
        munmap(chan->entry_mem, chan->entry_mem_bytes);
    munmap(chan->mem, chan->mem_bytes);
    tags_destroy(&chan->tags);
}

// A message of our own accord ("unsolicited"): unique is 0, and error its kind.
static int fuse_notify(int fd, int32_t kind, const void *data, size_t len)
{
    struct fuse_out_header header = {.len = (uint32_t)(sizeof(header) + len), .error = kind};
    struct iovec iov[] = {{&header, sizeof(header)}, {(void *)(uintptr_t)data, len}};

    return writev(fd, iov, len ? 2 : 1) < 0 ? -errno : 0;
}

static void server_chan_over(struct ring_op *op, int res)
{
    struct fuse_chan *chan = container_of(op, struct fuse_chan, over_op);
    struct fuse_server *server = chan->server;

    (void)res;
    if (--server->nr_running)
        return;
    server->is_stopped = true;
    transport_stopped(&server->transport);
}

static void fuse_destroy(struct transport *transport)
{
    struct fuse_server *server = container_of(transport, struct fuse_server, transport);

    for (unsigned i = 0; i < server->nr_files; i++) {
        struct fuse_file *file = &server->files[i];

        for (unsigned j = 0; j < file->nr_chans; j++)
            fuse_chan_destroy(&file->chans[j]);
        free(file->chans);
    }
    free(server->files);
    free(server);
}

static int server_add_file(struct fuse_server *server, struct transport_hold *hold, struct device *dev,
                           struct ring *main_ring)
{
    struct fuse_file *file = &server->files[server->nr_files];

    *file =
        (struct fuse_file){.hold = hold, .dev = dev, .chans = calloc(dev->nr_queues, sizeof(*file->chans))};
    if (!file->chans)
        return -ENOMEM;
    file->nr_chans = dev->nr_queues;
    for (unsigned i = 0; i < dev->nr_queues; i++) {
        struct fuse_chan *chan = &file->chans[i];

        if (fuse_chan_create(chan, dev, &dev->queues[i], hold->fd, hold->facts[FUSE_FACT_PAYLOAD]) < 0) {
            while (i--)
                fuse_chan_destroy(&file->chans[i]);
            free(file->chans);
            return -ENOMEM;
        }
        if (chan_create_entries(chan, (unsigned)hold->facts[FUSE_FACT_CPUS]) < 0) {
            for (unsigned j = 0; j <= i; j++)
                fuse_chan_destroy(&file->chans[j]);
            free(file->chans);
            return -ENOMEM;
        }
        chan->backing_id = (uint32_t)hold->facts[FUSE_FACT_BACKING];
        chan->server = server;
        chan->main_ring = main_ring;
        chan->over_op.done = server_chan_over;
    }
    server->nr_files++;
    return 0;
}

// F5
static int hold_pass(struct transport_hold *hold, const struct device *dev, struct err *err)
{
    struct fuse_backing_map map = {.fd = dev->image->fd};
    int id;

    if (!dev->options.is_passthrough || hold->facts[FUSE_FACT_BACKING])
        return 0;
    id = ioctl(hold->fd, FUSE_DEV_IOC_BACKING_OPEN, &map);
    if (id < 0)
        return err_set(err, -errno, "--passthrough: %s: %s; leave it out", dev->image->path, strerror(errno));
    hold->facts[FUSE_FACT_BACKING] = (uint64_t)id;
    return 0;
}

// The n-th file is that of the n-th device, and further ones of the last.
static int fuse_start(struct transport **transport, const struct transport_options *options,
                      struct transport_hold *holds, unsigned nr_holds, struct err *err)
{
    struct fuse_server *server = calloc(1, sizeof(*server));
    int ret = -ENOMEM;

    if (!server || !(server->files = calloc(nr_holds, sizeof(*server->files))))
        goto out;
    for (unsigned i = 0; i < nr_holds; i++) {
        struct device *dev = options->devs[min_of(i, options->nr_devs - 1)];

        ret = hold_pass(&holds[i], dev, err);
        if (ret < 0)
            goto out;
        ret = server_add_file(server, &holds[i], dev, options->ring);
        if (ret < 0)
            goto out;
    }
    for (unsigned i = 0; i < nr_holds; i++) {
        struct fuse_file *file = &server->files[i];

        // What a worker before us had taken and not answered. Kernels before 6.9 know no such message.
        fuse_notify(file->hold->fd, FUSE_NOTIFY_RESEND, NULL, 0);
        for (unsigned j = 0; j < file->dev->nr_queues; j++, server->nr_running++)
            ring_post(file->dev->queues[j].ring, &file->chans[j].start_op, 0);
        log_verbose("fuse: %s is %s", file->hold->addr, file->dev->name);
    }
    *transport = &server->transport;
    return 0;

out:
    if (server)
        fuse_destroy(&server->transport);
    return ret == -ENOMEM ? err_set(err, ret, "fuse: out of memory; use a smaller --depth") : ret;
}

static void fuse_stop(struct transport *transport)
{
    struct fuse_server *server = container_of(transport, struct fuse_server, transport);

    if (server->is_stopped) // unmounted by somebody, and told
        return;
    for (unsigned i = 0; i < server->nr_files; i++) {
        struct fuse_file *file = &server->files[i];

        for (unsigned j = 0; j < file->dev->nr_queues; j++)
            ring_post(file->dev->queues[j].ring, &file->chans[j].stop_op, 0);
    }
}

// The path that the kernel tells of who has the file open. Only its folder is looked at: asking the file
// is asking our own queues, which may be frozen.
static bool fuse_path(const char *addr, char path[PATH_MAX])
{
    const char *slash = strrchr(addr, '/');
    char folder[PATH_MAX];
    size_t len;

    snprintf(folder, sizeof(folder), "%.*s", slash ? (int)(slash - addr + 1) : 1, slash ? addr : ".");
    if (!realpath(folder, path))
        return false;
    len = strlen(path);
    snprintf(path + len, PATH_MAX - len, "%s%s", len > 1 ? "/" : "", slash ? slash + 1 : addr);
    return true;
}

// The kernel's loop device on the file shows up in no process: who put it there asks for its users.
static int fuse_busy(struct transport *transport, struct err *err)
{
    struct fuse_server *server = container_of(transport, struct fuse_server, transport);

    for (unsigned i = 0; i < server->nr_files; i++) {
        const char *addr = server->files[i].hold->addr;
        char path[PATH_MAX], text[300];

        if (fuse_path(addr, path) && holders_of_file(path, text, sizeof(text)))
            return err_set(err, -EBUSY, "%s: %s", addr, text);
    }
    return 0;
}

static int fuse_device_changed(struct transport *transport, struct device *dev, struct err *err)
{
    struct fuse_server *server = container_of(transport, struct fuse_server, transport);

    (void)err;
    for (unsigned i = 0; i < server->nr_files; i++) {
        // Attributes and all pages: the bytes may be those of another image. The kernel waits for pages
        // that are being read or written; the queues, which are not frozen any more, see to that (F4).
        struct fuse_notify_inval_inode_out out = {.ino = FUSE_ROOT_ID};

        if (server->files[i].dev == dev)
            fuse_notify(server->files[i].hold->fd, FUSE_NOTIFY_INVAL_INODE, &out, sizeof(out));
    }
    return 0;
}

const struct transport_ops fuse_transport_ops = {
    .name = "fuse",
    .hold = fuse_hold,
    .release = fuse_release,
    .start = fuse_start,
    .stop = fuse_stop,
    .destroy = fuse_destroy,
    .busy = fuse_busy,
    .device_changed = fuse_device_changed,
};
