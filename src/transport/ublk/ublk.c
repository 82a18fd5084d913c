// How a block device begins, goes from worker to worker, and ends. Cold; main thread, but for the jobs of
// workers.

#include "transport/ublk/ublk.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/device.h"
#include "transport/holders.h"
#include "transport/ublk/ctrl.h"
#include "util/util.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

// B7: both are needed, for the data that somebody has to see.
#define UBLK_F_ZERO_COPY (UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY)
#define UBLK_MAGIC 0x7468676962ULL // in ublksrv_flags: the device is one of bight's
// The kernel has to notice that a worker is dead, and to take its rings apart.
#define TAKE_OVER_TIMEOUT_NS (20 * NSEC_PER_SEC)
#define TRY_AGAIN_NS 2000000
#define STOP_AGAIN_NS 50000000
// One request each: what a file system does in a moment, what may have to be written out.
#define MAX_DISCARD_BYTES (1024 * MiB)
#define MAX_WRITE_ZEROES_BYTES (128 * MiB)

enum { FACT_ID, FACT_FLAGS };

struct ublk_disk {
    struct ublk_server *server;
    struct device *dev;
    struct ublk_ctrl ctrl;
    struct ublk_dev_info info;
    struct ublk_hwq *hwqs;
    unsigned nr_hwqs;     // that have begun
    int fd;               // of /dev/ublkcN
    uint64_t dev_sectors; // as the kernel was told
    struct ring *ring;    // the main thread's
    struct ring_op stop_op;
};

struct ublk_server {
    struct transport transport;
    struct ublk_disk *disks;
    unsigned nr_disks, nr_running;
};

// ---- The device, which outlives workers (B1)

static int hold_find_or_add(struct ublk_ctrl *ctrl, struct ublk_dev_info *info, struct err *err)
{
    uint32_t id = info->dev_id;
    struct ublk_dev_info found;
    int ret = ublk_ctrl_add(ctrl, info);

    if (ret == -EPERM) { // no CAP_SYS_ADMIN; the kernel has recovery and zero copy for root only
        info->flags |= UBLK_F_UNPRIVILEGED_DEV;
        info->flags &= ~(UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_ZERO_COPY);
        ret = ublk_ctrl_add(ctrl, info);
    }
    if (ret == -EEXIST && !ublk_ctrl_find(ctrl, id, &found) && found.ublksrv_flags == UBLK_MAGIC) {
        // One of ours that a dead supervisor has left behind is taken over, with all that waits for it;
        if (found.state == UBLK_QUIESCED) {
            log_verbose("ublk: taking over device %u", id);
            *info = found;
            return 0;
        }
        // one that nothing waits for is made anew. (Before its first server the pid is 0.)
        if (found.state == UBLK_DEAD && found.ublksrv_pid < 0) {
            ublk_ctrl_send(ctrl, UBLK_DEL_DEV, NULL, 0, 0);
            ret = ublk_ctrl_add(ctrl, info);
        }
    }
    if (ret == -EEXIST)
        return err_set(err, ret, "ublk: device %u is in use; use --ublk without a number, or another one",
                       id);
    if (ret < 0)
        return err_set(err, ret, "ublk: adding a device: %s%s", strerror(-ret),
                       geteuid() ? "; root can, and from Linux 6.5 on others, up to 64 devices" : "");
    return 0;
}

static void ublk_release(struct transport_hold *hold)
{
    uint32_t id = (uint32_t)hold->facts[FACT_ID];
    struct ublk_dev_info info;
    struct ublk_ctrl ctrl;
    struct err err;
    int ret = ublk_ctrl_open(&ctrl, &err);

    if (ret < 0) {
        log_line("%s", err.line);
        goto out;
    }
    ret = ublk_ctrl_find(&ctrl, id, &info);
    if (!ret) {
        ublk_ctrl_send(&ctrl, UBLK_STOP_DEV, NULL, 0, 0);
        // DEL_DEV waits until nobody has the device open or mounted, which may be for ever.
        ret = ublk_ctrl_send(&ctrl, UBLK_DEL_DEV_ASYNC, NULL, 0, 0);
        if (ret == -EOPNOTSUPP || ret == -EINVAL)
            ret = ublk_ctrl_send(&ctrl, UBLK_DEL_DEV, NULL, 0, 0);
    }
    if (ret < 0 && ret != -ENODEV)
        log_line("ublk: deleting device %u: %s", id, strerror(-ret));
    ublk_ctrl_close(&ctrl);
out:
    if (hold->fd >= 0)
        close(hold->fd);
}

// B8. The keeper ends when all others have closed the other end of its pipe: 0 with that in *fd, or a
// negative errno with err set.
static int hold_namespace(int *fd, struct err *err)
{
    int ends[2];
    pid_t pid;

    if (pipe2(ends, O_CLOEXEC) < 0)
        return err_set(err, -errno, "ublk: pipe: %s", strerror(errno));
    pid = fork();
    if (!pid) {
        if (!fork()) // nobody here waits for the keeper
            util_wait_alone("bight-keeper", ends[0]);
        _exit(0);
    }
    close(ends[0]);
    if (pid < 0) {
        close(ends[1]);
        return err_set(err, -errno, "ublk: fork: %s", strerror(errno));
    }
    waitpid(pid, NULL, 0);
    *fd = ends[1];
    return 0;
}

static int ublk_hold(struct transport_hold *hold, const struct transport_hold_options *options,
                     struct err *err)
{
    struct ublk_dev_info info = {
        .nr_hw_queues = (uint16_t)options->nr_queues,
        .queue_depth = (uint16_t)min_of(options->depth, UBLK_MAX_DEPTH),
        .max_io_buf_bytes = UBLK_MAX_IO_BYTES,
        .dev_id = UINT32_MAX,
        .ublksrv_flags = UBLK_MAGIC,
    };
    struct ublk_ctrl ctrl;
    unsigned long id;
    int ret;

    if (hold->addr[0]) {
        if (util_parse_uint(hold->addr, 0, UBLK_MAX_ID, &id) < 0)
            return err_usage(err, "--ublk: %s: no device number; use 0 to %u, or none", hold->addr,
                             UBLK_MAX_ID);
        info.dev_id = (uint32_t)id;
    }
    ret = ublk_ctrl_open(&ctrl, err);
    if (ret < 0)
        return ret;
    info.flags = ctrl.features & (UBLK_F_CMD_IOCTL_ENCODE | UBLK_F_UPDATE_SIZE);
    if (options->is_direct && !(~ctrl.features & UBLK_F_ZERO_COPY))
        info.flags |= UBLK_F_ZERO_COPY;
    if (options->is_supervised)
        info.flags |= UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE;
    ret = hold_find_or_add(&ctrl, &info, err);
    ublk_ctrl_close(&ctrl);
    if (ret < 0)
        return ret;
    hold->facts[FACT_ID] = info.dev_id;
    hold->facts[FACT_FLAGS] = info.flags;
    ret = hold_namespace(&hold->fd, err);
    if (ret < 0)
        ublk_release(hold);
    return ret;
}

// ---- Parameters

static uint8_t shift_of(uint64_t n)
{
    return (uint8_t)__builtin_ctzll(n);
}

struct ublk_params ublk_params_of(const struct device *dev, const struct ublk_dev_info *info)
{
    const struct limits *limits = &dev->limits;
    uint32_t logical = max_of(limits->min_block_bytes, (uint32_t)SECTOR_BYTES);
    uint32_t physical = max_of(limits->preferred_block_bytes, logical);
    struct ublk_params params = {
        .len = sizeof(params),
        .types = UBLK_PARAM_BASIC,
        .basic =
            {
                .logical_bs_shift = shift_of(logical),
                .physical_bs_shift = shift_of(physical),
                .io_opt_shift = shift_of(physical),
                .io_min_shift = shift_of(physical),
                .max_sectors = min_of(info->max_io_buf_bytes, limits->max_transfer_bytes) / SECTOR_BYTES,
                .dev_sectors = round_down(limits->size_bytes, logical) / SECTOR_BYTES,
            },
    };

    // Clients' memory goes to the image as it is (B7).
    if (!(~info->flags & UBLK_F_ZERO_COPY)) {
        params.types |= UBLK_PARAM_DMA_ALIGN;
        params.dma.alignment_mask = max_of(dev->image->dio_mem_align, 4U) - 1;
    }
    if (dev->image->is_read_only) {
        params.basic.attrs = UBLK_ATTR_READ_ONLY;
        return params;
    }
    if (dev->durability.has_volatile_cache)
        params.basic.attrs = UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA;
    params.types |= UBLK_PARAM_DISCARD;
    params.discard.granularity = physical;
    params.discard.max_sectors = MAX_DISCARD_BYTES / SECTOR_BYTES;
    params.discard.max_write_zeroes_sectors = MAX_WRITE_ZEROES_BYTES / SECTOR_BYTES;
    params.discard.max_segments = 1;
    return params;
}

// ---- Queues

void ublk_hwq_end(struct ublk_hwq *hwq)
{
    ring_remove_fd(hwq->queue->ring, hwq->fd); // B6
    sem_post(&hwq->over);
}

// What is true for a thread that the kernel may wait for to get memory free.
static void be_io_flusher(void)
{
    if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0)
        log_verbose("ublk: PR_SET_IO_FLUSHER: %s; out of memory, the device may stall", strerror(errno));
}

// B7. A ring without room for them has the kernel register none, and say so with each request.
static void hwq_use_bufs(struct ublk_hwq *hwq)
{
    int first = ring_reserve_bufs(hwq->queue->ring, hwq->depth);

    for (unsigned i = 0; i < hwq->depth; i++) {
        uintptr_t buf = first < 0 ? UINT16_MAX : (unsigned)first + i;

        hwq->rqs[i].op.cmd.addr = (void *)(buf | UBLK_AUTO_BUF_REG_FALLBACK);
        hwq->rqs[i].cmd.addr = 0;
    }
    hwq->first_buf = first;
}

static void hwq_begin(struct ring_op *op, int res)
{
    struct ublk_hwq *hwq = container_of(op, struct ublk_hwq, start_op);

    be_io_flusher();
    if (hwq->is_zero_copy)
        hwq_use_bufs(hwq);
    if (CPU_COUNT(&hwq->cpus))
        sched_setaffinity(0, sizeof(hwq->cpus), &hwq->cpus);
    ring_add_fd(hwq->queue->ring, hwq->fd);
    ublk_hwq_start(op, res);
}

static void hwq_unmap(struct ublk_hwq *hwq)
{
    munmap((void *)(uintptr_t)hwq->descs, hwq->descs_bytes);
    munmap(hwq->bufs, (size_t)hwq->depth * hwq->max_io_bytes);
    free(hwq->rqs);
    sem_destroy(&hwq->over);
}

static int hwq_create(struct ublk_hwq *hwq, struct ublk_disk *disk, unsigned index)
{
    const struct ublk_dev_info *info = &disk->info;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t stride = UBLK_MAX_DEPTH * sizeof(struct ublk_io_desc);

    *hwq = (struct ublk_hwq){
        .dev = disk->dev,
        .queue = &disk->dev->queues[index],
        .fd = disk->fd,
        .index = (uint16_t)index,
        .depth = info->queue_depth,
        .max_io_bytes = info->max_io_buf_bytes,
        .fetch_op = ublk_ctrl_encode(&disk->ctrl, UBLK_FETCH),
        .commit_op = ublk_ctrl_encode(&disk->ctrl, UBLK_COMMIT_AND_FETCH),
        .descs_bytes = round_up(info->queue_depth * sizeof(struct ublk_io_desc), page),
        .is_zero_copy = !(~info->flags & UBLK_F_ZERO_COPY),
        .nr_tags = info->queue_depth,
        .start_op.done = hwq_begin,
    };
    ublk_ctrl_send(&disk->ctrl, UBLK_GET_QUEUE_AFFINITY, &hwq->cpus, sizeof(hwq->cpus), index);
    hwq->rqs = calloc(hwq->depth, sizeof(*hwq->rqs));
    if (!hwq->rqs)
        return -ENOMEM;
    hwq->descs = mmap(NULL, hwq->descs_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, disk->fd,
                      (off_t)(index * round_up(stride, page)));
    if (hwq->descs == MAP_FAILED)
        goto out_rqs;
    hwq->bufs = mmap(NULL, (size_t)hwq->depth * hwq->max_io_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hwq->bufs == MAP_FAILED)
        goto out_descs;
    for (unsigned i = 0; i < hwq->depth; i++) {
        struct ublk_rq *urq = &hwq->rqs[i];

        urq->hwq = hwq;
        urq->rq.tag = (uint16_t)i;
        urq->cmd = (struct ublk_io_cmd){
            .q_id = hwq->index,
            .tag = (uint16_t)i,
            .addr = (uintptr_t)hwq->bufs + (size_t)i * hwq->max_io_bytes,
        };
        urq->op = (struct ring_op){
            .done = ublk_hwq_fetched,
            .code = RING_CMD,
            .fd = hwq->fd,
            .cmd = {.data = &urq->cmd, .data_bytes = sizeof(urq->cmd)},
        };
    }
    sem_init(&hwq->over, 0, 0);
    return 0;

out_descs:
    munmap((void *)(uintptr_t)hwq->descs, hwq->descs_bytes);
out_rqs:
    free(hwq->rqs);
    return -ENOMEM;
}

// ---- A disk

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = TRY_AGAIN_NS}, NULL);
}

// Waits until the kernel has done away with the worker before us: then the device waits for recovery, or was
// never started.
static int disk_take_over(struct ublk_disk *disk, bool *is_recovery)
{
    uint64_t until_ns = util_now_ns() + TAKE_OVER_TIMEOUT_NS;
    int ret;

    do {
        ret = ublk_ctrl_find(&disk->ctrl, disk->ctrl.id, &disk->info);
        if (ret == -EACCES || ret == -ENOENT) { // udev has not got to /dev/ublkcN yet
            nap();
            continue;
        }
        if (ret < 0)
            return ret;
        *is_recovery = disk->info.state == UBLK_QUIESCED;
        if (disk->info.state == UBLK_DEAD)
            return 0;
        if (*is_recovery) {
            ret = ublk_ctrl_send(&disk->ctrl, UBLK_START_USER_RECOVERY, NULL, 0, 0);
            if (ret != -EBUSY)
                return ret;
        }
        nap();
    } while (util_now_ns() < until_ns);
    return ret < 0 ? ret : -EBUSY;
}

// udev may not have got there yet, nor the kernel with the file of a worker before us.
static int disk_open(struct ublk_disk *disk)
{
    uint64_t until_ns = util_now_ns() + TAKE_OVER_TIMEOUT_NS;
    char path[UBLK_PATH_BYTES];

    ublk_ctrl_path(path, 'c', disk->ctrl.id);
    do {
        disk->fd = open(path, O_RDWR | O_CLOEXEC);
        if (disk->fd >= 0)
            return 0;
        if (errno != EBUSY && errno != ENOENT && errno != EACCES)
            break;
        nap();
    } while (util_now_ns() < until_ns);
    return -errno;
}

// STOP_DEV ends the FETCHes that the kernel has got; those that are just being sent need another one.
static void disk_wait_over(struct ublk_disk *disk, struct ublk_hwq *hwq)
{
    struct timespec until;

    for (;;) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += STOP_AGAIN_NS;
        until.tv_sec += until.tv_nsec / (long)NSEC_PER_SEC;
        until.tv_nsec %= (long)NSEC_PER_SEC;
        if (!sem_timedwait(&hwq->over, &until))
            return;
        if (errno == ETIMEDOUT)
            ublk_ctrl_send(&disk->ctrl, UBLK_STOP_DEV, NULL, 0, 0);
    }
}

// Ends what has begun of it. May take as long as the requests in flight do (B5).
static void disk_stop(struct ublk_disk *disk)
{
    char path[UBLK_PATH_BYTES];
    int fd;

    // What the kernel caches of the device is written as long as that can be done.
    ublk_ctrl_path(path, 'b', disk->ctrl.id);
    fd = disk->dev->image->is_read_only ? -1 : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0) {
        if (fsync(fd) < 0)
            log_line("ublk: %s: flushing: %s; what was written last may be lost", path, strerror(errno));
        close(fd);
    }
    if (disk->nr_hwqs)
        ublk_ctrl_send(&disk->ctrl, UBLK_STOP_DEV, NULL, 0, 0);
    while (disk->nr_hwqs) {
        struct ublk_hwq *hwq = &disk->hwqs[--disk->nr_hwqs];

        disk_wait_over(disk, hwq);
        hwq_unmap(hwq);
    }
    if (disk->fd >= 0)
        close(disk->fd); // B6
    ublk_ctrl_close(&disk->ctrl);
    free(disk->hwqs);
}

// The kernel's partition scan reads from the device before START_DEV comes back: the queues serve already.
static int disk_go(struct ublk_disk *disk, bool is_recovery)
{
    struct ublk_params params = ublk_params_of(disk->dev, &disk->info);
    int ret = 0;

    disk->dev_sectors = params.basic.dev_sectors;
    if (!is_recovery)
        ret = ublk_ctrl_send(&disk->ctrl, UBLK_SET_PARAMS, &params, sizeof(params), 0);
    if (ret < 0)
        return ret;
    for (unsigned i = 0; i < disk->info.nr_hw_queues; i++) {
        ret = hwq_create(&disk->hwqs[i], disk, i);
        if (ret < 0)
            return ret;
        disk->nr_hwqs++;
        ring_post(disk->hwqs[i].queue->ring, &disk->hwqs[i].start_op, 0);
    }
    ret = ublk_ctrl_send(&disk->ctrl, is_recovery ? UBLK_END_USER_RECOVERY : UBLK_START_DEV, NULL, 0,
                         (uint64_t)getpid());
    for (unsigned i = 0; i < disk->nr_hwqs; i++)
        ret = disk->hwqs[i].error ? disk->hwqs[i].error : ret; // why it had to time out
    return ret;
}

static int disk_start(struct ublk_disk *disk, struct transport_hold *hold, struct device *dev,
                      struct err *err)
{
    char path[UBLK_PATH_BYTES];
    bool is_recovery = false;
    int ret;

    *disk = (struct ublk_disk){.dev = dev, .fd = -1};
    ret = ublk_ctrl_open(&disk->ctrl, err);
    if (ret < 0)
        return ret;
    disk->ctrl.id = (uint32_t)hold->facts[FACT_ID];
    ublk_ctrl_path(path, 'b', disk->ctrl.id);
    if (dev->queues[0].ring->ops == &ring_threads_ops) {
        ret = err_usage(err, "ublk: %s: needs io_uring; use --ring uring, or --nbd or --fuse", path);
        goto out;
    }
    ret = disk_take_over(disk, &is_recovery);
    if (!ret && disk->info.nr_hw_queues > dev->nr_queues) {
        ret = err_usage(err, "ublk: %s: has %u queues; use --queues %u", path, disk->info.nr_hw_queues,
                        disk->info.nr_hw_queues);
        goto out;
    }
    if (!ret)
        ret = disk_open(disk);
    if (!ret && !(disk->hwqs = calloc(disk->info.nr_hw_queues, sizeof(*disk->hwqs))))
        ret = -ENOMEM;
    if (!ret)
        ret = disk_go(disk, is_recovery);
    if (!ret) {
        log_verbose("ublk: %s is %s%s%s", path, dev->name, disk->hwqs[0].is_zero_copy ? ", zero copy" : "",
                    is_recovery ? ", again" : "");
        return 0;
    }
    err_set(err, ret, "ublk: %s: starting: %s", path, strerror(-ret));
out:
    disk_stop(disk);
    return ret;
}

// ---- The transport

static void ublk_destroy(struct transport *transport)
{
    struct ublk_server *server = container_of(transport, struct ublk_server, transport);

    free(server->disks);
    free(server);
}

static int ublk_start(struct transport **transport, const struct transport_options *options,
                      struct transport_hold *holds, unsigned nr_holds, struct err *err)
{
    struct ublk_server *server = calloc(1, sizeof(*server));
    int ret;

    if (!server || !(server->disks = calloc(nr_holds, sizeof(*server->disks)))) {
        free(server);
        return err_set(err, -ENOMEM, "ublk: out of memory");
    }
    be_io_flusher(); // and the workers, which are our children
    if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) < 0)
        log_verbose("ublk: mlockall: %s; out of memory, the device may stall", strerror(errno));
    for (; server->nr_disks < nr_holds; server->nr_disks++) {
        struct ublk_disk *disk = &server->disks[server->nr_disks];

        ret = disk_start(disk, &holds[server->nr_disks],
                         options->devs[min_of(server->nr_disks, options->nr_devs - 1)], err);
        if (ret < 0)
            goto out;
        disk->server = server;
        disk->ring = options->ring;
    }
    server->nr_running = server->nr_disks;
    *transport = &server->transport;
    return 0;

out:
    while (server->nr_disks)
        disk_stop(&server->disks[--server->nr_disks]);
    ublk_destroy(&server->transport);
    return ret;
}

static int disk_stop_work(struct ring_op *op)
{
    disk_stop(container_of(op, struct ublk_disk, stop_op));
    return 0;
}

static void disk_stopped(struct ring_op *op, int res)
{
    struct ublk_server *server = container_of(op, struct ublk_disk, stop_op)->server;

    (void)res;
    if (!--server->nr_running)
        transport_stopped(&server->transport);
}

static void ublk_stop(struct transport *transport)
{
    struct ublk_server *server = container_of(transport, struct ublk_server, transport);

    for (unsigned i = 0; i < server->nr_disks; i++) {
        struct ublk_disk *disk = &server->disks[i];

        disk->stop_op = (struct ring_op){.done = disk_stopped, .code = RING_CALL, .call = disk_stop_work};
        ring_queue(disk->ring, &disk->stop_op);
    }
}

static void ublk_uri(const struct transport_hold *hold, char *uri, unsigned uri_bytes)
{
    char path[UBLK_PATH_BYTES];

    ublk_ctrl_path(path, 'b', (uint32_t)hold->facts[FACT_ID]);
    snprintf(uri, uri_bytes, "%s", path);
}

static int ublk_busy(struct transport *transport, struct err *err)
{
    struct ublk_server *server = container_of(transport, struct ublk_server, transport);

    for (unsigned i = 0; i < server->nr_disks; i++) {
        char path[UBLK_PATH_BYTES], holders[300];

        ublk_ctrl_path(path, 'b', server->disks[i].ctrl.id);
        if (holders_of_device(path, holders, sizeof(holders)))
            return err_set(err, -EBUSY, "%s: %s", path, holders);
    }
    return 0;
}

static int ublk_device_changed(struct transport *transport, struct device *dev, struct err *err)
{
    struct ublk_server *server = container_of(transport, struct ublk_server, transport);
    int result = 0;

    for (unsigned i = 0; i < server->nr_disks; i++) {
        struct ublk_disk *disk = &server->disks[i];
        struct ublk_params params = ublk_params_of(dev, &disk->info);
        int ret;

        if (disk->dev != dev || params.basic.dev_sectors == disk->dev_sectors)
            continue;
        ret = disk->info.flags & UBLK_F_UPDATE_SIZE
                  ? ublk_ctrl_send(&disk->ctrl, UBLK_UPDATE_SIZE, NULL, 0, params.basic.dev_sectors)
                  : -EOPNOTSUPP;
        if (!ret)
            disk->dev_sectors = params.basic.dev_sectors;
        else
            result = err_set(err, ret, "%s: /dev/ublkb%u keeps its size: %s; detach and attach it again",
                             dev->name, disk->ctrl.id,
                             ret == -EOPNOTSUPP ? "this kernel cannot change it (6.16 can)" : strerror(-ret));
    }
    return result;
}

const struct transport_ops ublk_transport_ops = {
    .name = "ublk",
    .hold = ublk_hold,
    .release = ublk_release,
    .start = ublk_start,
    .stop = ublk_stop,
    .destroy = ublk_destroy,
    .uri = ublk_uri,
    .busy = ublk_busy,
    .device_changed = ublk_device_changed,
};
